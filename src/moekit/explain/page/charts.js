"use strict";
// How figures look, whatever page they stand on: colours, hover texts, heat maps, lines, and their place on the page.
const style = () => ({
  ink: colour("ink"), muted: colour("muted"), grid: colour("grid"), axis: colour("axis"), surface: colour("surface"),
  series: ["s1", "s2", "s3", "s5", "s6", "s8", "s7", "s4"].map(colour),
});
const DASHES = ["solid", [7, 4], [2, 3], [9, 3, 2, 3]], SIGNS = ["circle", "rect", "triangle", "diamond"];
const tooltip = (formatter, trigger = "item") => ({
  trigger, formatter, confine: true, backgroundColor: colour("ink"), borderWidth: 0,
  textStyle: { color: colour("surface"), fontSize: 13 },
});

// Rows x columns of values; in a narrow window the longer side goes down the page, so that cells keep room for a figure.
// With `middle`, values lie on both sides of 0 and are coloured by it.
function heat(width, { rows, columns, rowName, columnName, values, text, tip, top, middle, turns = true, tall: given, across: below = "" }) {
  const look = style(), turned = turns && width < 640 && columns.length > rows.length;
  const [across, down] = turned ? [rows, columns] : [columns, rows];
  const names = turned ? [rowName, columnName] : [columnName, rowName];
  const letters = Math.max(...down.map((name) => [...name].reduce((sum, sign) => sum + (sign > "\u2e80" ? 1.8 : 1), 0)));
  const left = Math.min(150, 40 + 7.5 * letters), cell = (width - left - 12) / across.length;
  const tall = given || down.length > 40 ? given || 14 : Math.max(22, Math.min(38, 420 / down.length));
  const most = top || Math.max(1e-9, ...values.flat().filter(known));
  const data = [];
  values.forEach((line, row) => line.forEach((value, column) => {
    if (!known(value)) return;
    const dark = Math.abs(value) / most > 0.55;
    data.push({
      value: turned ? [row, column, value] : [column, row, value],
      label: { color: dark ? colour("cell-high") : look.ink },
    });
  }));
  const place = (item) => (turned ? [item.value[0], item.value[1]] : [item.value[1], item.value[0]]);
  const axis = (labels, name, gap) => ({
    type: "category", data: labels, name, nameLocation: "middle", nameGap: gap, nameTextStyle: { color: look.muted },
    axisLabel: { color: look.muted, width: gap, hideOverlap: true }, axisLine: { show: false }, axisTick: { show: false },
  });
  return {
    height: down.length * tall + 92,
    option: {
      animation: false, tooltip: tooltip((item) => tip(...place(item), item.value[2])),
      grid: { left, right: 12, top: 30, bottom: 54 },
      xAxis: { ...axis(across, names[0], 26), position: "top", nameGap: 8, name: below, nameLocation: "start", axisLabel: { color: look.muted, hideOverlap: true, interval: across.length > 40 ? "auto" : 0, ...(across.length > 40 ? {} : { width: cell, overflow: "truncate" }) } },
      yAxis: { ...axis(down, names[1], left - 18), inverse: true, axisLabel: { color: look.muted, width: left - 28, overflow: "truncate" } },
      visualMap: {
        min: middle ? -most : 0, max: most, calculable: false, orient: "horizontal", left, bottom: 8, itemWidth: 12, itemHeight: 120,
        text: [text(most), text(middle ? -most : 0)], textStyle: { color: look.muted },
        inRange: { color: middle ? [colour("heat"), look.surface, colour("s2")] : [look.surface, colour("heat")] },
      },
      series: [{
        type: "heatmap", data, itemStyle: { borderColor: look.grid, borderWidth: 1 },
        label: { show: cell > 29 && tall > 18, formatter: (item) => text(item.value[2]), fontSize: 11 },
        emphasis: { itemStyle: { borderColor: look.ink, borderWidth: 2 } },
      }],
    },
  };
}

// Lines that differ in dashes and marks as well as in colour. Series: [name, [[x, y], ...]]. `xText`, `yText` and `text` write
// numbers below, beside and in hover texts; `whole` numbers have no ticks between them; `plain` names a line to compare with.
function lines(width, series, { x, y, categories, percentage, xText, yText, text, whole, plain }) {
  const look = style(), shape = (value) => (percentage ? percent(value) : text ? text(value) : say(value, whole ? 0 : 3));
  const most = Math.max(0, ...series.flatMap(([, data]) => data.map((value) => (Array.isArray(value) ? value[1] : value)).filter(known)));
  const digits = most >= 0.05 ? 0 : most >= 0.005 ? 1 : 3;
  const rows = Math.ceil(series.length / Math.max(1, Math.floor(width / 190)));
  const head = series.length > 12 ? 40 : 22 * rows + 18;
  return {
    height: 290 + head,
    option: {
      animation: false, tooltip: { ...tooltip(undefined, "axis"), valueFormatter: shape, order: "valueDesc" },
      legend: { type: series.length > 12 ? "scroll" : "plain", top: 0, left: 0, textStyle: { color: look.ink }, itemWidth: 36 },
      grid: { left: 62, right: 18, top: head, bottom: 46 },
      xAxis: {
        type: categories ? "category" : "value", data: categories, name: x, nameLocation: "middle", nameGap: 28, min: categories ? undefined : "dataMin",
        nameTextStyle: { color: look.muted }, axisLabel: { color: look.muted, hideOverlap: true, ...(xText ? { formatter: xText } : {}) },
        axisLine: { lineStyle: { color: look.axis } }, splitLine: { show: false },
      },
      yAxis: {
        type: "value", name: y, nameLocation: "middle", nameGap: 46, nameTextStyle: { color: look.muted }, scale: !percentage && !whole,
        minInterval: whole ? 1 : undefined,
        axisLabel: { color: look.muted, formatter: (value) => (percentage ? percent(value, digits) : yText ? yText(value) : Number(value.toFixed(4))) },
        splitLine: { lineStyle: { color: look.grid } },
      },
      series: series.map(([name, data], index) => ({
        name, type: "line", data, symbol: SIGNS[index % 4], symbolSize: 7, showSymbol: data.length < 60, connectNulls: true,
        ...(name === plain ? { lineStyle: { width: 2, type: "dotted", color: look.muted }, itemStyle: { color: look.muted }, showSymbol: false }
          : { lineStyle: { width: 2, type: DASHES[Math.floor(index / 2) % 4], color: look.series[index % 8] }, itemStyle: { color: look.series[index % 8] } }),
      })),
    },
    csv: [["series", x, y], ...series.flatMap(([name, data]) =>
      data.map((value, place) => Array.isArray(value) ? [name, ...value] : [name, categories[place], value]))],
  };
}

// A figure of the page: its heading, buttons, picture and caption. `draw` redraws it, `ready` draws it if it never was.
function placed(figure, title, make) {
  const bar = figure.querySelector(".bar"), plot = figure.querySelector(".plot"), heading = figure.querySelector("h3");
  const caption = figure.querySelector("figcaption"), said = caption.textContent;
  let drawn = null, chart = null, last = 0;
  function draw() {
    const width = (last = plot.clientWidth);
    if (!width) return;
    drawn = make(width);
    plot.style.height = drawn.height + "px";
    chart = chart || echarts.init(plot, null, { renderer: "canvas" });
    chart.resize();
    const family = getComputedStyle(document.body).fontFamily;
    const hidden = chart.getOption()?.legend?.[0]?.selected; // what a click on the legend switched off
    if (hidden && drawn.option.legend) drawn.option.legend.selected = hidden;
    chart.setOption({ textStyle: { fontFamily: family }, ...drawn.option }, true);
    heading.textContent = title();
    plot.setAttribute("aria-label", `${title()}. ${said} The CSV button gives its figures.`);
    caption.textContent = drawn.note ? `${said} ${drawn.note}.` : said;
  }
  const ready = () => drawn || draw();
  saveButtons(bar.querySelector(".save"), title,
    (ratio) => { ready(); return chart.renderToCanvas({ pixelRatio: ratio, backgroundColor: colour("surface") }); },
    () => { ready(); return drawn.csv; });
  heading.textContent = title();
  // its own height changes with its width, which alone matters
  new ResizeObserver(() => { if (drawn && plot.clientWidth !== last) draw(); }).observe(plot);
  return { draw, ready };
}
