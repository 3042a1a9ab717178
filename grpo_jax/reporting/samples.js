// Samples

// Limits between the shades of a token: of its probability, of the distance of its ratio from 1, and of its KL in nats.
const SHADES = {
  logp: { limits: [0.95, 0.7, 0.4, 0.15, 0.03], label: "probability" },
  ratio: { limits: [0.001, 0.01, 0.05, 0.2, 1], label: "ratio − 1" },
  kl: { limits: [0.001, 0.01, 0.1, 0.5, 2], label: "KL in nats" },
};
const FIRST_TOKENS = 1500; // of a completion; a button shows the rest
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

/** Shows the tokens of a completion; arrow keys move between them, and the bar at the bottom shows their values. */
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
  const name = `completion ${answer.sample_id}`;
  const rewards = Object.entries(answer.rewards || {}).map(([part, value]) => [part, format(value)]);
  const advantage = answer.advantage === null ? null : `${answer.advantage > 0 ? "+" : ""}${format(answer.advantage)}`;
  const text = answer.pieces ? tokensOf(answer, name) : addText(make("div", { class: "completion text" }), answer.completion ?? "");
  const isLeftOut = answer.update_steps && !answer.update_steps.length;
  return make("article", { class: "answer", "data-sample": `${step}/${group.prompt_id}/${answer.sample_id}` },
    make("header", {}, make("h3", {}, `Completion ${answer.sample_id}`), verdict(answer.right)),
    facts([["reward", format(answer.reward)], ...rewards, ["advantage", advantage]]),
    text,
    facts([["read as", answer.parsed], ["why", answer.why], ["tokens", `${answer.length}${answer.truncated ? ", cut off" : ""}`],
      ["", isLeftOut ? "left out of training" : ""]]),
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
      ["", group.is_cut ? "this page holds only some of the completions of this step; samples/ has all of them" : ""]]), prompt);
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
    ? `A completion counts as right if its reward part ${textOf(run.lengths.part)} is above 0.`
      + (run.steps.length < run.recorded ? ` This page holds ${run.steps.length} of the ${run.recorded} recorded steps, evenly spaced; samples/ has all of them.` : "")
    : "The run has not recorded any completions yet.";
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
    ? `In the evaluations of steps ${comparison.steps.join(" and ")}, ${comparison.counts[kind]} ${comparison.counts[kind] === 1 ? "question was" : "questions were"} answered ${KINDS[kind]}${all.length < comparison.counts[kind] ? `; this page holds ${all.length} of them` : ""}. A completion counts as right if its reward part ${textOf(comparison.part)} is above 0. ${comparison.unlike}`
    : "The run does not have two evaluations with recorded completions yet.";
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
