"use strict";

const element = (id) => document.getElementById(id);
const parsed = new Map(); // each step's samples are parsed when they are first shown
function data(name) {
  if (!parsed.has(name)) parsed.set(name, JSON.parse(element(`data-${name}`).textContent));
  return parsed.get(name);
}
const { runs, means, config } = data("report");

// Text of models and files becomes text nodes here, and is never parsed as HTML.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(parent, tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

// Control characters, those that hide or reorder text, and halves of characters. Joiners stay: emoji and some scripts need them.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/u;

function escapeOf(character) {
  const code = character.codePointAt(0);
  return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`;
}

function addText(parent, text) {
  let plain = "";
  for (const character of String(text)) {
    if (!INVISIBLE.test(character) || character === "\t") {
      plain += character;
      continue;
    }
    parent.append(plain, make("span", { class: "escape" }, character === "\n" ? "↵" : escapeOf(character)));
    plain = character === "\n" ? "\n" : "";
  }
  parent.append(plain);
  return parent;
}

const textOf = (text) => addText(make("span"), text).textContent;

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size > 0 && size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

function options(select, labels) {
  select.replaceChildren(...labels.map((label, index) => make("option", { value: index }, textOf(label))));
}

// The first screen

function showTop() {
  const names = runs.map((run) => textOf(run.name));
  document.title = `${names.join(", ")} – grpo_jax report`;
  document.querySelector("h1").textContent = names.join(", ");
  element("about").append(...runs.map((run) => addText(make("p"), (runs.length > 1 ? `${run.name}: ` : "") + run.about)));
  const change = (number) => [
    make("span", { class: "before" }, format(number.before)), make("span", { class: "arrow" }, " → "), format(number.after),
  ];
  if (runs.length === 1) {
    const figures = runs[0].numbers.map((number) =>
      make("div", { title: number.note }, addText(make("dt"), number.label), make("dd", {}, ...change(number))));
    element("numbers").append(make("dl", { class: "figures" }, ...figures), addText(make("p", { class: "note" }),
      [...new Set(runs[0].numbers.map((number) => `${number.note[0].toUpperCase()}${number.note.slice(1)}.`))].join(" ")));
    return;
  }
  const labels = [...new Set(runs.flatMap((run) => run.numbers.map((number) => number.label)))];
  const head = make("tr", {}, make("th", { scope: "col" }, "Run"),
    ...labels.map((label) => addText(make("th", { scope: "col" }), label)));
  const rows = runs.map((run, index) => make("tr", {}, make("th", { scope: "row" }, swatch(index), " ", textOf(run.name)),
    ...labels.map((label) => {
      const number = run.numbers.find((candidate) => candidate.label === label);
      return make("td", { title: number ? number.note : "" }, ...(number ? change(number) : ["–"]));
    })));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  element("numbers").append(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Key numbers" }, table));
}

// Curves

const HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;
const NOT_PARTS = ["mean", "timeout", "error", "kl", "length_mean"];
const CHARTS = [
  ["policy/entropy", "Entropy", "nats per token"],
  ["policy/kl_ref", "KL to the reference", "nats per token"],
  ["policy/logp_gap/max", "Drift of the sampler", "largest log-prob gap to the trainer, nats"],
  ["policy/kl_sampler", "Drift as KL", "nats per token"],
  ["policy/clip_frac", "Clipped tokens", "fraction"],
  ["policy/ratio_max", "Largest ratio", "pi / pi_old"],
  ["optim/grad_norm", "Gradient norm", "before clipping"],
  ["rollout/truncated_frac", "Cut off at the length limit", "fraction of answers"],
  ["groups/zero_variance_frac", "Groups with equal rewards", "fraction of groups"],
  ["rollout/tokens_per_s", "Sampling speed", "tokens per second"],
  ["time/step_s", "Time of an update", "seconds"],
];
const LOGARITHMIC = ["policy/entropy", "policy/kl_ref", "policy/logp_gap/max", "policy/kl_sampler", "policy/ratio_max", "optim/grad_norm"];
const charts = [];
const hidden = new Set();
let cursor = null;

const runClass = (index) => `run-${index % 8}`;
const dashClass = (index) => `dash-${index % 5}`;

function swatch(index) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", `swatch ${runClass(index)}`);
  svg.setAttribute("viewBox", "0 0 28 10");
  svg.setAttribute("aria-hidden", "true");
  draw(svg, "line", { class: `curve ${dashClass(index)}`, x1: 0, x2: 28, y1: 5, y2: 5 });
  return svg;
}

/** The curves to draw: of each run that is shown, or of the mean of runs that differ in their seed. */
function sources() {
  const grouped = element("seeds").checked ? means : [];
  const averaged = new Set(grouped.flatMap((mean) => mean.runs));
  const single = runs.map((run, index) => ({ name: textOf(run.name), index, curves: run.curves }));
  const mean = grouped.map(({ runs: members, curves }) => ({
    name: `mean of ${members.length} seeds`, index: members[0], curves, isMean: true,
  }));
  return [...mean, ...single.filter(({ index }) => !averaged.has(index))].filter(({ index }) => !hidden.has(index));
}

function smooth(values, weight) {
  let total = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    total = weight * total + (1 - weight) * value;
    norm = weight * norm + 1 - weight;
    return total / norm;
  });
}

function ticks(low, high, count) {
  const power = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = [1, 2, 5, 10].find((factor) => factor * power * count >= high - low) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

function addChart(parent, title, unit, line, dots) {
  if (!runs.some((run) => run.curves[line] || run.curves[dots])) return;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "chart");
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "img");
  const readout = make("p", { class: "readout" });
  const caption = addText(make("figcaption"), title);
  caption.append(" ", addText(make("small"), unit));
  parent.append(make("figure", { "data-metric": line }, caption, svg, readout));
  const chart = { svg, readout, title, line, dots };
  charts.push(chart);
  svg.addEventListener("pointermove", (event) => {
    const { left, width } = svg.getBoundingClientRect();
    moveCursor(chart.stepAt((event.clientX - left) * (chart.width / width)));
  });
  svg.addEventListener("pointerleave", () => moveCursor(null));
  svg.addEventListener("keydown", (event) => {
    const steps = [...new Set(chart.series.flatMap(({ steps: own }) => own))].sort((a, b) => a - b);
    const now = cursor === null ? steps.length - 1 : Math.max(0, steps.findIndex((step) => step >= cursor));
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (next === undefined || !steps.length) return;
    event.preventDefault();
    moveCursor(steps[Math.min(steps.length - 1, Math.max(0, next))]);
    element("cursor-values").textContent = chart.readout.textContent;
  });
}

/** Draws a chart at the width that it has on the page, so that its text keeps its size. */
function drawChart(chart, width) {
  const { svg } = chart;
  chart.width = width;
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", HEIGHT);
  svg.replaceChildren();
  const weight = Number(element("smoothing").value);
  chart.series = sources().flatMap(({ name, index, curves, isMean }) => [
    ...(curves[chart.line] ? [{ name, index, isMean, ...curves[chart.line], smooth: smooth(curves[chart.line].values, weight) }] : []),
    ...(curves[chart.dots] ? [{ name: `${name}, evaluated`, index, isMean, isDots: true, ...curves[chart.dots] }] : []),
  ]);
  const numbers = chart.series.flatMap(({ values, low, high }) => [...values, ...(low || []), ...(high || [])]).filter((value) => value !== null);
  const last = Math.max(1, ...chart.series.map(({ steps }) => steps[steps.length - 1]));
  const least = numbers.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), Infinity); // where a logarithmic axis begins
  const isLog = element("log").checked && LOGARITHMIC.includes(chart.line) && numbers.some((value) => value >= 100 * least);
  const scale = (value) => (isLog ? Math.log10(Math.max(value, least)) : value);
  let low = numbers.reduce((a, b) => Math.min(a, scale(b)), Infinity), high = numbers.reduce((a, b) => Math.max(a, scale(b)), -Infinity);
  if (low > high) [low, high] = [0, 1];
  if (!isLog && low >= 0 && low < 0.7 * high) low = 0;
  if (low === high) [low, high] = low ? [low - Math.abs(low) / 2, low + Math.abs(low) / 2] : [0, 1];
  const x = (step) => LEFT + (width - LEFT - RIGHT) * step / last;
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - low) / (high - low);
  chart.stepAt = (pixels) => Math.min(last, Math.max(0, last * (pixels - LEFT) / (width - LEFT - RIGHT)));
  chart.x = x;
  for (const value of isLog ? ticks(low, high, 4).filter(Number.isInteger).map((power) => 10 ** power) : ticks(low, high, 4)) {
    draw(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value));
  }
  draw(svg, "line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM });
  for (const step of ticks(0, last, Math.max(2, width / 60)).filter(Number.isInteger)) {
    draw(svg, "text", { x: x(step), y: HEIGHT - 8, "text-anchor": "middle" }, step.toLocaleString("en-US"));
  }
  const path = (steps, values) => {
    let out = "", isPen = false;
    steps.forEach((step, n) => {
      if (values[n] !== null) out += `${isPen ? "L" : "M"}${x(step).toFixed(1)} ${y(values[n]).toFixed(1)}`;
      isPen = values[n] !== null;
    });
    return out;
  };
  for (const { index, steps, values, smooth: line, low: lows, high: highs, isDots, isMean } of chart.series) {
    const group = draw(svg, "g", { class: runClass(index) });
    const known = steps.map((_, n) => n).filter((n) => values[n] !== null);
    const point = (n, list) => `${x(steps[n]).toFixed(1)} ${y(list[n]).toFixed(1)}`;
    if (lows && isDots) {
      for (const n of known) draw(group, "line", { class: "span", x1: x(steps[n]), x2: x(steps[n]), y1: y(lows[n]), y2: y(highs[n]) });
    } else if (lows && known.length) {
      const outline = [...known.map((n) => point(n, highs)), ...known.reverse().map((n) => point(n, lows))];
      draw(group, "path", { class: "band", d: `M${outline.join("L")}Z` });
    } else if (!isDots && weight > 0 && !isMean) {
      draw(group, "path", { class: "raw", d: path(steps, values) });
    }
    if (!isDots) draw(group, "path", { class: `curve ${dashClass(index)}`, d: path(steps, line) });
    else for (const n of known) draw(group, "circle", { class: "dot", cx: x(steps[n]), cy: y(values[n]), r: 3.2 });
  }
  runs.forEach((run, index) => {
    if (!hidden.has(index)) for (const { step } of run.warnings) {
      draw(svg, "line", { class: "warning", x1: x(step), x2: x(step), y1: HEIGHT - BOTTOM - 4, y2: HEIGHT - BOTTOM + 5 });
    }
  });
  chart.mark = draw(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  readAt(chart);
}

/** Writes the values at the cursor, or the last ones, under a chart. */
function readAt(chart) {
  if (!chart.series) return;
  chart.mark.setAttribute("visibility", cursor === null ? "hidden" : "visible");
  if (cursor !== null) for (const end of ["x1", "x2"]) chart.mark.setAttribute(end, chart.x(cursor));
  const parts = chart.series.map(({ name, index, steps, values }) => {
    let nearest = steps.length - 1;
    if (cursor !== null) steps.forEach((step, n) => { if (Math.abs(step - cursor) < Math.abs(steps[nearest] - cursor)) nearest = n; });
    return [steps[nearest], make("b", { class: runClass(index) }, `${name} ${format(values[nearest])}`)];
  });
  const shown = cursor === null ? Math.max(...parts.map(([step]) => step)) : Math.round(cursor);
  const values = parts.flatMap(([step, value], n) => [n ? ", " : "", value, step === shown ? "" : ` (at ${step.toLocaleString("en-US")})`]);
  chart.readout.replaceChildren(`step ${parts.length ? shown.toLocaleString("en-US") : "–"}: `, ...values);
  chart.svg.setAttribute("aria-label", `${chart.title}. ${chart.readout.textContent}. Arrow keys move between steps.`);
}

function moveCursor(step) {
  cursor = step;
  charts.forEach(readAt);
}

function drawCharts() {
  element("smoothing").nextElementSibling.textContent = element("smoothing").value;
  const widths = charts.map(({ svg }) => svg.clientWidth); // read first: each read after a change lays out the page again
  charts.forEach((chart, n) => drawChart(chart, widths[n]));
}

function showCurves() {
  element("runs").append(...runs.map((run, index) => {
    const box = make("input", { type: "checkbox", checked: "", "data-run": index });
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(index); else hidden.add(index);
      drawCharts();
    });
    return make("label", {}, box, swatch(index), textOf(run.name));
  }));
  element("average").hidden = !means.length;
  const isReduced = runs.some((run) => Object.values(run.curves).some(({ low }) => low));
  element("curves-note").textContent = "Lines are rollouts of training, smoothed over updates; pale lines are the values themselves. Circles are evaluations on held-out questions."
    + (isReduced ? " A line stands for several updates at each point; the band shows their smallest and largest value." : "")
    + (runs.some((run) => run.warnings.length) ? " Marks on an axis are warnings." : "");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  addChart(element("main-charts"), "Reward", "mean over answers", "reward/mean");
  addChart(element("main-charts"), "Length of answers", "tokens", "rollout/length_mean", "eval/length_mean");
  for (const part of new Set(names.filter((name) => /^(reward|eval)\/[^/]+$/.test(name)).map((name) => name.split("/").slice(1).join("/")))) {
    if (!NOT_PARTS.includes(part)) addChart(element("charts"), part, "reward part, mean", `reward/${part}`, `eval/${part}`);
  }
  for (const [metric, title, unit] of CHARTS) addChart(element("charts"), title, unit, metric);
  if (!names.length) element("curves-note").textContent = "No updates yet.";
  const shown = new Set(charts.flatMap(({ line, dots }) => [line, dots]));
  for (const name of names) if (!shown.has(name)) addChart(element("other-charts"), name, "", name);
  element("other").hidden = !element("other-charts").children.length;
  element("smoothing").addEventListener("input", drawCharts);
  element("log").addEventListener("change", drawCharts);
  element("seeds").addEventListener("change", drawCharts);
  element("other").addEventListener("toggle", drawCharts);
  let drawnWidth = null;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== drawnWidth) drawCharts();
    drawnWidth = contentRect.width;
  }).observe(element("curves"));
}

// Samples

// Limits between the shades of a token: of its probability, of the distance of its ratio from 1, and of its KL in nats.
const SHADES = {
  logp: { limits: [0.95, 0.7, 0.4, 0.15, 0.03], label: "probability" },
  ratio: { limits: [0.001, 0.01, 0.05, 0.2, 1], label: "ratio − 1" },
  kl: { limits: [0.001, 0.01, 0.1, 0.5, 2], label: "KL in nats" },
};
const FIRST_TOKENS = 1500; // of an answer; a button shows the rest
const samples = { run: 0, index: 0, group: 0, colorBy: "logp" };

function shade(answer, n, colorBy) {
  const value = { logp: answer.logps, ratio: answer.log_ratios, kl: answer.kl }[colorBy]?.[n];
  if (value === undefined || value === null) return 0;
  const { limits } = SHADES[colorBy];
  if (colorBy === "logp") return limits.filter((limit) => Math.exp(value) < limit).length;
  if (colorBy === "kl") return limits.filter((limit) => value >= limit).length;
  const distance = Math.expm1(value);
  return Math.sign(distance) * limits.filter((limit) => Math.abs(distance) >= limit).length;
}

function showLegend() {
  const { colorBy } = samples;
  const legend = element("legend");
  legend.replaceChildren();
  if (colorBy === "none") return;
  const { limits, label } = SHADES[colorBy];
  const item = (level, text) => make("span", { role: "listitem", "data-shade": level }, text);
  const plain = make("span", { role: "listitem" }, `${label}:`);
  const ranges = limits.map((limit, n) => {
    if (colorBy === "logp") return n + 1 < limits.length ? `${limits[n + 1]}–${limit}` : `below ${limit}`;
    return n + 1 < limits.length ? `${limit}–${limits[n + 1]}` : `${limit} or more`;
  });
  legend.append(plain, make("span", { role: "listitem" }, colorBy === "logp" ? `${limits[0]} or more` : `below ${limits[0]}`));
  legend.append(...ranges.map((range, n) => item(n + 1, range)));
  if (colorBy === "ratio") legend.append(...ranges.map((range, n) => item(-n - 1, `−(${range})`)));
}

function tokenValues(answer, n) {
  const [logp, ratio, kl] = [answer.logps, answer.log_ratios, answer.kl].map((values) => values?.[n] ?? null);
  const parts = [make("b", {}, `token ${n + 1}`), " ", addText(make("code"), `“${answer.pieces[n]}”`), ` id ${answer.tokens?.[n] ?? "–"}`];
  parts.push(` · log-prob ${format(logp)} (p ${format(logp === null ? null : Math.exp(logp))})`);
  const isNear = ratio && Math.abs(ratio) < 0.001; // then its digits are all 9 or 0
  parts.push(` · ratio ${isNear ? `1 ${ratio < 0 ? "−" : "+"} ${format(Math.abs(Math.expm1(ratio)))}` : format(ratio === null ? null : Math.exp(ratio))}`);
  return [...parts, ` · KL ${format(kl)}`];
}

/** Shows the tokens of an answer; arrow keys move between them, and the bar at the bottom shows their values. */
function tokensOf(answer, name) {
  const box = make("div", { class: "tokens", role: "group", "aria-label": `Tokens of ${name}. Arrow keys move between them.` });
  const add = (first, last) => {
    for (let n = first; n < Math.min(last, answer.pieces.length); n++) {
      box.append(addText(make("span", { class: "token", "data-token": n, tabindex: n ? -1 : 0 }), answer.pieces[n]));
    }
    if (last < answer.pieces.length) {
      const more = make("button", { type: "button" }, `Show the other ${(answer.pieces.length - last).toLocaleString("en-US")} tokens`);
      more.addEventListener("click", () => { more.remove(); add(last, Infinity); colorTokens(); });
      box.append(more);
    }
  };
  add(0, FIRST_TOKENS);
  const show = (event) => {
    const token = event.target.closest("[data-token]");
    if (token) element("token-values").replaceChildren(...tokenValues(answer, Number(token.dataset.token)));
  };
  box.addEventListener("pointerover", show);
  box.addEventListener("focusin", show);
  box.addEventListener("click", (event) => event.target.closest("[data-token]")?.focus());
  box.addEventListener("keydown", (event) => {
    const token = event.target.closest("[data-token]");
    const tokens = box.querySelectorAll("[data-token]");
    const now = token ? Number(token.dataset.token) : 0;
    const next = tokens[{ ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: tokens.length - 1 }[event.key]];
    if (!next) return;
    event.preventDefault();
    token.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
  box.answer = answer;
  return box;
}

function colorTokens() {
  showLegend();
  for (const box of document.querySelectorAll("#answers .tokens")) {
    for (const token of box.querySelectorAll("[data-token]")) {
      const level = shade(box.answer, Number(token.dataset.token), samples.colorBy);
      if (level) token.setAttribute("data-shade", level); else token.removeAttribute("data-shade");
    }
  }
}

function verdict(isRight) {
  return make("span", { class: `verdict ${isRight ? "right" : "wrong"}` }, isRight ? "✓ right" : "✗ wrong");
}

function facts(pairs) {
  const line = make("p", { class: "facts" });
  pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").forEach(([label, value], n) => {
    line.append(n ? " · " : "", textOf(label), " ", make("b", {}, textOf(value)));
  });
  return line;
}

function answerCard(answer, group, run, step) {
  const name = `answer ${answer.sample_id}`;
  const rewards = Object.entries(answer.rewards || {}).map(([part, value]) => [part, format(value)]);
  const advantage = answer.advantage === null ? null : `${answer.advantage > 0 ? "+" : ""}${format(answer.advantage)}`;
  const text = answer.pieces ? tokensOf(answer, name) : addText(make("div", { class: "completion text" }), answer.completion ?? "");
  const isLeftOut = answer.update_steps && !answer.update_steps.length;
  return make("article", { class: "answer", "data-sample": `${step}/${group.prompt_id}/${answer.sample_id}` },
    make("header", {}, make("h3", {}, `Answer ${answer.sample_id}`), verdict(answer.right)),
    facts([["reward", format(answer.reward)], ...rewards, ["advantage", advantage]]),
    text,
    facts([["read as", answer.parsed], ["why", answer.why], ["tokens", `${answer.length}${answer.truncated ? ", cut off" : ""}`],
      ["", isLeftOut ? "no update learns from it" : ""]]),
    addText(make("code", { class: "command" }), `${run.redraw}${step}/${group.prompt_id}/${answer.sample_id}`));
}

function showGroup() {
  const run = runs[samples.run], step = run.steps[samples.index];
  element("token-values").textContent = "Point at a token, or move to one with Tab and the arrow keys, to see its values.";
  if (step === undefined) return;
  const groups = data(`samples-${samples.run}-${step}`);
  const group = groups[samples.group];
  const rewards = group.answers.map(({ reward }) => reward);
  const prompt = make("details", {}, make("summary", {}, "The prompt as the model sees it"), addText(make("div", { class: "text" }), group.prompt ?? ""));
  element("question").replaceChildren(addText(make("div", { class: "text" }), group.question),
    facts([["expected", group.expected], ["right", `${group.answers.filter(({ right }) => right).length} of ${group.answers.length}`],
      ["mean reward", format(rewards.reduce((a, b) => a + b, 0) / rewards.length)], ["prompt", group.prompt_id],
      ["", group.is_cut ? "the page has no room for this step's other answers, which are in samples/" : ""]]), prompt);
  element("answers").replaceChildren(...group.answers.map((answer) => answerCard(answer, group, run, step)));
  colorTokens();
}

function showStep(index) {
  const run = runs[samples.run], step = run.steps[index];
  samples.index = index;
  samples.group = 0;
  element("step").value = index;
  element("previous-step").disabled = index <= 0;
  element("next-step").disabled = index >= run.steps.length - 1;
  element("question").replaceChildren();
  element("answers").replaceChildren();
  const name = step === undefined ? "no samples" : `Step ${step.toLocaleString("en-US")} (${index + 1} of ${run.steps.length})`;
  element("step-name").textContent = name;
  element("step").setAttribute("aria-valuetext", name);
  if (step !== undefined) {
    const groups = data(`samples-${samples.run}-${step}`);
    options(element("group"), groups.map(({ question }, n) => `${n + 1} of ${groups.length}: ${question.slice(0, 80)}`));
    element("pick-group").hidden = groups.length < 2;
  } else {
    element("pick-group").hidden = true;
  }
  showGroup();
}

function showSamplesOf(index) {
  const run = runs[index];
  samples.run = index;
  element("step").max = Math.max(0, run.steps.length - 1);
  element("steps-note").textContent = run.steps.length
    ? `Right means that the reward part ${textOf(run.lengths.part)} is above 0.`
      + (run.steps.length < run.recorded ? ` The page holds ${run.steps.length} of ${run.recorded} recorded steps, at equal distances; samples/ has all of them.` : "")
    : "The run has recorded no answers in samples/ yet.";
  showStep(0);
}

function showSamples() {
  options(element("samples-run"), runs.map((run) => run.name));
  element("samples-run").parentElement.hidden = runs.length < 2;
  element("samples-run").addEventListener("change", (event) => showSamplesOf(Number(event.target.value)));
  element("step").addEventListener("input", (event) => showStep(Number(event.target.value)));
  element("previous-step").addEventListener("click", () => showStep(samples.index - 1));
  element("next-step").addEventListener("click", () => showStep(samples.index + 1));
  element("group").addEventListener("change", (event) => { samples.group = Number(event.target.value); showGroup(); });
  element("color-by").addEventListener("change", (event) => { samples.colorBy = event.target.dataset.colorBy; colorTokens(); });
  showSamplesOf(0);
}

// Before and after

const KINDS = { "wrong right": "wrong, then right", "right wrong": "right, then wrong", "right right": "right both times", "wrong wrong": "wrong both times" };
const PAIRS = 8; // shown at once
let shownPairs = PAIRS;

function showPairs() {
  const index = Number(element("comparison-run").value), { comparison } = runs[index];
  const kind = element("comparison-kind").value;
  const all = comparison ? data(`comparison-${index}`).filter((pair) => pair.kind === kind) : [];
  element("comparison-note").textContent = comparison
    ? `${comparison.counts[kind]} questions were ${KINDS[kind]} at the evaluations of steps ${comparison.steps.join(" and ")}${all.length < comparison.counts[kind] ? `; the page holds ${all.length} of them` : ""}. Right means that the reward part ${textOf(comparison.part)} is above 0.`
    : "There are no two evaluations with recorded answers yet.";
  element("pairs").replaceChildren(...all.slice(0, shownPairs).map((pair) => {
    const sides = pair.answers.map((answer, n) => make("div", {},
      make("header", {}, make("h3", {}, n ? "After" : "Before"), verdict(pair.kind.split(" ")[n] === "right")),
      addText(make("div", { class: "completion text" }), answer.completion),
      facts([["read as", answer.parsed], ["why", answer.why], ["tokens", `${answer.length}${answer.truncated ? ", cut off" : ""}`]])));
    return make("article", { class: "pair" }, addText(make("div", { class: "text" }), pair.question), facts([["expected", pair.expected]]),
      make("div", { class: "sides" }, ...sides));
  }));
  element("more-pairs").hidden = all.length <= shownPairs;
}

function showComparison() {
  options(element("comparison-run"), runs.map((run) => run.name));
  element("comparison-run").parentElement.hidden = runs.length < 2;
  const counts = (kind) => runs[Number(element("comparison-run").value)].comparison?.counts[kind] ?? 0;
  const showRun = () => {
    element("comparison-kind").replaceChildren(...Object.entries(KINDS).map(([kind, label]) => make("option", { value: kind }, `${label} (${counts(kind)})`)));
    shownPairs = PAIRS;
    showPairs();
  };
  element("comparison-run").addEventListener("change", showRun);
  element("comparison-kind").addEventListener("change", () => { shownPairs = PAIRS; showPairs(); });
  element("more-pairs").addEventListener("click", () => { shownPairs += PAIRS; showPairs(); });
  showRun();
}

// Length against correctness, time, warnings and config

function lengthChart(run, half, width, most) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const bins = half.right.length, wide = 420, height = 190, bar = (wide - LEFT - RIGHT) / bins;
  const y = (count) => height - BOTTOM - (height - TOP - BOTTOM) * count / most;
  const total = (list) => list.reduce((a, b) => a + b, 0);
  const label = `steps ${half.first} to ${half.last}: ${total(half.right)} right and ${total(half.wrong)} wrong answers by length`;
  for (const [name, value] of Object.entries({ class: "chart", viewBox: `0 0 ${wide} ${height}`, role: "img", "aria-label": label })) svg.setAttribute(name, value);
  for (const value of ticks(0, most, 3).filter(Number.isInteger)) {
    draw(svg, "line", { class: "grid", x1: LEFT, x2: wide - RIGHT, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value));
  }
  half.right.forEach((right, n) => {
    const wrong = half.wrong[n], x = LEFT + n * bar + 1;
    const title = `${n * width} to ${(n + 1) * width - 1} tokens: ${right} right, ${wrong} wrong`;
    const group = draw(svg, "g", {});
    draw(group, "title", {}, title);
    draw(group, "rect", { class: "right-bar", x, width: Math.max(1, bar - 2), y: y(right), height: y(0) - y(right) });
    draw(group, "rect", { class: "wrong-bar", x, width: Math.max(1, bar - 2), y: y(right + wrong), height: y(right) - y(right + wrong) });
    if (n % Math.ceil(bins / 8) === 0) draw(svg, "text", { x: LEFT + n * bar, y: height - 8, "text-anchor": "middle" }, n * width);
  });
  const caption = make("figcaption", {}, `${textOf(run.name)}, steps ${half.first}–${half.last} `, make("small", {}, `${total(half.right)} right, ${total(half.wrong)} wrong; tokens`));
  return make("figure", {}, caption, svg);
}

function showLengths() {
  const known = runs.filter(({ lengths }) => lengths);
  if (!known.length) return void element("length-charts").append(make("p", { class: "note" }, "No recorded answers yet."));
  for (const run of known) {
    const { halves, width } = run.lengths;
    const most = Math.max(...halves.flatMap(({ right, wrong }) => right.map((count, n) => count + wrong[n])));
    element("length-charts").append(...halves.map((half) => lengthChart(run, half, width, most)));
  }
  element("length-charts").before(make("p", { class: "note" },
    "Answers on this page by length: filled bars are right, outlined bars above them are wrong. A run's first chart shows the first half of the recorded steps, its second chart the second half."));
}

const PHASES = {
  placement: "placing the weights", rollout: "rollout", reward: "rewards", score: "scoring", pack: "packing",
  record: "scoring recorded answers", update: "update", save: "saving", eval: "evaluation",
};

function utilizationText(mfu) {
  const parts = Object.entries(mfu).map(([name, value]) => `${name === "step" ? "whole update" : PHASES[name]} ${(100 * value).toPrecision(2)}%`);
  return parts.length ? `Model FLOPs utilization, for completion tokens: ${parts.join(", ")}.`
    : "Pass --topology=KIND:SIZES, such as h100:8, for the fraction of the devices’ peak.";
}

function showTimes() {
  for (const run of runs) {
    const { seconds, updates, skipped, tokens_per_s: speed, mfu = {} } = run.time;
    const { step, ...phases } = seconds;
    if (!step) continue;
    const order = [...Object.keys(PHASES).filter((name) => name in phases), ...Object.keys(phases).filter((name) => !(name in PHASES))];
    const outside = ["save", "eval"].reduce((total, name) => total + (phases[name] || 0), 0);
    const whole = step + outside;
    const known = order.reduce((total, name) => total + phases[name], 0);
    const rows = [...order.map((name) => [PHASES[name] || name, phases[name]]), ["everything else", Math.max(0, whole - known)]];
    const table = make("table", {}, make("caption", {}, `${textOf(run.name)}: mean over ${updates} updates${skipped ? ", without those of the first rollout, which compile programs" : ""}`),
      make("tbody", {}, ...rows.map(([label, value]) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        svg.setAttribute("viewBox", "0 0 100 4");
        svg.setAttribute("preserveAspectRatio", "none");
        svg.setAttribute("aria-hidden", "true");
        draw(svg, "rect", { class: "bar", width: 100 * value / whole, height: 4 });
        return make("tr", {}, make("th", { scope: "row" }, textOf(label)), make("td", { class: "number" }, `${format(value)} s`),
          make("td", { class: "number" }, `${(100 * value / whole).toFixed(1)}%`), make("td", {}, svg));
      }), make("tr", {}, make("th", { scope: "row" }, "one update"), make("td", { class: "number" }, `${format(whole)} s`), make("td", { class: "number" }, "100%"), make("td"))));
    element("times").append(make("div", {}, table, make("p", { class: "note" }, `Sampling: ${format(speed)} tokens per second. ${utilizationText(mfu)}`)));
  }
}

function showWarnings() {
  const items = runs.flatMap((run) => run.warnings.map(({ step, name, text }) => {
    const item = make("li", { "data-warning": textOf(name) }, `${runs.length > 1 ? `${textOf(run.name)}, ` : ""}step ${step}: `);
    return addText(item, text);
  }));
  element("warning-list").append(items.length ? make("ul", {}, ...items) : make("p", { class: "note" }, "None."));
  const link = document.querySelector('nav a[href="#warnings"]');
  link.textContent = items.length ? `⚠ ${items.length} warning${items.length > 1 ? "s" : ""}` : "No warnings";
}

function configTable(rows) {
  const head = make("tr", {}, ...["Key", textOf(config.base), ...runs.map((run) => textOf(run.name))].map((label) => make("th", { scope: "col" }, label)));
  const body = rows.map(([key, isChanged, base, ...values]) => make("tr", isChanged ? { class: "changed" } : {},
    addText(make("th", { scope: "row", class: "key" }), key), addText(make("td", { class: "value" }), base),
    ...values.map((value) => addText(make("td", { class: `value${value === base ? "" : " differs"}` }), value))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function showConfig() {
  const changed = config.rows.filter(([, isChanged]) => isChanged);
  element("config-note").textContent = `${changed.length} of ${config.rows.length} keys differ from ${textOf(config.base)}.${config.isPreset ? "" : " Pass --config=FILE.py:PRESET to compare with a preset."}`;
  if (changed.length) element("config-changes").append(configTable(changed));
  element("config-all").append(configTable(config.rows));
}

showTop();
showCurves();
showSamples();
showComparison();
showLengths();
showTimes();
showWarnings();
showConfig();
