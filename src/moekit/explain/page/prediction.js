"use strict";
// Figures of single predictions: what the strongest expert of each token and layer does to an answer.
FIGURES.effects = {
  title: (number) => {
    const [text, measure] = effectAt(number);
    return `Effect ${measure.title}${report.texts.length > 1 ? `, ${text.group}` : ""}`;
  },
  label: "Effect",
  choices: () => report.texts.flatMap((text, place) => report.measures.map((measure, rank) =>
    [place * report.measures.length + rank, (report.texts.length > 1 ? `${text.group}: ` : "") + measure.title])),
  draw(width, number) {
    const [text, measure] = effectAt(number), layers = text.layers.filter((layer) => layer.effects[measure.key]);
    const numbers = text.layers.map((_, layer) => layer).filter((layer) => text.layers[layer].effects[measure.key]);
    const cells = text.tokens.map((_, token) => layers.map((layer) => {
      const row = (layer.effects[measure.key][token] || []).map((value, rank) => [value, layer.experts[token][rank]]).filter(([value]) => known(value));
      return row.sort((one, other) => Math.abs(other[0]) - Math.abs(one[0]));
    }));
    // one effect that is far larger than all others would leave them white
    const sizes = cells.flat().filter((row) => row.length).map((row) => Math.abs(row[0][0])).filter((size) => size > 0).sort((one, other) => one - other);
    const top = Math.max(1e-9, sizes[Math.floor(0.97 * (sizes.length - 1))] || 0);
    const digits = top < 0.01 ? 4 : top < 0.1 ? 3 : 2;
    const name = (token) => `${token}  ${visible(text.tokens[token]) || "·"}`;
    const drawn = heat(width, {
      rows: text.tokens.map((_, token) => name(token)), columns: numbers.map((layer) => `layer ${layer}`), rowName: "token", columnName: "layer",
      values: cells.map((row) => row.map((cell) => (cell.length ? cell[0][0] : null))), text: (value) => say(value + 0, digits), top, middle: true,
      tip: (token, layer) => `${safe(name(token))}, layer ${numbers[layer]}` + cells[token][layer].map(([value, expert]) =>
        `<br>expert ${safe(report.layers[numbers[layer]].labels[expert])}: ${say(value, digits + 1)} ${measure.unit}`).join(""),
    });
    return {
      ...drawn,
      csv: [["example", "token", "text", "layer", "expert", measure.key], ...cells.flatMap((row, token) => row.flatMap((cell, layer) =>
        cell.map(([value, expert]) => [text.text, token, text.tokens[token], numbers[layer], report.layers[numbers[layer]].labels[expert], value])))],
    };
  },
};
const effectAt = (number) => [report.texts[Math.floor(number / report.measures.length)], report.measures[number % report.measures.length]];
