// Curves

const HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;
const NOT_PARTS = ["mean", "timeout", "error", "kl", "length_mean"];
const CHARTS = [
  ["policy/entropy", "Entropy", "nats per token"],
  ["policy/kl_ref", "KL to the reference", "nats per token"],
  ["policy/logp_gap/max", "Sampler drift", "largest log-prob difference to the trainer, nats"],
  ["policy/kl_sampler", "KL of sampler and trainer", "nats per token"],
  ["policy/clip_frac", "Clipped tokens", "fraction"],
  ["policy/ratio_max", "Largest ratio", "pi / pi_old"],
  ["optim/grad_norm", "Gradient norm", "before clipping"],
  ["rollout/truncated_frac", "Cut off at the length limit", "fraction of completions"],
  ["groups/zero_variance_frac", "Groups with equal rewards", "fraction of groups"],
  ["rollout/tokens_per_s", "Sampling speed", "tokens per second"],
  ["time/step_s", "Time per update", "seconds"],
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
      const isLone = !isPen && (values[n + 1] ?? null) === null;  // a line of length 0, whose round ends show as a dot
      if (values[n] !== null) out += `${isPen ? "L" : "M"}${x(step).toFixed(1)} ${y(values[n]).toFixed(1)}${isLone ? "h0" : ""}`;
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
  element("curves-note").textContent = "Lines show training, smoothed over updates; pale lines show the values without smoothing. Circles show evaluations on held-out problems."
    + (isReduced ? " Each point of a line stands for several updates, and the band shows their smallest and largest values." : "")
    + (runs.some((run) => run.warnings.length) ? " Marks on the x-axis show warnings." : "");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  addChart(element("main-charts"), "Reward", "mean over completions", "reward/mean");
  addChart(element("main-charts"), "Length of completions", "tokens", "rollout/length_mean", "eval/length_mean");
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
