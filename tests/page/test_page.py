"""The page of two runs shows in a browser what their files say."""

import json
import math
import re

import numpy as np
import pytest

from grpo_jax.config import default
from tests.page.conftest import SAMPLES, STEPS, read_groups, read_jsonl

MODES = {"logp": "log-prob", "ratio": "ratio to the sampler", "kl": "KL to the reference"}
# What a reader sees of the answers: for each, its name, text and facts, and for each token its text and background.
SHOWN_ANSWERS = """answers => answers.map(answer => ({
    name: answer.dataset.sample,
    text: answer.innerText,
    command: answer.querySelector("code").textContent,
    tokens: [...answer.querySelectorAll("[data-token]")].map(token => [
        token.textContent, getComputedStyle(token).backgroundColor]),
}))"""
LEGEND = """items => items.map(item => [getComputedStyle(item).backgroundColor, item.textContent])"""
LABELS = """texts => texts.map(text => [Number(text.getAttribute("y")) - 4, Number(text.textContent)])"""
PATHS = """paths => paths.map(
    path => path.getAttribute("d").match(/[\\d.]+ [\\d.]+/g).map(pair => pair.split(" ").map(Number)))"""


def token_values(record: dict, mode: str) -> list[float]:
    """Computes what a mode colors: the probability, the ratio minus 1, or the k3 estimate of the KL divergence."""
    if mode == "logp":
        return [math.exp(logp) for logp in record["logps"]]
    pairs = list(zip(record["policy_logps"], record["logps" if mode == "ratio" else "ref_logps"], strict=True))
    if mode == "ratio":
        return [math.exp(trainer - sampler) - 1 for trainer, sampler in pairs]
    return [math.exp(reference - policy) - (reference - policy) - 1 for policy, reference in pairs]


def read_range(text: str) -> tuple[float, float]:
    """Reads a range of the legend: two numbers, `below 0.03` or `2 or more`, with the minus sign of U+2212 or not."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    low, high = (-math.inf, *numbers) if "below" in text else (*numbers, math.inf) if "or more" in text else numbers
    return (-high, -low) if text.startswith("\u2212") else (low, high)


def about(value: float):
    """Accepts a number that the page shows with four significant digits or three below 1."""
    return pytest.approx(value, rel=6e-3, abs=1e-12)


def test_the_slider_shows_every_answer_of_every_step(open_page, page_file, runs):
    page = open_page(page_file)
    slider, groups = page.locator("#step"), page.locator("#group")
    for index, workdir in enumerate(runs):
        page.locator("#samples-run").select_option(str(index))
        slider.focus()
        page.keyboard.press("Home")
        for step in range(1, STEPS + 1):
            recorded = read_groups(workdir, step)
            assert f"Step {step} ({step} of {STEPS})" in page.locator("#step-name").inner_text()
            assert groups.locator("option").count() == len(recorded)
            for position, (prompt_id, records) in enumerate(recorded.items()):
                groups.select_option(str(position))
                question = page.locator("#question").inner_text()
                assert records[0]["question"] in question and records[0]["expected"] in question
                shown = page.locator("#answers article").evaluate_all(SHOWN_ANSWERS)
                assert len(shown) == len(records) == SAMPLES
                for answer, record in zip(shown, records, strict=True):
                    name = f"{step}/{prompt_id}/{record['sample_id']}"
                    assert answer["name"] == name
                    assert answer["command"].endswith(f"--workdir={workdir} --sample={name}")
                    assert [text for text, _ in answer["tokens"]] == record["pieces"]
                    assert ("✓ right" if record["rewards"]["accuracy"] else "✗ wrong") in answer["text"]
                    assert record["why"] in answer["text"]
                    assert ("cut off" in answer["text"]) == record["truncated"]
                    advantage = re.search(r"advantage\s+([-+\d.]+)", answer["text"])[1]
                    assert float(advantage) == about(record["advantage"])
            slider.focus()
            page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("mode", MODES)
def test_tokens_have_the_color_that_the_legend_gives_to_their_values(open_page, page_file, runs, mode):
    page = open_page(page_file)
    page.locator("#step").focus()
    page.keyboard.press("End")
    page.get_by_label(MODES[mode], exact=True).check()
    ranges = dict(page.locator("#legend [role=listitem]").evaluate_all(LEGEND)[1:])
    seen = set()
    records = next(iter(read_groups(runs[0], STEPS).values()))
    for answer, record in zip(page.locator("#answers article").evaluate_all(SHOWN_ANSWERS), records, strict=True):
        for (_, color), value in zip(answer["tokens"], token_values(record, mode), strict=True):
            low, high = read_range(ranges[color])
            if mode == "ratio" and "below" in ranges[color]:
                low = -high
            assert low - 1e-3 * abs(low) <= value <= high + 1e-3 * abs(high), (record["sample_id"], ranges[color])
            seen.add(color)
    assert len(seen) > 1 or mode == "ratio"  # sampler and trainer agree in float32


def test_arrow_keys_read_out_the_values_of_each_token(open_page, page_file, runs):
    page = open_page(page_file)
    page.locator("#step").focus()
    page.keyboard.press("End")
    record = next(iter(read_groups(runs[0], STEPS).values()))[0]
    page.locator("#answers article").first.locator("[data-token]").first.focus()
    columns = [token_values(record, mode) for mode in MODES]
    for n, (probability, ratio, kl) in enumerate(zip(*columns, strict=True)):
        text = page.locator("#token-values").inner_text()
        assert f"token {n + 1} " in text and f"id {record['tokens'][n]} " in text
        assert float(re.search(r"log-prob (\S+)", text)[1]) == about(record["logps"][n])
        assert float(re.search(r"p (\S+)\)", text)[1]) == about(probability)
        assert float(re.search(r"KL (\S+)", text)[1]) == pytest.approx(kl, rel=6e-3, abs=1e-6)
        sign, distance = re.search(r"ratio (?:1 ([-+\u2212]) )?(\S+)", text).groups()
        shown = {"+": 1, None: 0}.get(sign, -1) * float(distance) if sign else float(distance) - 1
        assert shown == pytest.approx(ratio, rel=6e-3, abs=5e-4 if sign is None else 1e-9)
        page.keyboard.press("ArrowRight")


def test_curves_have_the_values_of_metrics_jsonl(open_page, page_file, runs):
    page = open_page(page_file)
    lines = [read_jsonl(workdir / "metrics.jsonl")[1:] for workdir in runs]
    figure = page.locator('figure[data-metric="reward/mean"]')
    rewards = [np.array([line["reward/mean"] for line in of_run]) for of_run in lines]

    def read_off(kind: str) -> list[np.ndarray]:
        """Returns the values of the lines of a kind, read with the help of the labels of the vertical axis."""
        labels = np.array(figure.locator("text[text-anchor=end]").evaluate_all(LABELS))
        axis = np.polyfit(*labels.T, 1)
        return [np.polyval(axis, np.array(path)[:, 1]) for path in figure.locator(f"path.{kind}").evaluate_all(PATHS)]

    for values, expected in zip(read_off("raw"), rewards, strict=True):
        np.testing.assert_allclose(values, expected, atol=2e-3)
    page.locator("#smoothing").focus()
    for key in "Home", *["ArrowRight"] * 10:
        page.keyboard.press(key)
    assert page.locator("#smoothing").input_value() == "0.5"
    decay = 0.5 ** np.arange(STEPS)
    for values, points in zip(read_off("curve"), rewards, strict=True):
        smooth = [decay[: n + 1][::-1] @ points[: n + 1] / decay[: n + 1].sum() for n in range(STEPS)]
        np.testing.assert_allclose(values, smooth, atol=2e-3)

    page.locator("#other summary").press("Enter")
    figure.locator("svg").focus()
    page.keyboard.press("Home")
    for step in range(1, STEPS + 1):
        readouts = page.locator("figure[data-metric]").evaluate_all(
            "figures => figures.map(figure => [figure.dataset.metric, figure.querySelector('.readout').textContent])"
        )
        shown = dict(readouts)
        assert len(shown) > 25
        for metric, text in shown.items():
            if metric not in lines[0][step - 1] or metric.startswith(("eval/", "time/eval")):
                continue
            numbers = [float(number.replace(",", "")) for number in re.findall(r"seed-\d (\S*[\d])", text)]
            assert numbers == [about(of_run[step - 1][metric]) for of_run in lines], (metric, step)
        page.keyboard.press("ArrowRight")


def test_runs_can_be_hidden_and_averaged(open_page, page_file, runs):
    page = open_page(page_file)
    figure = page.locator('figure[data-metric="reward/mean"]')
    assert figure.locator("path.curve").count() == 2
    page.locator("#runs input").first.uncheck()
    assert figure.locator("path.curve").count() == 1
    page.locator("#runs input").first.check()
    page.get_by_label("Mean and range over seeds").check()
    assert figure.locator("path.curve").count() == figure.locator("path.band").count() == 1
    last = [read_jsonl(workdir / "metrics.jsonl")[-1]["reward/mean"] for workdir in runs]
    assert float(re.search(r"seeds (\S+)", figure.inner_text())[1]) == about(sum(last) / 2)


def test_warnings_are_listed(open_page, page_file, runs):
    page = open_page(page_file)
    expected = [
        f"{workdir.name}, step {warning['step']}: {warning['text']}"
        for workdir in runs
        for warning in read_jsonl(workdir / "warnings.jsonl")
    ]
    assert expected
    assert page.locator("#warning-list li").all_inner_texts() == expected
    assert page.locator("figure[data-metric='reward/mean'] line.warning").count() == len(expected)


def flatten(config: dict, prefix: str = "") -> dict:
    """Returns a nested config by dotted name."""
    items = ((f"{prefix}{key}", value) for key, value in config.items())
    return {
        name: value
        for key, child in items
        for name, value in (flatten(child, f"{key}.").items() if isinstance(child, dict) else [(key, child)])
    }


def test_the_config_is_shown_with_what_differs_from_the_defaults(open_page, page_file, runs):
    page = open_page(page_file)
    base = flatten(json.loads(default().to_json_best_effort()))
    configs = [flatten(json.loads((workdir / "config.json").read_text())) for workdir in runs]
    rows = page.locator("#config-changes tbody tr").all_inner_texts()
    expected = [
        [key, *(json.dumps(config[key]) for config in (base, *configs))]
        for key in sorted(base)
        if any(config[key] != base[key] for config in configs)
    ]
    assert [row.split("\t") for row in rows] == expected
    page.locator("#config summary").click()
    assert page.locator("#config-all tbody tr").count() == len(base)


def test_evaluations_are_compared_on_the_same_questions(open_page, page_file, runs):
    page = open_page(page_file)
    before, after = (
        {record["prompt_id"]: record for record in read_jsonl(runs[1] / "samples" / f"eval-{step:06d}.jsonl")}
        for step in (0, STEPS)
    )
    page.locator("#comparison-run").select_option("1")
    shown = 0
    for kind in page.locator("#comparison-kind option").evaluate_all("options => options.map(option => option.value)"):
        page.locator("#comparison-kind").select_option(kind)
        verdicts = [word == "right" for word in kind.split()]
        questions = [
            number
            for number in before
            if [bool(side[number]["rewards"]["accuracy"]) for side in (before, after)] == verdicts
        ]
        while page.locator("#more-pairs").is_visible():
            page.locator("#more-pairs").click()
        pairs = page.locator("#pairs article").all_inner_texts()
        assert len(pairs) == len(questions)
        for text, number in zip(pairs, questions, strict=True):
            assert before[number]["question"] in text
            for record in before[number], after[number]:
                assert record["completion"] in text and record["why"] in text
        shown += len(pairs)
    assert shown == len(before) == len(after)
