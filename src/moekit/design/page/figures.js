// Figures of a search, beside those of explain: the front, what mattered, and the trials in their order.
const costName = { active: "active parameters", examples: "training examples" }[report.axis];
const figureName = `validation ${report.key}`;
const picked = (design) => Object.entries(design.features).map(([name, value]) => `${safe(name)} ${safe(value)}`).join("<br>");

Object.assign(FIGURES, {
  design_front: {
    title: () => `${figureName} by ${costName}`,
    draw(width) {
      const look = style(), point = (design) => ({ value: [design.cost[report.axis], design.mean], design });
      const of = (designs) => designs.filter((design) => design && known(design.mean)).map(point);
      const front = of(report.front), steps = [];
      front.forEach((one, place) => {
        if (place) steps.push([one.value[0], front[place - 1].value[1]]);
        steps.push(one.value);
      });
      const marks = (name, data, symbol, size, color) => ({ name, type: "scatter", data, symbol, symbolSize: size, itemStyle: { color, borderColor: look.surface, borderWidth: 1 } });
      const axis = (name, gap) => ({
        type: "value", scale: true, name, nameLocation: "middle", nameGap: gap, nameTextStyle: { color: look.muted },
        axisLabel: { color: look.muted, hideOverlap: true, formatter: (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1e3 ? `${value / 1e3}k` : Number(value.toFixed(4))) },
        axisLine: { lineStyle: { color: look.axis } }, splitLine: { lineStyle: { color: look.grid } },
      });
      return {
        height: 420,
        option: {
          animation: false,
          tooltip: tooltip((item) => (item.data.design
            ? `<b>${safe(item.data.design.id)}</b><br>${safe(figureName)} ${say(item.data.design.mean, 4)}` +
              (known(item.data.design.deviation) ? ` ± ${say(item.data.design.deviation, 4)}` : "") +
              `, ${item.data.design.seeds} seed${item.data.design.seeds > 1 ? "s" : ""}<br>` +
              `${item.data.design.cost[report.axis].toLocaleString("en")} ${costName}<br>${picked(item.data.design)}`
            : "")),
          legend: { top: 0, left: 0, textStyle: { color: look.ink }, data: ["designs", "front", "default", "chosen"] },
          grid: { left: 70, right: 24, top: width < 420 ? 62 : 40, bottom: 50 },
          xAxis: axis(costName, 30), yAxis: axis(`${figureName} (${report.higher ? "higher" : "lower"} is better)`, 54),
          series: [
            { name: "step", type: "line", data: steps, symbol: "none", silent: true, lineStyle: { color: look.series[0], width: 1.5 } },
            marks("designs", of(report.designs), "circle", 8, look.axis),
            marks("front", front, "circle", 12, look.series[0]),
            marks("default", of([report.default]), "rect", 14, look.series[1]),
            marks("chosen", of([report.chosen]), "diamond", 18, look.series[2]),
          ],
        },
        csv: [["design", costName, figureName, "deviation", "seeds", "on the front"], ...report.designs.map((design) =>
          [design.id, design.cost[report.axis], design.mean, design.deviation, design.seeds, report.front.some((one) => one.id === design.id)])],
      };
    },
  },
  design_importance: {
    title: () => "Importance of the choices",
    draw(width) {
      const look = style(), items = Object.entries(report.importances).sort((one, other) => one[1] - other[1]);
      return {
        height: 30 * items.length + 60,
        option: {
          animation: false, tooltip: tooltip((item) => `${safe(item.name)}: ${percent(item.value)}`),
          grid: { left: Math.min(150, width * 0.36), right: 56, top: 8, bottom: 30 },
          xAxis: { type: "value", axisLabel: { color: look.muted, formatter: (value) => percent(value, 0) }, splitLine: { lineStyle: { color: look.grid } } },
          yAxis: { type: "category", data: items.map(([name]) => name), axisLabel: { color: look.ink }, axisTick: { show: false }, axisLine: { lineStyle: { color: look.axis } } },
          series: [{
            type: "bar", data: items.map(([, share]) => share), barMaxWidth: 18, itemStyle: { color: look.series[0] },
            label: { show: true, position: "right", color: look.ink, formatter: (item) => percent(item.value, 0) },
          }],
        },
        csv: [["choice", "importance"], ...items.reverse()],
      };
    },
  },
  design_history: {
    title: () => `${figureName} by trial`,
    draw(width) {
      const look = style(), done = report.trials.filter((trial) => known(trial.figure)), best = [];
      done.forEach((trial) => {
        const last = best.length ? best[best.length - 1][1] : trial.figure;
        best.push([trial.number, report.higher ? Math.max(last, trial.figure) : Math.min(last, trial.figure)]);
      });
      const gone = report.trials.filter((trial) => trial.ended === "pruned" && trial.rungs.length);
      return {
        height: 340,
        option: {
          animation: false, tooltip: tooltip((item) => (item.data.trial
            ? `trial ${item.data.trial.number}, ${safe(item.data.trial.ended)}<br>${safe(figureName)} ${say(item.value[1], 4)}<br>${picked(item.data.trial)}` : "")),
          legend: { top: 0, left: 0, textStyle: { color: look.ink } },
          grid: { left: 70, right: 24, top: width < 460 ? 62 : 40, bottom: 46 },
          xAxis: { type: "value", name: "trial", nameLocation: "middle", nameGap: 28, minInterval: 1, nameTextStyle: { color: look.muted }, axisLabel: { color: look.muted }, splitLine: { show: false } },
          yAxis: { type: "value", scale: true, axisLabel: { color: look.muted, formatter: (value) => Number(value.toFixed(4)) }, splitLine: { lineStyle: { color: look.grid } } },
          series: [
            { name: "best so far", type: "line", step: "end", data: best, symbol: "none", lineStyle: { color: look.series[0], width: 2 }, itemStyle: { color: look.series[0] } },
            { name: "finished", type: "scatter", symbolSize: 9, data: done.map((trial) => ({ value: [trial.number, trial.figure], trial })), itemStyle: { color: look.series[1] } },
            { name: "given up, at its last rung", type: "scatter", symbol: "triangle", symbolSize: 8, data: gone.map((trial) => ({ value: [trial.number, trial.rungs[trial.rungs.length - 1]], trial })), itemStyle: { color: look.axis } },
          ],
        },
        csv: [["trial", "design", "ended", figureName, "seconds"], ...report.trials.map((trial) => [trial.number, trial.id, trial.ended, trial.figure, trial.seconds])],
      };
    },
  },
});
