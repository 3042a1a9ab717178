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

// Length against correctness, time, warnings and config

function lengthChart(run, half, width, most) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const bins = half.right.length, wide = 420, height = 190, bar = (wide - LEFT - RIGHT) / bins;
  const y = (count) => height - BOTTOM - (height - TOP - BOTTOM) * count / most;
  const total = (list) => list.reduce((a, b) => a + b, 0);
  const label = `steps ${half.first} to ${half.last}: ${total(half.right)} right and ${total(half.wrong)} wrong completions by length`;
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
  if (!known.length) return void element("length-charts").append(make("p", { class: "note" }, "No completions have been recorded yet."));
  for (const run of known) {
    const { halves, width } = run.lengths;
    const most = Math.max(...halves.flatMap(({ right, wrong }) => right.map((count, n) => count + wrong[n])));
    element("length-charts").append(...halves.map((half) => lengthChart(run, half, width, most)));
  }
  element("length-charts").before(make("p", { class: "note" },
    "The completions on this page by length: filled bars count right ones, and the outlined bars above them count wrong ones. The first chart of a run covers the first half of its recorded steps, and the second chart covers the second half."));
}

const PHASES = {
  placement: "placing the weights", rollout: "rollout", reward: "rewards", score: "scoring", pack: "packing",
  record: "scoring recorded completions", update: "update", save: "saving", eval: "evaluation",
};

function utilizationText(mfu) {
  const parts = Object.entries(mfu).map(([name, value]) => `${name === "step" ? "whole update" : PHASES[name]} ${(100 * value).toPrecision(2)}%`);
  return parts.length ? `Model FLOPs utilization, counting completion tokens only: ${parts.join(", ")}.`
    : "For the model FLOPs utilization, pass --topology=KIND:SIZES, such as h100:8.";
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
    const table = make("table", {}, make("caption", {}, `${textOf(run.name)}: mean over ${updates} updates${skipped ? ", excluding those of the first rollout, which include compilation" : ""}`),
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
  element("warning-list").append(items.length ? make("ul", {}, ...items) : make("p", { class: "note" }, "No warnings."));
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
  element("config-note").textContent = `${changed.length} of ${config.rows.length} keys differ from the preset ${textOf(config.base)}.`;
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
