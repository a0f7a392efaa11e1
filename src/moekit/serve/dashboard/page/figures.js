"use strict";
// What each figure of the dashboard draws now: an option of ECharts with a height and the rows of its CSV file, or null where
// the chosen runs have nothing for it.
const WORDS = {
  gradient_norm: "gradient norm", lr: "learning rate", tokens_per_second: "tokens a second", tokens: "tokens", seconds: "seconds of training",
  max_violation: "max violation of the worst layer", dropped_share: "share of choices dropped", mean_active_experts: "experts that answered a token",
  "aux/load_balance": "load balance loss (1 is even)", "aux/router_z": "router z loss", "aux/importance": "importance loss",
  validation_max_violation: "validation: max violation of the worst layer", validation_dropped_share: "validation: share of choices dropped",
  validation_mean_active_experts: "validation: experts that answered a token",
};
const wording = (name) => WORDS[name] || name.replace(/^validation_/, "validation: ").replaceAll("_", " ");
const short = (value) => {
  const size = Math.abs(value);
  const [unit, by] = size >= 1e9 ? [" G", 1e9] : size >= 1e6 ? [" M", 1e6] : size >= 1e4 ? [" k", 1e3] : ["", 1];
  return Number((value / by).toPrecision(4)) + unit;
};
const figureText = (value) => {
  if (!known(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2).replaceAll("-", "−");
  return String(Number(value.toPrecision(5))).replace("-", "−");
};
const settings = { axis: "step", width: 1, measure: "", run: "", layer: 0 };
const observed = () => chosenRuns().find((run) => run.id === settings.run) || chosenRuns()[0];
const record = () => (observed() ? state.routing.get(observed().id) : null);

// Curves of the chosen runs; each keeps the colour that its place among them gives it.
function compare(width, part, name, title, smoothed = 1, scale = () => 1) {
  const runs = chosenRuns().map((run) => [run.name, smooth(curve(run, part, name, settings.axis), smoothed)
    .map(([x, y]) => [x, known(y) ? y * scale(run) : null])]);
  if (!runs.some(([, data]) => data.some(([, y]) => known(y)))) return null;
  const drawn = lines(width, runs, { x: AXES[settings.axis][0], y: title, xText: short, yText: (value) => (Math.abs(value) >= 1e4 ? short(value) : figureText(value)), text: figureText });
  return drawn;
}

// Lines of the layers of the observed run: points [x, y] by layer.
function byLayer(width, layers, y, options = {}) {
  if (!layers.some(([, points]) => points.some(([, value]) => known(value)))) return null;
  return lines(width, layers, { x: "step", y, xText: short, ...options });
}

function balance(width, key, y, options) {
  const run = observed(), found = record();
  if (!run) return null;
  // the record counts every step; lines of metrics are of single ones
  if (found && found.layers.every((layer) => layer.history))
    return byLayer(width, found.layers.map((layer, number) => [layerWords(layer, number),
      layer.history.step.map((step, place) => [step, layer.history[key][place]])]), y, options);
  const points = curve(run, "layers", key, "step"), many = Math.max(0, ...points.map(([, values]) => (values || []).length));
  if (many) return byLayer(width, Array.from({ length: many }, (_, number) => [found ? layerWords(found.layers[number], number) : `layer ${number}`,
    points.map(([step, values]) => [step, values ? values[number] : null])]), y, options);
  if (key !== "max_violation") return null;
  return byLayer(width, [["worst layer", curve(run, "train", "max_violation", "step")]], y, options);
}

const layerWords = (layer, number) => `layer ${number} · ${layer.router}`;
const about = () => (chosenRuns().length > 1 && observed() ? ` of ${observed().name}` : "");

function heatOverTime(width) {
  const found = record(), run = observed();
  if (!run) return null;
  let steps, loads, labels;
  const layer = found?.layers[settings.layer];
  if (layer?.history) {
    [steps, loads, labels] = [layer.history.step, layer.history.load, layer.labels];
  } else {
    const points = curve(run, "loads", "load", "step").filter(([, load]) => load), n = Math.max(0, ...points.map(([, load]) => load.length));
    if (!n) return null;
    [steps, loads] = [points.map(([step]) => step), points.map(([, load]) => load.map((share) => share * load.length))];
    labels = Array.from({ length: n }, (_, expert) => String(expert));
  }
  const top = Math.min(8, Math.max(2, ...loads.flat().filter(known)));
  const values = labels.map((_, expert) => loads.map((load) => load[expert] ?? null));
  const tall = Math.max(5, Math.min(22, Math.floor(520 / labels.length)));
  return {
    ...heat(width, {
      rows: labels, columns: steps.map((step) => short(step)), rowName: "expert", columnName: "step", values, top, turns: false, tall,
      text: (value) => value.toFixed(value < 9.95 ? 1 : 0), across: "step",
      tip: (expert, place, value) => `expert ${safe(labels[expert])}, to step ${steps[place].toLocaleString("en")}<br>${say(value, 2)} times the mean of its layer`,
    }),
    note: layer?.history ? "" : "Of all layers together, from metrics.jsonl: train.record keeps each layer of its own",
    csv: [["step", ...labels.map((label) => `expert ${label}, times the mean`)], ...steps.map((step, place) => [step, ...loads[place]])],
  };
}

const measured = () => (record() ? record().layers.map((layer, number) => [layer, number]).filter(([layer]) => layer.measures) : []);
function measure(width, key, y) {
  const layers = measured().map(([layer, number]) => [layerWords(layer, number), layer.measures.step.map((step, place) => [step, layer.measures[key][place]])]);
  if (key === "group" && layers.length) {
    const chance = new Map();
    for (const [layer] of measured()) layer.measures.step.forEach((step, place) => chance.set(step, Math.max(chance.get(step) ?? 0, layer.measures.chance[place] ?? 0)));
    if (layers.some(([, points]) => points.some(([, value]) => known(value)))) layers.push(["chance, at most", [...chance]]);
  }
  return byLayer(width, layers, y, { percentage: true, plain: "chance, at most" });
}

const FIGURES = {
  validation: { title: () => "Validation loss", draw: (width) => compare(width, "validation", "validation_loss", "nats") },
  bits: {
    title: () => "Validation bits per byte",
    draw: (width) => (chosenRuns().some((run) => run.bytes_per_token)
      ? compare(width, "validation", "validation_loss", "bits per byte", 1, (run) => (run.bytes_per_token ? 1 / Math.LN2 / run.bytes_per_token : NaN)) : null),
  },
  loss: {
    title: () => (settings.width > 1 ? `Training loss, mean of ${settings.width} points` : "Training loss"),
    draw: (width) => compare(width, "train", "loss", "nats", settings.width),
  },
  other: {
    title: () => {
      const text = wording(settings.measure);
      return text[0] ? text[0].toUpperCase() + text.slice(1) : "Another measure";
    },
    draw: (width) => {
      const [part, name] = settings.measure.startsWith("validation_") ? ["validation", settings.measure] : ["train", settings.measure];
      return compare(width, part, name, wording(name));
    },
  },
  load_entropy: { title: () => `Load entropy${about()}`, draw: (width) => balance(width, "load_entropy", "load entropy, 1 is even") },
  max_violation: { title: () => `Max violation${about()}`, draw: (width) => balance(width, "max_violation", "max violation, 0 is even") },
  dead_experts: { title: () => `Dead experts${about()}`, draw: (width) => balance(width, "dead_experts", "dead experts", { whole: true }) },
  heat: {
    title: () => `Load over time${about()}${record()?.layers[settings.layer]?.history ? `, ${layerWords(record().layers[settings.layer], settings.layer)}` : ""}`,
    draw: heatOverTime,
  },
  group: { title: () => `What experts say of the group${about()}`, draw: (width) => measure(width, "group", "share of what there is to say") },
  vocabulary: { title: () => `Specialisation by word${about()}`, draw: (width) => measure(width, "vocabulary", "share of an id’s tokens") },
  saturation: {
    title: () => `How early routes settled${about()}`,
    draw: (width) => byLayer(width, measured().filter(([layer]) => layer.measures.saturation).map(([layer, number]) =>
      [layerWords(layer, number), layer.measures.saturation.step.map((step, place) => [step, layer.measures.saturation.share[place]])]), "share of common choices", { percentage: true }),
  },
};
