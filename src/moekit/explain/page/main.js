"use strict";
const redraws = [], waiting = [];

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const kind = FIGURES[figure.dataset.chart];
  const layers = kind.choices ? kind.choices() : kind.layers ? kind.layers().map(([, number]) => [number, layerName(number)]) : [];
  const select = layers.length ? choice(figure.querySelector(".bar"), kind.label || "Layer", layers, () => place.draw()) : null;
  // the last layer is where groups are told apart most, as a rule
  if (select && !kind.choices) select.selectedIndex = layers.length - 1;
  const layer = () => (select ? Number(select.value) : 0);
  const place = placed(figure, () => kind.title(layer()), (width) => kind.draw(width, layer()));
  redraws.push(place.draw);
  waiting.push(place.ready);
}

for (const box of document.querySelectorAll("[data-table]")) {
  const table = box.querySelector("table");
  sortable(table);
  saveButtons(box.querySelector(".save"), () => box.dataset.table, null, () => tableRows(table));
}

const words = document.getElementById("words");
if (words) {
  const bar = words.querySelector(".bar"), table = words.querySelector("table");
  const layers = report.layers.map((layer, number) => [layer, number]).filter(([layer]) => layer.tokens).map(([, number]) => [number, layerName(number)]);
  const cell = (row, text, value, name = "td") => {
    const made = document.createElement(name);
    made.textContent = text;
    if (value !== undefined) made.dataset.value = value;
    if (value !== undefined && name === "td") made.className = "n";
    row.append(made);
    return made;
  };
  const fill = () => {
    const layer = report.layers[Number(select.value)];
    const body = document.createElement("tbody");
    layer.tokens.forEach((tokens, expert) => {
      const row = document.createElement("tr");
      cell(row, layer.labels[expert], expert, "th").scope = "row";
      cell(row, percent(layer.load[expert], 2), layer.load[expert]);
      const own = layer.vocabulary ? layer.vocabulary.of_experts.input[expert] : null;
      cell(row, percent(own, 0), known(own) ? own : "");
      const shares = layer.shares.map((line) => line[expert]), group = shares.indexOf(Math.max(...shares));
      cell(row, report.shown_groups[group]);
      const list = cell(row, "");
      list.className = "tokens";
      for (const [text, count, share] of tokens) {
        const code = document.createElement("code");
        code.textContent = visible(text);
        code.dataset.tip = `${count.toLocaleString("en")} tokens, ${percent(share, 0)} of the id’s`;
        list.append(code, " ");
      }
      list.dataset.value = tokens.map(([text]) => visible(text)).join(" ");
      body.append(row);
    });
    table.tBodies[0].replaceWith(body);
    table.querySelectorAll("th").forEach((head) => head.removeAttribute("aria-sort"));
  };
  const select = choice(bar, "Layer", layers, fill);
  select.selectedIndex = layers.length - 1;
  sortable(table);
  saveButtons(bar.querySelector(".save"), () => `Tokens of experts, layer ${select.selectedOptions[0].textContent}`, null, () => tableRows(table));
  fill();
}

startText();

// one figure after the other, so that the page answers from the start
const next = () => {
  if (!waiting.length) return;
  waiting.shift()();
  setTimeout(next);
};
next();
addEventListener("beforeprint", () => waiting.splice(0).forEach((ready) => ready()));

const repaint = () => requestAnimationFrame(() => redraws.forEach((draw) => draw()));
document.getElementById("theme").addEventListener("click", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
