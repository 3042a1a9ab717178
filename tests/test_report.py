"""The report of runs: hostile text stays data, curves keep their extremes, and a run may be old or still going."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from grpo_jax import report
from grpo_jax.config import default
from grpo_jax.config.flags import load_config
from grpo_jax.config.keys import flatten
from grpo_jax.config.presets import nearest_preset
from grpo_jax.errors import UserError
from grpo_jax.reporting import page, samples
from grpo_jax.reporting.curves import MAX_POINTS, mean_curves, run_curves, seed_groups
from grpo_jax.reporting.runs import read_json_lines, read_runs
from grpo_jax.reporting.summary import config_table, describe_progress, key_numbers, time_shares

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '<img src=x onerror="alert(1)">',
    "]]>&amp;&lt;",
    "\u2028\u2029\u202eright to left\u2066\x00\x1b[31m",
    "{{data}}{{script}}{{missing}}",
    "lone \ud800 surrogate",
)


def make_record(sample_id=0, *, prompt_id=0, right=True, text="4", length=2, **fields) -> dict:
    """Makes the record of an answer to 2 + 2 as training writes it; its two tokens are the text and a stop."""
    return {
        "step": 1,
        "prompt_id": prompt_id,
        "sample_id": sample_id,
        "question": f"What is 2 + {prompt_id}?",
        "prompt": f"User: What is 2 + {prompt_id}?",
        "completion": text,
        "tokens": [7, 0],
        "pieces": [text, "</s>"],
        "logps": [-0.5, -0.25],
        "length": length,
        "truncated": False,
        "expected": str(2 + prompt_id),
        "parsed": text,
        "why": "equal" if right else "another value",
        "rewards": {"accuracy": float(right), "format": 1.0},
        "reward": 1.0 + right,
        "policy_logps": [-0.5, -0.35],
        "ref_logps": [-0.6, -0.25],
        "advantage": 1.0 if right else -1.0,
        "update_steps": [1],
    } | fields


def write_lines(path, objects) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(value) + "\n" for value in objects)
    path.write_text(lines, encoding="utf-8")


def write_run(workdir, *, seed=0, updates=4, **keys):
    """Writes the files of a run: metrics that contain the seed, samples of steps 1 and 3, and two evaluations."""
    config = flatten(default().to_dict()) | {"seed": seed, "total_steps": updates} | keys
    nested: dict = {}
    for key, value in config.items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(nested))
    lines = [{"step": 0, "eval/accuracy": 0.25, "eval/format": 1.0, "eval/length_mean": 10.0, "time/eval_s": 1.0}]
    for step in range(1, updates + 1):
        times = {"time/step_s": 2.0, "time/rollout_s": 1.5, "time/update_s": 0.25 * step}
        lines += [{"step": step, "reward/mean": step + seed, "rollout/length_mean": 10.0 * step} | times]
    lines[-1] |= {"eval/accuracy": 0.75, "eval/format": 1.0, "eval/length_mean": 20.0}
    write_lines(workdir / "metrics.jsonl", lines)
    for step in (1, 3):
        group = [
            make_record(0),
            make_record(1, right=False, text="5", length=12),
            make_record(0, prompt_id=3, text="5"),
        ]
        write_lines(workdir / "samples" / f"train-{step:06d}.jsonl", group)
    for step in (0, updates):
        answers = [make_record(prompt_id=n, right=n < 2 if step == 0 else n > 0) for n in range(5)]
        write_lines(workdir / "samples" / f"eval-{step:06d}.jsonl", answers)
    return workdir


class PageReader(HTMLParser):
    """Collects what a browser would take for elements, with the content of scripts and styles."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes).get("id")) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.raw[self.inside] = self.raw.get(self.inside, "") + text

    def data(self, name: str):
        return json.loads(self.raw["script", f"data-{name}"])


def read_page(*workdirs, **arguments) -> PageReader:
    runs = read_runs(list(map(str, workdirs)))
    return PageReader(page.make_page(page.report_data(runs, flatten(default().to_dict()), "r1zero:tiny", **arguments)))


def test_hostile_text_is_data_on_the_page(tmp_path):
    harmless = read_page(write_run(tmp_path / "harmless"))
    workdir = write_run(tmp_path / "run", **{"task.path": HOSTILE[0]})
    fields = {"question": HOSTILE[0], "prompt": HOSTILE[1], "why": HOSTILE[2], "parsed": HOSTILE[3]}
    fields |= {"rewards": {HOSTILE[0]: 1.0}, "expected": HOSTILE[4]}
    records = [make_record(n, text=text, **fields) for n, text in enumerate(HOSTILE)]
    for kind, step in (("train", 1), ("eval", 0), ("eval", 4)):
        write_lines(workdir / "samples" / f"{kind}-{step:06d}.jsonl", records)
    write_lines(workdir / "warnings.jsonl", [{"step": 1, "name": HOSTILE[2], "text": HOSTILE[0]}])
    out = tmp_path / "report.html"
    report.main([f"--workdir={workdir}", f"--out={out}"])
    hostile = PageReader(out.read_text(encoding="utf-8"))
    shape = [(tag, sorted(attributes)) for tag, attributes in hostile.elements]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in harmless.elements]
    assert not [name for (kind, name), text in hostile.raw.items() if name and re.search("[<>&\u2028\u2029]", text)]
    (group,) = hostile.data("samples-0-1")
    assert [answer["pieces"][0] for answer in group["answers"]] == list(HOSTILE)
    assert (group["question"], group["prompt"], group["expected"]) == (HOSTILE[0], HOSTILE[1], HOSTILE[4])
    assert hostile.data("report")["runs"][0]["warnings"][0]["text"] == HOSTILE[0]


def test_the_policy_of_the_page_admits_its_own_script_and_style_only(tmp_path):
    reader = read_page(write_run(tmp_path / "run"))
    (policy,) = [found["content"] for tag, found in reader.elements if found.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for kind in ("script", "style"):
        digest = hashlib.sha256(reader.raw[kind, None].encode()).digest()
        assert rules.pop(f"{kind}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert not rules
    for _, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
        assert attributes.get("href", "#").startswith("#")
    script = reader.raw["script", None]
    forbidden = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\.style\b|https?:(?!//www\.w3)"
    assert not re.search(forbidden, script)


def test_curves_of_long_runs_are_reduced_and_keep_their_extremes(tmp_path):
    workdir = write_run(tmp_path / "run")
    values = [math.sin(step / 300) for step in range(10_000)]
    values[4321], values[7777] = 9.0, -9.0
    lines = [{"step": step + 1, "loss/total": value, "optim/lr": 0.5} for step, value in enumerate(values)]
    lines[100]["loss/total"] = None  # not finite
    write_lines(workdir / "metrics.jsonl", lines)
    curves = run_curves(read_runs([str(workdir)])[0])
    curve = curves["loss/total"]
    assert len(curve["steps"]) == len(curve["values"]) == len(curve["low"]) == MAX_POINTS
    assert (max(curve["high"]), min(curve["low"])) == (9.0, -9.0)
    start = next(n for n, step in enumerate(curve["steps"]) if step > 2000)
    chunk = values[start * 20 : start * 20 + 20]  # twenty steps are merged
    assert curve["values"][start] == pytest.approx(sum(chunk) / 20, rel=1e-4)
    assert "low" not in curves["optim/lr"] and set(curves["optim/lr"]["values"]) == {0.5}


def test_values_that_are_not_finite_are_gaps(tmp_path):
    workdir = write_run(tmp_path / "run")
    write_lines(workdir / "metrics.jsonl", [{"step": n, "loss/total": None if n == 2 else n} for n in (1, 2, 3)])
    curve = run_curves(read_runs([str(workdir)])[0])["loss/total"]
    assert curve == {"steps": [1, 2, 3], "values": [1, None, 3]}


def test_runs_that_differ_in_their_seed_only_are_averaged(tmp_path):
    folders = [write_run(tmp_path / f"seed{seed}", seed=seed, updates=4) for seed in (0, 4)]
    folders.append(write_run(tmp_path / "other", **{"optim.lr": 0.5}))
    runs = read_runs(list(map(str, folders)))
    assert seed_groups(runs) == [[0, 1]]
    curve = mean_curves(runs[:2])["reward/mean"]
    assert curve == {"steps": [1, 2, 3, 4], "values": [3, 4, 5, 6], "low": [1, 2, 3, 4], "high": [5, 6, 7, 8]}
    shown = read_page(*folders).data("report")
    assert [mean["runs"] for mean in shown["means"]] == [[0, 1]]
    assert [run["name"] for run in shown["runs"]] == ["seed0", "seed4", "other"]


def test_runs_have_names_that_tell_them_apart(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    runs = read_runs([*map(str, folders), f"{folders[0]}/../run"])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_tokens_have_log_probs_ratios_and_kl(tmp_path):
    (group, other) = read_page(write_run(tmp_path / "run")).data("samples-0-3")
    assert [answer["sample_id"] for answer in group["answers"]] == [0, 1] and other["prompt_id"] == 3
    answer = group["answers"][0]
    assert answer["pieces"] == ["4", "</s>"] and answer["logps"] == [-0.5, -0.25]
    assert answer["log_ratios"] == pytest.approx([0, -0.1])  # policy - sampler
    assert answer["kl"] == pytest.approx(
        [math.exp(-0.1) + 0.1 - 1, math.exp(0.1) - 0.1 - 1], rel=1e-3
    )  # d = ref - policy


def test_samples_of_older_runs_are_shown_without_tokens(tmp_path):
    workdir = write_run(tmp_path / "run")
    old = {name: value for name, value in make_record().items() if name not in ("pieces", "ref_logps", "policy_logps")}
    write_lines(workdir / "samples" / "train-000001.jsonl", [old])
    (group,) = read_page(workdir).data("samples-0-1")
    (answer,) = group["answers"]
    assert answer["completion"] == "4" and "pieces" not in answer and answer["kl"] is None


def test_a_page_holds_no_more_samples_than_its_budget_allows(tmp_path):
    files = {}
    for step in range(1, 1001):
        files[step] = tmp_path / f"{step}"
        files[step].write_bytes(b"x" * 100)
    chosen, limit = samples.choose_files(files, 5_000)
    assert len(chosen) == 50 and {1, 1000} <= set(chosen) and limit >= 100
    assert set(np.diff(list(chosen)).tolist()) <= {20, 21}
    assert samples.choose_files(files, 1e9)[0] == files and samples.choose_files({}, 1e9)[0] == {}
    # A large file is read up to its share: whole records, and at least one.
    write_lines(tmp_path / "large", [make_record(n) for n in range(9)])
    size = (tmp_path / "large").stat().st_size
    assert [len(list(read_json_lines(tmp_path / "large", limit))) for limit in (1, size / 2, size)] == [1, 4, 9]
    (run,) = read_runs([str(write_run(tmp_path / "run"))])
    for budget in samples.MIN_STEPS, 1e9:
        steps, _ = samples.embed_samples(run, budget)
        assert {groups[-1]["is_cut"] for groups in steps.values()} == {budget < 1e9}


def test_answers_are_counted_by_length_and_correctness(tmp_path):
    lengths = read_page(write_run(tmp_path / "run")).data("report")["runs"][0]["lengths"]
    assert lengths["width"] == 1 and lengths["part"] == "accuracy"
    first, second = lengths["halves"]
    assert (first["first"], first["last"], second["first"]) == (1, 1, 3)
    assert (first["right"][2], first["wrong"][12], sum(first["right"]), sum(first["wrong"])) == (2, 1, 2, 1)


def test_evaluations_are_compared_question_by_question(tmp_path):
    reader = read_page(write_run(tmp_path / "run"))
    comparison = reader.data("report")["runs"][0]["comparison"]
    assert comparison["steps"] == [0, 4]
    assert comparison["counts"] == {"wrong right": 3, "right wrong": 1, "right right": 1, "wrong wrong": 0}
    questions = reader.data("comparison-0")
    assert [(question["kind"], question["prompt_id"]) for question in questions] == [
        ("wrong right", 2),
        ("wrong right", 3),
        ("wrong right", 4),
        ("right wrong", 0),
        ("right right", 1),
    ]
    assert [answer["why"] for answer in questions[0]["answers"]] == ["another value", "equal"]
    assert comparison["unlike"] == ""


def test_evaluations_are_compared_for_the_same_questions_only_and_what_differs_is_said(tmp_path):
    workdir = write_run(tmp_path / "run")
    answers = [make_record(prompt_id=n, question=f"What is {n + (n == 2)} + 2?") for n in range(5)]
    write_lines(
        workdir / "samples" / "eval-000000.jsonl",
        [make_record(prompt_id=n, question=f"What is {n} + 2?") for n in range(5)],
    )
    write_lines(workdir / "samples" / "eval-000004.jsonl", answers)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line, temperature in ((lines[0], 1.0), (lines[-1], 0.5)):
        line["eval/sampling/temperature"] = temperature
    write_lines(workdir / "metrics.jsonl", lines)
    reader = read_page(workdir)
    assert [question["prompt_id"] for question in reader.data("comparison-0")] == [0, 1, 3, 4]
    unlike = reader.data("report")["runs"][0]["comparison"]["unlike"]
    assert "eval.temperature (1 and 0.5), questions (5 and 5 different ones, 4 in both)" in unlike


def test_a_run_is_summed_up(tmp_path):
    (run,) = read_runs([str(write_run(tmp_path / "run", **{"train.minibatches": 1}))])
    numbers = {number["label"]: (number["before"], number["after"]) for number in key_numbers(run)}
    assert numbers == {
        "accuracy": (0.25, 0.75),
        "format": (1.0, 1.0),
        "length in tokens": (10.0, 20.0),
        "reward in training": (1, 4),
    }
    times = time_shares(run)  # the first update compiles
    assert times["updates"] == 3 and times["seconds"] == {"step": 2.0, "rollout": 1.5, "update": 0.75}
    assert describe_progress(run).startswith("tiny learns addition from rewards alone: 4 of 4 updates in 9 s, ")


def test_the_config_is_compared_with_the_base(tmp_path):
    runs = read_runs([str(write_run(tmp_path / "run", **{"optim.lr": 0.5}))])
    rows = {key: rest for key, *rest in config_table(runs, flatten(default().to_dict()))}
    assert rows["optim.lr"] == [True, json.dumps(default().optim.lr), "0.5"] and rows["rollout.samples"][0] is False
    assert {key for key, (changed, *_) in rows.items() if changed} == {"optim.lr", "total_steps"}


def test_a_run_that_is_still_going_has_a_page(tmp_path):
    workdir = write_run(tmp_path / "run")
    for path in (workdir / "metrics.jsonl", workdir / "samples" / "train-000003.jsonl"):
        path.write_text(path.read_text()[:-30])  # the last line is being written
    (workdir / "warnings.jsonl").write_text('{"step": 2, "name": "x", "text": "y"}\n{"st')
    reader = read_page(workdir)
    run = reader.data("report")["runs"][0]
    assert run["curves"]["reward/mean"]["steps"] == [1, 2, 3] and run["warnings"] == [
        {"step": 2, "name": "x", "text": "y"}
    ]
    assert len(reader.data("samples-0-3")) == 1
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text((workdir / "config.json").read_text())
    run = read_page(new).data("report")["runs"][0]
    assert run["curves"] == {} and run["steps"] == [] and run["comparison"] is None


def test_the_page_shows_how_to_draw_a_sample_again(tmp_path):
    workdir = write_run(tmp_path / "a run")
    command = read_page(workdir).data("report")["runs"][0]["redraw"]
    assert command == f"python -m grpo_jax.generate --workdir='{workdir}' --sample="


@pytest.mark.slow
def test_utilization_counts_the_products_that_completions_need(tmp_path):
    workdir = write_run(tmp_path / "run", **{"loss.kl_coef": 0.1})
    mfu = read_page(workdir, topology="l4:2").data("report")["runs"][0]["time"]["mfu"]
    # tiny: 853,120 parameters of which 512 * 128 embed tokens and also make the logits; norms multiply nothing.
    layers_and_head = 853_120 - 9 * 128
    tokens = 16 * 8 * 25
    assert mfu["rollout"] == pytest.approx(2 * layers_and_head * tokens / (1.5 * 2 * 121e12), rel=0.05)
    assert (
        mfu["update"] / mfu["rollout"] == pytest.approx(3 * 1.5 / 0.75) and mfu["step"] < mfu["rollout"] * 5 * 1.5 / 2
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], r"--workdir=DIR must be given, once for each run; found none"),
        (["--workdir=none"], r"none must be the workdir of a training run"),
        (["--workdir=run", "--out=missing/report.html"], r"--out must be a file FILE.html in a folder that exists"),
        (["--workdir=run", "--out=report.txt"], r"--out must be a file FILE.html in a folder that exists"),
        (["--workdir=run", "--config=none.py"], r"found no file 'none.py'"),
        (["--workdir=run", "--topology=cpu:1"], r"--topology must name devices whose peak is known.*'cpu:1'"),
        (["--workdir=run", "--config.seed=1"], r"unrecognized arguments: --config.seed=1"),
    ],
)
def test_a_mistake_is_one_error_and_nothing_is_written(tmp_path, monkeypatch, argv, says):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        report.main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("spec", ["r1zero:tiny", "r1zero:smollm2", "dapo:tiny"])
def test_a_run_is_compared_with_the_preset_that_is_nearest(spec):
    config = flatten(load_config(spec).to_dict())
    assert nearest_preset(config | {"seed": 3, "optim.lr": 0.25}) == (spec, config)
