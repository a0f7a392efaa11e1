"use strict";
// A text token by token, coloured by the expert of a layer; the expert's name stands below, so that no colour is needed.
const visible = (text) =>
  text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/ {2,}/g, (run) => `␣×${run.length}`).replace(/^ | $/g, "␣");
const signed = (value) => `${value > 0 ? "+" : ""}${say(value, Math.abs(value) < 0.001 ? 5 : 3)}`;
const PALETTE = ["s1", "s2", "s3", "s5", "s6", "s8", "s7", "s4"];

function startText() {
  const box = document.getElementById("reading");
  if (!box || !report.texts.length) return;
  const bar = box.querySelector(".bar"), page = box.querySelector(".reading"), detail = box.querySelector(".detail");
  const heading = box.querySelector("h3");
  const layers = report.layers.map((_, number) => [number, layerName(number)]).filter(([number]) => report.texts[0].layers[number]);
  const texts = report.texts.map((text, number) => [number, `${number + 1} · ${text.group}`]);
  let text = report.texts[0], number = 0;
  const selectLayer = choice(bar, "Layer", layers, () => show()), selectText = choice(bar, "Text", texts, () => show());
  selectLayer.selectedIndex = layers.length - 1;
  const label = (expert) => report.layers[number].labels[expert];
  const shade = (expert) => PALETTE[expert % PALETTE.length];

  // of a single prediction: what follows, and what each expert does to it
  function more(layer, place) {
    if (!layer.effects) return "";
    const lines = [], other = layer.next_best[place], answer = Array.isArray(text.answers) ? text.answers[place] : null;
    if (known(other)) lines[0] = `, next best: expert ${label(other)}`;
    if (answer) lines.push(answer.next === null ? `expects “${visible(answer.top)}” (${percent(answer.top_probability)})`
      : `then “${visible(answer.next)}” with ${percent(answer.probability)}, place ${answer.rank}; expected “${visible(answer.top)}” (${percent(answer.top_probability)})`);
    for (const { key, title, unit } of report.measures) {
      const row = (layer.effects[key] || [])[place] || [];
      const said = row.map((value, rank) => (known(value) ? `expert ${label(layer.experts[place][rank])} ${signed(value)}` : null)).filter(Boolean);
      if (said.length) lines.push(`without it ${title}: ${said.join(", ")} ${unit}`);
    }
    const [first, ...rest] = known(other) ? lines : ["", ...lines];
    return first + rest.map((line) => "\n" + line).join("");
  }

  function details(place) {
    const layer = text.layers[number];
    const chosen = layer.experts[place].map((expert, rank) => `expert ${label(expert)} with ${say(layer.weights[place][rank])}`);
    const named = text.ids[place] >= 0 ? `, id ${text.ids[place]}` : "";
    return `“${visible(text.tokens[place]) || "part of a character"}”${named}: ${chosen.join(", ") || "no expert"}\n` +
      `entropy ${say(layer.entropy[place])} nats, margin ${say(layer.margin[place])}${more(layer, place)}`;
  }

  function show() {
    text = report.texts[Number(selectText.value)];
    number = Number(selectLayer.value);
    const layer = text.layers[number];
    page.replaceChildren();
    text.tokens.forEach((piece, place) => {
      if (text.gap[place]) {
        const gap = document.createElement("span");
        gap.className = "gap";
        gap.textContent = "…";
        page.append(gap);
      }
      const token = document.createElement("span"), word = document.createElement("b"), below = document.createElement("small");
      const expert = layer.experts[place][0];
      token.className = "t";
      token.dataset.place = place;
      token.dataset.tip = details(place);
      token.tabIndex = place === 0 ? 0 : -1;
      word.textContent = piece === "" ? "·" : piece.replaceAll("\n", "↵").replaceAll("\t", "⇥ ");
      if (expert === undefined) {
        below.textContent = "–";
      } else {
        below.textContent = label(expert);
        word.style.borderColor = colour(shade(expert));
        word.style.background = `color-mix(in srgb, ${colour(shade(expert))} 22%, transparent)`;
      }
      token.append(word, below);
      page.append(token);
      if (piece.includes("\n")) page.append(document.createElement("i"));
    });
    heading.textContent = title();
    detail.textContent = "Point at a token, or walk with the arrow keys.";
  }

  page.addEventListener("focusin", (event) => {
    const token = event.target.closest(".t");
    if (token) detail.textContent = token.dataset.tip;
  });
  page.addEventListener("click", (event) => {
    const token = event.target.closest(".t");
    if (token) token.focus();
  });
  page.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key], token = event.target.closest(".t");
    if (!way || !token) return;
    const next = page.querySelectorAll(".t")[Number(token.dataset.place) + way];
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  const title = () => `Text ${selectText.selectedOptions[0].textContent}, layer ${layerName(number)}`;
  function picture(ratio) {
    const canvas = document.createElement("canvas"), width = 1000, line = 46, margin = 12;
    const family = getComputedStyle(document.body).fontFamily;
    const pen = canvas.getContext("2d"), places = [];
    pen.font = `16px ${family}`;
    let x = margin, y = margin;
    text.tokens.forEach((piece, place) => {
      const word = (text.gap[place] ? "… " : "") + (piece === "" ? "·" : piece.replaceAll("\n", "↵").replaceAll("\t", "⇥ "));
      const room = Math.max(pen.measureText(word).width + 3, 18);
      if (x + room > width - margin && x > margin) [x, y] = [margin, y + line];
      places.push([word, x, y, room, text.layers[number].experts[place][0]]);
      x += room + 1;
      if (piece.includes("\n")) [x, y] = [margin, y + line];
    });
    canvas.width = width * ratio;
    canvas.height = (y + line + margin) * ratio;
    pen.scale(ratio, ratio);
    pen.fillStyle = colour("surface");
    pen.fillRect(0, 0, width, canvas.height);
    for (const [word, left, top, room, expert] of places) {
      if (expert !== undefined) {
        pen.fillStyle = colour(shade(expert));
        pen.globalAlpha = 0.22;
        pen.fillRect(left, top, room, 24);
        pen.globalAlpha = 1;
        pen.fillRect(left, top + 24, room, 3);
      }
      pen.fillStyle = colour("ink");
      pen.font = `16px ${family}`;
      pen.fillText(word, left + 1, top + 18);
      pen.fillStyle = colour("muted");
      pen.font = `10.5px ${family}`;
      pen.fillText(expert === undefined ? "–" : label(expert), left + 2, top + 38);
    }
    return canvas;
  }
  const keys = (report.measures || []).map((one) => one.key);
  saveButtons(bar.querySelector(".save"), title, picture, () => [
    ["text", "group", "layer", "place", "id", "token", "experts", "weights", "entropy", "margin", ...keys],
    ...text.tokens.map((piece, place) => {
      const layer = text.layers[number];
      return [text.text, text.group, number, place, text.ids[place], piece, layer.experts[place].map(label).join(" "),
        layer.weights[place].join(" "), layer.entropy[place], layer.margin[place],
        ...keys.map((key) => ((layer.effects[key] || [])[place] || []).join(" "))];
    }),
  ]);
  redraws.push(show);
  show();
}
