"use strict";
// What the page knows: the list of runs, the chosen ones, their curves and records. Only what is new is asked for.
const EVERY = 1500, SLOWLY = 5000, UNSEEN = 20000, MOST = 8;
const state = { runs: [], chosen: [], touched: false, series: new Map(), routing: new Map(), rows: [], failed: 0, paused: false, last: null };
const runOf = (id) => state.runs.find((run) => run.id === id);
const chosenRuns = () => state.chosen.map(runOf).filter(Boolean);

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (answer.status === 404) return null; // the run has gone
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

// Columns of points; what comes is put behind what is there.
function joined(known, part) {
  const columns = part.from === 0 || !known ? {} : known.columns, length = part.from === 0 || !known ? 0 : known.length;
  let more = 0;
  for (const [name, values] of Object.entries(part.columns)) {
    more = values.length;
    columns[name] = (columns[name] || Array(length).fill(null)).concat(values);
  }
  for (const values of Object.values(columns)) while (values.length < length + more) values.push(null);
  return { columns, length: length + more, last: part.last };
}

async function updateSeries(run) {
  const known = state.series.get(run.id);
  const same = known && known.generation === run.generation;
  const all = same && Object.entries(run.lengths).every(([name, length]) => known.parts[name].length === length);
  if (all && known.step === run.step && known.changed === run.changed) return false;
  const have = same ? Object.entries(known.parts).map(([name, part]) => `&${name}=${part.length}`).join("") : "";
  const found = await ask(`api/runs/${run.id}/series?generation=${same ? run.generation : ""}${have}`);
  if (!found) return false;
  const parts = {};
  for (const [name, part] of Object.entries(found.series)) parts[name] = joined(same ? known.parts[name] : null, part);
  state.series.set(run.id, { generation: found.generation, step: run.step, changed: run.changed, parts });
  return true;
}

async function updateRouting(run) {
  const known = state.routing.get(run.id);
  if (!run.routing || (known && known.version === run.routing)) return false;
  const found = await ask(`api/runs/${run.id}/routing`);
  if (found) state.routing.set(run.id, { version: run.routing, ...found });
  return Boolean(found);
}

// Those that train, or the newest ones: what somebody who opens the page most likely came for.
function choose() {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("runs");
  if (!state.touched && wanted !== null) {
    state.touched = true;
    state.chosen = wanted.split(",").filter(Boolean).slice(0, MOST);
  }
  const there = state.chosen.filter(runOf);
  if (there.length || state.touched) return;
  const training = state.runs.filter((run) => run.state === "training").slice(0, 4);
  state.chosen = (training.length ? training : state.runs.slice(0, 3)).map((run) => run.id);
}

function toggle(id) {
  state.touched = true;
  const at = state.chosen.indexOf(id);
  if (at >= 0) state.chosen.splice(at, 1);
  else state.chosen.push(id);
  history.replaceState(null, "", `#runs=${state.chosen.join(",")}`);
}

let compared = "";
async function updateDifferences() {
  const runs = chosenRuns(), key = runs.map((run) => run.id).join(",");
  if (runs.length < 2) {
    state.rows = [];
    compared = key;
    return;
  }
  if (key === compared) return;
  state.rows = (await ask(`api/differences?runs=${key}`)).rows;
  compared = key;
}

async function update() {
  state.list = await ask("api/runs");
  state.runs = state.list.runs;
  choose();
  const results = await Promise.all(chosenRuns().flatMap((run) => [updateSeries(run), updateRouting(run)]));
  await updateDifferences();
  return results.some(Boolean);
}

// A curve of a run: [x, y] of a name in one of its series, over steps, tokens or minutes.
const AXES = { step: ["step", (run, columns) => columns.step], tokens: ["tokens", (run, columns) => columns.tokens],
  minutes: ["minutes of training", (run, columns) => (columns.seconds || []).map((value) => (known(value) ? value / 60 : null))] };

function curve(run, part, name, axis) {
  const found = state.series.get(run.id)?.parts[part];
  if (!found) return [];
  const columns = { ...found.columns };
  if (found.last) for (const key of new Set([...Object.keys(columns), ...Object.keys(found.last)]))
    columns[key] = (columns[key] || Array(found.length).fill(null)).concat([found.last[key] ?? null]);
  const x = AXES[axis][1](run, columns) || [], y = columns[name] || [];
  return y.map((value, place) => [x[place] ?? null, value]).filter(([one]) => known(one));
}

const names = (run, part) => {
  const found = state.series.get(run.id)?.parts[part];
  return found ? Object.keys({ ...found.columns, ...(found.last || {}) }) : [];
};

function smooth(points, width) {
  if (width < 2) return points;
  const window = [];
  let sum = 0;
  return points.filter(([, y]) => known(y)).map(([x, y]) => {
    window.push(y);
    sum += y;
    if (window.length > width) sum -= window.shift();
    return [x, sum / window.length];
  });
}
