"use strict";
// Metrics as small curves, one run or two; a click leads to the rollouts of the nearest recorded step.

const RUN_COLOURS = { a: "var(--run-a)", b: "var(--run-b)" };
const FIRST_CURVES = ["reward/mean", "reward/result/mean", "rollout/code_share", "sandbox/success_rate", "completion_length/mean", "actor/entropy", "mismatch/kl", "loss", "optim/grad_norm", "reward/frac_zero_std"];

// {stage: {metric: [{run, steps, values}]}}, the metrics that are looked at most in front, those that never move at the end.
function curvesOf(metrics) {
  const stages = new Map();
  for (const [run, { stages: found }] of Object.entries(metrics)) {
    for (const [stage, columns] of Object.entries(found)) {
      if (!stages.has(stage)) stages.set(stage, new Map());
      for (const [name, values] of Object.entries(columns)) {
        if (name === "step" || name.startsWith("time/wall") || name.startsWith("time/cpu")) continue;
        const curves = stages.get(stage);
        if (!curves.has(name)) curves.set(name, []);
        curves.get(name).push({ run, steps: columns.step, values });
      }
    }
  }
  const isFlat = (series) => series.every((s) => s.values.every((v) => v === null || v === s.values[0]));
  const rank = ([name, series]) => (FIRST_CURVES.includes(name) ? FIRST_CURVES.indexOf(name) : FIRST_CURVES.length + isFlat(series));
  for (const [stage, curves] of stages) {
    stages.set(stage, new Map([...curves].sort((a, b) => rank(a) - rank(b) || a[0].localeCompare(b[0]))));
  }
  return stages;
}

// At most two points a pixel column, the least and the largest: spikes stay visible.
function thinned(steps, values, columns) {
  const points = [];
  for (let i = 0; i < steps.length; i += 1) if (values[i] !== null) points.push([steps[i], values[i]]);
  if (points.length <= 2 * columns) return points;
  const out = [];
  const width = points.length / columns;
  for (let c = 0; c < columns; c += 1) {
    const part = points.slice(Math.floor(c * width), Math.floor((c + 1) * width));
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    out.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return out;
}

function curve(name, series, { alarms = [], onStep = null, width = 300, height = 120 } = {}) {
  const lines = series.map((s) => ({ run: s.run, points: thinned(s.steps, s.values, width) })).filter((s) => s.points.length);
  const all = lines.flatMap((s) => s.points);
  const figure = el("figure", { class: "curve", data: { metric: name } });
  if (!all.length) return figure;
  const range = (place) => all.reduce(([low, high], p) => [Math.min(low, p[place]), Math.max(high, p[place])], [Infinity, -Infinity]);
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const x = (step) => 4 + ((step - x0) / (x1 - x0 || 1)) * (width - 8);
  const y = (value) => height - 6 - ((value - y0) / (y1 - y0 || 1)) * (height - 16);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const alarm of alarms) drawing.append(svg("line", { x1: x(alarm.step), x2: x(alarm.step), y1: 0, y2: height, class: "alarm" }));
  for (const { run, points } of lines) {
    const path = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    drawing.append(points.length === 1
      ? svg("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 2.5, fill: RUN_COLOURS[run] })
      : svg("polyline", { points: path, fill: "none", stroke: RUN_COLOURS[run], "stroke-width": 1.5 }));
  }
  const said = el("span", { class: "faint" });
  const last = () => { said.textContent = lines.map((s) => number(s.points.at(-1)[1])).join(" | "); };
  last();
  const nearest = (event) => {
    const box = drawing.getBoundingClientRect();
    return x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
  };
  drawing.addEventListener("mousemove", (event) => {
    const step = nearest(event);
    said.textContent = lines.map((s) => {
      const p = s.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      return `step ${p[0]}: ${number(p[1], 4)}`;
    }).join(" | ");
  });
  drawing.addEventListener("mouseleave", last);
  if (onStep) drawing.addEventListener("click", (event) => onStep(nearest(event)));
  figure.append(el("figcaption", {}, el("b", {}, name), " ", said), drawing,
    el("div", { class: "axis faint" }, el("span", {}, number(x0)), el("span", {}, `${number(y0)} to ${number(y1)}`), el("span", {}, number(x1))));
  return figure;
}

function curvesView(runs, metrics, alarms, filter, { onStep, onFilter }) {
  const stages = curvesOf(metrics);
  const words = el("input", { type: "search", id: "metric-filter", placeholder: "metrics whose name holds …", value: filter, oninput: () => { onFilter(words.value); draw(); } });
  const body = el("div", {});
  const draw = () => fill(body, [...stages].map(([stage, curves]) => el("section", {}, el("h3", {}, stage || "metrics"),
    el("div", { class: "curves" }, [...curves].filter(([name]) => name.includes(words.value.trim())).map(([name, series]) => curve(name, series, {
      alarms: alarms.filter((alarm) => alarm.metric === name), onStep,
    }))))));
  draw();
  const names = Object.entries(runs).map(([key, run]) => el("span", { class: "run-name", style: { color: RUN_COLOURS[key] } }, run.name, " "));
  const problems = Object.values(metrics).flatMap((m) => m.problems);
  return el("div", { class: "page" }, el("p", {}, names, words), problems.map((p) => el("p", { class: "note" }, p)),
    !stages.size && el("p", {}, "no metrics yet: the run has no metrics.jsonl, or no line of it can be read"), body,
    alarms.length > 0 && el("section", {}, el("h3", {}, "alarms"), el("ul", {}, alarms.map((alarm) => el("li", {},
      onStep ? el("a", { href: "#", onclick: (event) => { event.preventDefault(); onStep(alarm.step); } }, `step ${alarm.step}`) : `step ${alarm.step}`,
      ` ${alarm.alarm}: ${alarm.text}`)))));
}
