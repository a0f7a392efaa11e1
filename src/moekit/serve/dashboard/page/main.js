"use strict";
// Asks for what is new, now and then, and draws what has changed. A figure under the pointer waits until the pointer leaves.
const places = new Map(), waiting = new Set();
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const kind = FIGURES[figure.dataset.chart];
  let option = null;
  const place = placed(figure, kind.title, () => option);
  const draw = () => {
    option = kind.draw(document.getElementById("runs").clientWidth);
    figure.hidden = !option;
    if (option) figure.closest("section").hidden = false; // what is hidden has no width
    if (option) place.draw();
  };
  figure.addEventListener("pointerleave", () => { if (waiting.delete(draw)) draw(); });
  places.set(figure, { draw, place });
}

// until there is something to show
for (const section of document.querySelectorAll("section:not(#runs)")) section.hidden = true;
document.getElementById("list").hidden = true;

function drawAll(patient) {
  for (const [figure, { draw }] of places) {
    if (patient && figure.matches(":hover") && !figure.hidden) waiting.add(draw);
    else { waiting.delete(draw); draw(); }
  }
  for (const name of ["losses", "balance", "loads", "specialisation"]) {
    const section = document.getElementById(name);
    section.hidden = ![...section.querySelectorAll("figure[data-chart]")].some((figure) => !figure.hidden);
  }
  for (const link of document.querySelectorAll("nav a")) link.hidden = document.querySelector(link.hash).hidden;
}

// A choice whose items come and go with the runs: [value, text] for each, kept where it still is among them.
function changing(bar, label, key, changed) {
  const select = choice(bar, label, [["", ""], ["", ""]], () => { settings[key] = select.value; changed(); }), box = select.parentNode;
  return (items, wanted) => {
    const now = JSON.stringify(items);
    if (select.dataset.items !== now) {
      select.dataset.items = now;
      select.replaceChildren(...items.map(([value, text]) => new Option(text, value)));
    }
    const value = items.some(([one]) => String(one) === String(settings[key])) ? settings[key] : wanted;
    settings[key] = value;
    select.value = value;
    box.hidden = items.length < 2;
  };
}

const redraw = () => { offer(); drawAll(false); };
const curves = document.querySelector("#losses .controls"), heads = [document.querySelector("#balance .controls")];
const bars = { other: document.querySelector('[data-chart="other"] .bar'), heat: document.querySelector('[data-chart="heat"] .bar') };
const axis = changing(curves, "Over", "axis", redraw), width = changing(curves, "Training loss", "width", redraw);
const measures = changing(bars.other, "Measure", "measure", redraw), layers = changing(bars.heat, "Layer", "layer", redraw);
const observe = changing(heads[0], "Run", "run", redraw);

function offer() {
  const runs = chosenRuns(), sparse = runs.filter((run) => state.routing.has(run.id) || names(run, "layers").length || names(run, "loads").length);
  axis([["step", "steps"], ["tokens", "tokens"], ["minutes", "minutes of training"]], "step");
  width([[1, "as logged"], [5, "mean of 5 points"], [20, "mean of 20 points"], [100, "mean of 100 points"]], 1);
  settings.width = Number(settings.width);
  const skipped = ["step", "time", "tokens", "seconds", "loss", "validation_loss"];
  const known = [...new Set(runs.flatMap((run) => [...names(run, "train"), ...names(run, "validation")]))].filter((name) => !skipped.includes(name));
  measures(known.map((name) => [name, wording(name)]), known.includes("tokens_per_second") ? "tokens_per_second" : known[0] || "");
  observe((sparse.length ? sparse : runs).map((run) => [run.id, run.name]), (sparse.find((run) => state.routing.has(run.id)) || sparse[0] || runs[0] || { id: "" }).id);
  const found = record()?.layers.map((layer, number) => [number, layerWords(layer, number)]).filter(([number]) => record().layers[number].history) || [];
  layers(found, found.length ? found[found.length - 1][0] : 0);
  settings.layer = Number(settings.layer);
}

const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
function say_what_is() {
  const by = (name) => state.runs.filter((run) => run.state === name).length, parts = [];
  if (by("training")) parts.push(`${count(by("training"), "run trains", "runs train")}`);
  if (by("stalled")) parts.push(`${by("stalled")} stalled`);
  if (by("interrupted")) parts.push(`${by("interrupted")} interrupted`);
  if (by("finished")) parts.push(`${by("finished")} finished`);
  const empty = !state.runs.length, where = state.list.folders.join(", ");
  put(document.getElementById("headline"), empty ? "No run yet" : parts.join(", "));
  const first = chosenRuns()[0], lead = document.getElementById("lead");
  const told = chosenRuns().filter((run) => run.words).map((run) => (run.words === "begins" ? `${run.name} begins` : `${run.name}: ${run.words}`));
  put(lead, empty ? `Waiting for runs in ${where}. Start one with: moekit train CONFIG`
    : !first ? "Choose a run below." : told.length ? `${told.slice(0, 3).join(". ")}.` : "");
  put(document.getElementById("where"), where);
  const behind = state.list.behind ? ` · reading ${count(state.list.behind, "long file", "long files")}` : "";
  put(document.getElementById("when"), `${new Date(state.list.now * 1000).toLocaleTimeString()}${behind}`);
}

function show(news) {
  say_what_is();
  fillRuns(refresh);
  fillAlarms();
  fillDifferences();
  document.getElementById("alarms").hidden = !chosenRuns().length;
  const key = JSON.stringify([state.chosen, state.runs.map((run) => run.name)]);
  if (news || key !== state.last) {
    offer();
    drawAll(key === state.last);
  }
  state.last = key;
}

let timer = null, asking = false, again = false;
async function refresh() {
  if (asking) { again = true; return; }
  asking = true;
  clearTimeout(timer);
  try {
    const news = await update();
    state.failed = 0;
    show(news);
  } catch (error) {
    // what was answered while the server went away; anything else is a fault of this page
    if (!(error instanceof TypeError && /fetch|network|load/i.test(error.message)) && !/api\//.test(error.message)) console.error(error);
    state.failed += 1;
  }
  const lost = document.getElementById("lost");
  lost.hidden = state.failed < 2;
  if (!lost.hidden) put(lost, "The dashboard does not answer: it was stopped, or this machine sleeps. The page goes on by itself when it is back.");
  asking = false;
  if (again) { again = false; refresh(); return; }
  const lively = state.runs.some((run) => run.state === "training") || state.list?.behind;
  const pause = state.failed ? Math.min(20000, 1000 * 2 ** state.failed) : document.hidden ? UNSEEN : lively ? EVERY : SLOWLY;
  if (!state.paused) timer = setTimeout(refresh, pause);
}

const pause = document.getElementById("pause");
pause.addEventListener("click", () => {
  state.paused = !state.paused;
  pause.textContent = state.paused ? "Go on" : "Pause";
  pause.setAttribute("aria-pressed", state.paused);
  clearTimeout(timer);
  if (!state.paused) refresh();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !state.paused) refresh(); });
const repaint = () => requestAnimationFrame(() => { if (state.list) { fillRuns(refresh); drawAll(false); } });
document.getElementById("theme").addEventListener("click", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
refresh();
