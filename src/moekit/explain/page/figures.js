"use strict";
// What each figure of a record draws: a function of the layer that is chosen and of the width, giving an option of ECharts, a
// height in pixels and the rows of its CSV file.
const layerName = (number) => `${number} · ${report.layers[number].router}`;
const all = (key) => report.layers.map((layer, number) => [layer, number]).filter(([layer]) => layer[key]);
const FIGURES = {
  load: {
    title: () => "Load of the experts, times the mean",
    draw(width) {
      const n = Math.max(...report.layers.map((layer) => layer.n_experts));
      const values = report.layers.map((layer) => layer.load.map((share) => share * (layer.n_experts)));
      const top = Math.max(2, ...values.flat());
      const names = report.layers.map((_, number) => layerName(number)), long = names.some((name) => name.length > 16);
      return {
        ...heat(width, {
          rows: long ? names.map((_, number) => String(number)) : names, columns: Array.from({ length: n }, (_, expert) => String(expert)),
          rowName: "layer", columnName: "expert", values, text: (value) => value.toFixed(value < 9.95 ? 1 : 0), top,
          tip: (layer, expert, value) => `layer ${safe(layerName(layer))}<br>expert ${safe(report.layers[layer].labels[expert])}<br>` +
            `${percent(report.layers[layer].load[expert], 2)} of the choices, ${say(value, 2)} times the mean`,
        }),
        csv: [["layer", "router", "expert", "share of choices", "times the mean"], ...values.flatMap((line, layer) => line.map((value, expert) =>
          [layer, report.layers[layer].router, report.layers[layer].labels[expert], report.layers[layer].load[expert], value]))],
      };
    },
  },
  groups: {
    title: (layer) => `Experts by group, layer ${layerName(layer)}`, layers: () => all("shares"),
    draw(width, number) {
      const layer = report.layers[number], groups = report.shown_groups;
      // experts of one group beside each other, the most particular ones first
      const owner = layer.labels.map((_, expert) => {
        const column = layer.shares.map((row) => row[expert]), group = column.indexOf(Math.max(...column));
        return [group, -column[group] / (column.reduce((sum, value) => sum + value, 0) || 1), expert];
      });
      const order = owner.sort((one, other) => one[0] - other[0] || one[1] - other[1] || one[2] - other[2]).map((item) => item[2]);
      const values = layer.shares.map((row) => order.map((expert) => row[expert]));
      return {
        ...heat(width, {
          rows: groups, columns: order.map((expert) => layer.labels[expert]), rowName: "group", columnName: "expert", values,
          text: (value) => (100 * value).toFixed(value < 0.0995 ? 1 : 0),
          tip: (group, expert, value) => `${safe(groups[group])}<br>expert ${safe(layer.labels[order[expert]])}<br>${percent(value, 2)} of the group’s choices`,
        }),
        csv: [["layer", "group", "expert", "share of the group's choices"], ...layer.shares.flatMap((row, group) =>
          row.map((value, expert) => [number, groups[group], layer.labels[expert], value]))],
      };
    },
  },
  claims: {
    title: () => "Specialisation by group against its nulls",
    draw: (width) => {
      const of = (key) => all("claim").map(([layer]) => layer.claim[key]);
      return lines(width, [
        ["measured", of("value")], ["lower end of 95%", of("low")], ["groups permuted", of("permuted")], ["choices drawn", of("random")],
      ], { x: "layer", y: "information on the group", categories: all("claim").map(([, number]) => String(number)), percentage: true });
    },
  },
  ablation: {
    title: (layer) => "Do groups miss the experts that they ask for?" + (layer < 0 ? "" : ` Layer ${layerName(layer)}`),
    label: "Layer",
    choices: () => [[-1, "all"], ...[...new Set(report.causes.map((one) => one.layer))].map((layer) => [layer, layerName(layer)])],
    draw(width, layer) {
      const look = style(), all = report.causes.filter((one) => layer < 0 || one.layer === layer), narrow = width < 640;
      const name = (one) => `${narrow ? "" : "layer "}${one.layer} · ${report.groups[one.group]} · ${one.instead}`;
      const sign = { supported: "✓", "not supported": "⚠", contrary: "✗" };
      const data = all.map((one, place) => [place, one.value, one.low, one.high, one.null.length ? Math.min(...one.null) : null, one.null.length ? Math.max(...one.null) : null]);
      const letters = Math.max(...all.map((one) => [...name(one)].reduce((sum, letter) => sum + (letter > "\u2e80" ? 1.8 : 1), 0)));
      const left = Math.min(narrow ? 150 : 260, 30 + 7.2 * letters);
      return {
        height: all.length * 22 + 70,
        option: {
          animation: false, grid: { left, right: 20, top: 10, bottom: 44 },
          tooltip: tooltip(({ dataIndex }) => {
            const one = all[dataIndex];
            return `${safe(name(one))}: ${one.ruling}<br>${one.experts.length} experts, ${percent(one.share, 0)} of the group’s choices, ${percent(one.elsewhere, 0)} elsewhere` +
              `<br>difference ${say(one.value, 4)} nats, 95% ${say(one.low, 4)} to ${say(one.high, 4)}<br>loss there ${say(one.own, 4)}, elsewhere ${say(one.others, 4)}`;
          }),
          xAxis: { type: "value", name: "more missed by the group than by the others, nats a token", nameLocation: "middle", nameGap: 26, nameTextStyle: { color: look.muted },
            axisLabel: { color: look.muted, hideOverlap: true }, splitLine: { lineStyle: { color: look.grid } } },
          yAxis: { type: "category", inverse: true, data: all.map((one) => `${sign[one.ruling]} ${name(one)}`), axisTick: { show: false }, axisLine: { show: false },
            axisLabel: { color: look.ink, width: left - 12, overflow: "truncate", interval: 0 } },
          series: [{
            type: "custom", data, encode: { x: [1, 2, 3, 4, 5], y: 0 },
            renderItem(_, api) {
              const at = (column) => api.coord([api.value(column), api.value(0)]), [x, y] = at(1);
              const ruling = all[api.value(0)].ruling, paint = ruling === "supported" ? look.series[0] : look.series[6];
              const children = [];
              if (!Number.isNaN(api.value(4))) {
                const from = at(4)[0], to = at(5)[0];
                children.push({ type: "rect", shape: { x: from, y: y - 6, width: Math.max(2, to - from), height: 12 }, style: { fill: look.axis, opacity: 0.35 } });
              }
              children.push({ type: "line", shape: { x1: at(2)[0], y1: y, x2: at(3)[0], y2: y }, style: { stroke: paint, lineWidth: 2 } });
              children.push({ type: "circle", shape: { cx: x, cy: y, r: 4.5 }, style: { fill: ruling === "supported" ? paint : look.surface, stroke: paint, lineWidth: 2 } });
              return { type: "group", children };
            },
          }],
        },
        csv: [["layer", "group", "in their place", "experts", "loss there", "loss elsewhere", "difference", "low", "high", "random least", "random most", "verdict"],
          ...all.map((one, place) => [one.layer, report.groups[one.group], one.instead, one.experts.join(" "), one.own, one.others, ...data[place].slice(1), one.ruling])],
      };
    },
  },
  curve: {
    title: (layer) => `Difference by number of experts switched off, layer ${layerName(layer)}`,
    layers: () => all("claim").filter(([, number]) => report.causes.some((one) => one.layer === number && one.curve.length)),
    draw(width, number) {
      const mine = report.causes.filter((one) => one.layer === number && one.curve.length);
      const counts = [...new Set(mine.flatMap((one) => one.curve.map((step) => step.n)))].sort((a, b) => a - b);
      return lines(width, mine.map((one) => [`${report.groups[one.group]}, ${one.instead}`,
        counts.map((n) => (one.curve.find((step) => step.n === n) || {}).value ?? null)]),
      { x: "experts switched off", y: "difference, nats a token", categories: counts.map(String) });
    },
  },
  vocabulary: {
    title: () => "Specialisation by word, and routes of one id",
    draw(width) {
      const here = all("vocabulary"), series = [];
      for (const [key, name] of [["input", "token read"], ["target", "token to come"], ["predicted", "token predicted"]])
        if (here.some(([layer]) => known(layer.vocabulary[key]))) series.push([name, here.map(([layer]) => layer.vocabulary[key])]);
      if (here.some(([layer]) => layer.stability)) {
        series.push(["common choices, same id", here.map(([layer]) => layer.stability && layer.stability.same)]);
        series.push(["common choices, any two", here.map(([layer]) => layer.stability && layer.stability.any)]);
      }
      return lines(width, series, { x: "layer", y: "share", categories: here.map(([, number]) => String(number)), percentage: true });
    },
  },
  pairs: {
    title: (layer) => `Experts chosen together, layer ${layerName(layer)}`, layers: () => all("co_activation"),
    draw(width, number) {
      const layer = report.layers[number], { experts, share } = layer.co_activation;
      const names = experts.map((expert) => layer.labels[expert]);
      const values = share.map((row, one) => row.map((value, other) => (one === other ? null : value)));
      const drawn = heat(width, {
        rows: names, columns: names, rowName: "tokens of expert", columnName: "expert", values, text: (value) => (100 * value).toFixed(0),
        tip: (one, other, value) => `of the tokens of expert ${safe(names[one])}<br>${percent(value)} chose expert ${safe(names[other])} too`,
      });
      return { ...drawn, csv: [["layer", "expert", "other expert", "share of the expert's tokens"], ...share.flatMap((row, one) =>
        row.map((value, other) => [number, names[one], names[other], value]))] };
    },
  },
  flow: {
    title: (layer) => `From layer ${layerName(layer)} to layer ${layerName(layer + 1)}, by heaviest expert`, layers: () => all("flow"),
    draw(width, number) {
      const look = style(), [here, next] = [report.layers[number], report.layers[number + 1]], { links, total } = here.flow;
      const shown = links.slice(0, width < 640 ? 40 : 80), nodes = new Map();
      for (const [from, to] of shown) {
        nodes.set(`a${from}`, { name: `a${from}`, label: { formatter: here.labels[from], position: "left" } });
        nodes.set(`b${to}`, { name: `b${to}`, label: { formatter: next.labels[to], position: "right" } });
      }
      const side = (sign) => [...nodes.keys()].filter((name) => name[0] === sign).length;
      const label = (name) => (name[0] === "a" ? here : next).labels[Number(name.slice(1))];
      return {
        height: Math.max(300, 19 * Math.max(side("a"), side("b")) + 20),
        note: `${shown.length} of ${links.length} largest flows; they hold ${percent(shown.reduce((sum, link) => sum + link[2], 0) / total)} of ${total.toLocaleString("en")} tokens`,
        option: {
          animation: false,
          tooltip: tooltip((item) => (item.dataType === "edge"
            ? `expert ${safe(label(item.data.source))} → expert ${safe(label(item.data.target))}<br>${item.data.value.toLocaleString("en")} tokens, ${percent(item.data.value / total)}`
            : `expert ${safe(label(item.name))}<br>${Number(item.value).toLocaleString("en")} tokens in these flows`)),
          series: [{
            type: "sankey", left: 60, right: 60, top: 10, bottom: 10, nodeWidth: 10, nodeGap: 6, draggable: false, data: [...nodes.values()],
            links: shown.map(([from, to, value]) => ({ source: `a${from}`, target: `b${to}`, value })),
            itemStyle: { color: look.series[0], borderWidth: 0 }, lineStyle: { color: look.axis, opacity: 0.35, curveness: 0.5 },
            label: { color: look.ink, fontSize: 12 }, emphasis: { focus: "adjacency", lineStyle: { color: look.series[1], opacity: 0.8 } },
          }],
        },
        csv: [["layer", "expert", "expert of the next layer", "tokens"], ...links.map(([from, to, value]) => [number, here.labels[from], next.labels[to], value])],
      };
    },
  },
  frequency: {
    title: () => "Entropy of the router by how often an id occurs",
    draw(width) {
      const bins = new Map();
      all("entropy_by_frequency").forEach(([layer]) => layer.entropy_by_frequency.forEach(([low, high]) => bins.set(low, Math.max(high, bins.get(low) || 0))));
      const lows = [...bins.keys()].sort((a, b) => a - b);
      const series = all("entropy_by_frequency").map(([layer, number]) => [layerName(number),
        lows.map((low) => (layer.entropy_by_frequency.find((bin) => bin[0] === low) || [])[2] ?? null)]);
      return lines(width, series, { x: "occurrences of the id", y: "entropy, nats", categories: lows.map((low) => (bins.get(low) > low ? `${low}–${bins.get(low)}` : String(low))) });
    },
  },
  saturation: {
    title: () => "Choices that the last step would make already",
    draw: (width) => lines(width, all("saturation").map(([layer, number]) => [layerName(number), layer.saturation.step.map((step, place) => [step, layer.saturation.share[place]])]),
      { x: "step", y: "share of common choices", percentage: true }),
  },
};
for (const [key, title, words] of [["load_entropy", "Load entropy during training", "load entropy, 1 is even"],
  ["max_violation", "Max violation during training", "max violation, 0 is even"], ["entropy", "Entropy of the router during training", "entropy, nats"]])
  FIGURES["history-" + key] = {
    title: () => title,
    draw: (width) => lines(width, all("history").filter(([layer]) => layer.history[key]).map(([layer, number]) =>
      [layerName(number), layer.history.step.map((step, place) => [step, layer.history[key][place]])]), { x: "step", y: words }),
  };
