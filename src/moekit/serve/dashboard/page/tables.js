"use strict";
// The list of runs, the alarms and the differences of configuration: rows are kept and changed in place, so that a table that is
// sorted, or holds the focus, stays as it is.
const STATES = { training: "trains", finished: "finished", interrupted: "interrupted", stalled: "stalled" };
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
const speed = (value) => (known(value) ? (value >= 100 ? whole(value) : value.toPrecision(2)) : "–");
function lasting(seconds) {
  if (!known(seconds)) return "–";
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor((seconds % 86400) / 3600), Math.floor((seconds % 3600) / 60)];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.max(1, Math.round(seconds))} s`;
}

function put(cell, text, value) {
  if (cell.textContent !== text) cell.textContent = text;
  if (value !== undefined) cell.dataset.value = known(value) ? value : "";
}

const HEAD = ["run", "state", "step", "time left", "tokens/s", "loss", "validation loss", "bits per byte", "alarms", "experts"];
const listed = new Map();

function makeRow(run, changed) {
  const row = document.createElement("tr"), head = document.createElement("th"), label = document.createElement("label");
  const box = document.createElement("input"), swatch = document.createElement("i"), name = document.createElement("span");
  box.type = "checkbox";
  box.addEventListener("change", () => { toggle(run.id); changed(); });
  head.scope = "row";
  swatch.className = "line";
  label.append(box, swatch, name);
  head.append(label);
  row.append(head, ...HEAD.slice(1).map((_, place) => {
    const cell = document.createElement("td");
    if (place > 0 && place < 8) cell.className = "n";
    return cell;
  }));
  return { row, box, swatch, name, head, cells: [...row.cells] };
}

function fillRow(made, run) {
  const { cells, box, swatch, name, head } = made, at = state.chosen.indexOf(run.id), full = at < 0 && state.chosen.length >= MOST;
  put(name, run.name);
  head.title = run.folder;
  box.checked = at >= 0;
  box.disabled = full;
  swatch.style.borderTop = at < 0 ? "3px solid transparent" : `3px ${["solid", "dashed", "dotted", "dashed"][Math.floor(at / 2) % 4]} ${style().series[at % 8]}`;
  put(cells[1], STATES[run.state] || run.state);
  cells[1].className = `state ${run.state}`;
  cells[1].title = run.words;
  const share = known(run.steps) && run.steps > 0 ? Math.min(1, run.step / run.steps) : null;
  put(cells[2], known(run.steps) ? `${whole(run.step)} of ${whole(run.steps)}` : whole(run.step), run.step);
  cells[2].style.backgroundSize = share === null || run.state === "finished" ? "0 3px" : `${100 * share}% 3px`;
  put(cells[3], lasting(run.seconds_left), run.seconds_left);
  put(cells[4], speed(run.tokens_per_second), run.tokens_per_second);
  put(cells[5], say(run.loss), run.loss);
  put(cells[6], say(run.validation_loss), run.validation_loss);
  put(cells[7], say(run.bits_per_byte), run.bits_per_byte);
  put(cells[8], run.n_alarms ? `⚠ ${run.n_alarms}` : "0", run.n_alarms);
  cells[8].classList.toggle("missed", run.n_alarms > 0);
  if (run.explained && !cells[9].firstElementChild) {
    const link = document.createElement("a");
    link.href = `runs/${run.id}/explain.html`;
    link.textContent = "explain";
    cells[9].replaceChildren(link);
  } else if (!run.explained) put(cells[9], "–");
}

function fillRuns(changed) {
  const table = document.querySelector("#list table"), body = table.tBodies[0];
  if (!table.tHead.rows[0].cells.length) {
    HEAD.forEach((word, place) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = word;
      if (place > 1 && place < 9) cell.className = "n";
      table.tHead.rows[0].append(cell);
    });
    sortable(table);
    saveButtons(document.querySelector("#list .save"), () => "Runs", null, () => tableRows(table));
  }
  const there = new Set(state.runs.map((run) => run.id)), sorted = table.querySelector("[aria-sort]");
  for (const [id, made] of listed) if (!there.has(id)) { made.row.remove(); listed.delete(id); }
  state.runs.forEach((run, place) => {
    if (!listed.has(run.id)) listed.set(run.id, makeRow(run, changed));
    const made = listed.get(run.id);
    fillRow(made, run);
    if (sorted ? !made.row.parentNode : body.rows[place] !== made.row) body.insertBefore(made.row, sorted ? null : body.rows[place] || null);
  });
  document.querySelector("#list").hidden = !state.runs.length;
}

const KINDS = { dead: "Dead", collapse: "Collapse", entropy: "Entropy" }, SHOWN = 6;

// Alarms of one kind about one layer of a run belong together: the newest one, and how many came before.
function gathered(runs) {
  const groups = new Map();
  for (const run of runs) for (const alarm of run.alarms) {
    const key = JSON.stringify([run.id, alarm.alarm, alarm.layer]), group = groups.get(key) || { run, first: alarm, n: 0 };
    groups.set(key, { ...group, newest: alarm, n: group.n + 1 });
  }
  return [...groups.values()].sort((a, b) => (b.newest.time || 0) - (a.newest.time || 0));
}

function fillAlarms() {
  const list = document.querySelector("#alarms ul"), groups = gathered(chosenRuns());
  const key = JSON.stringify(groups.map(({ run, newest, n }) => [run.name, newest.time, newest.message, n]));
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  const item = (title, text, small, good) => {
    const made = document.createElement("li"), bold = document.createElement("b"), line = document.createElement("span");
    bold.textContent = title;
    line.textContent = small;
    made.append(bold, text, line);
    made.classList.toggle("good", good);
    return made;
  };
  const items = groups.slice(0, SHOWN).map(({ run, first, newest, n }) => {
    const before = n > 1 ? `; ${n - 1} more of this kind in this layer since step ${whole(first.step)}` : "";
    return item(KINDS[newest.alarm] || String(newest.alarm), String(newest.message || ""), `${run.name}, step ${whole(newest.step)}${before}`, false);
  });
  if (groups.length > SHOWN) items.push(item("More", `${groups.length - SHOWN} other layers or kinds: they stand in metrics.jsonl as lines of kind “alarm”.`, "", false));
  if (!items.length) items.push(item("No alarm", "No expert of these runs is said to be dead, and no layer to have collapsed.", "", true));
  list.replaceChildren(...items);
}

const written = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
function fillDifferences() {
  const section = document.getElementById("settings"), runs = chosenRuns(), box = document.getElementById("differences");
  const key = JSON.stringify([runs.map((run) => run.name), state.rows]);
  section.hidden = runs.length < 2;
  if (box.dataset.key === key || runs.length < 2) return;
  box.dataset.key = key;
  const old = box.querySelector("table"), table = old.cloneNode(false), head = table.createTHead().insertRow(), body = table.createTBody();
  ["key", ...runs.map((run) => run.name)].forEach((word) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = word;
    head.append(cell);
  });
  for (const { key: name, values } of state.rows) {
    const row = body.insertRow(), first = document.createElement("th"), code = document.createElement("code");
    first.scope = "row";
    code.textContent = name;
    first.append(code);
    row.append(first);
    values.forEach((value) => { row.insertCell().textContent = written(value); });
  }
  if (!state.rows.length) body.insertRow().insertCell().textContent = "Their configurations are the same.";
  old.replaceWith(table);
  sortable(table);
  const save = box.querySelector(".save");
  save.replaceChildren();
  saveButtons(save, () => "Differences of configuration", null, () => tableRows(table));
}
