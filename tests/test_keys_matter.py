"""Every config key of training changes what a run computes, reads or writes.

`CASES` has two values for each key and names what must differ between two short runs of `main` that differ in nothing
but that key. What is compared is what the training loop compiles, what it writes and what it prints; config.json does
not count.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import grpo_jax.rollout.sampler
import grpo_jax.run.stages
import grpo_jax.run.train
from grpo_jax.config.keys import key_specs
from grpo_jax.config.schema import Config
from grpo_jax.errors import RunStopped, UserError
from grpo_jax.main import main
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.weights.source import find_model

pytestmark = pytest.mark.slow

REPO = Path(__file__).parent.parent
BASE = {
    "total_steps": 2,
    "rollout.prompts": 4,
    "rollout.samples": 4,
    "rollout.max_tokens": 24,
    "optim.lr": 1e-3,
    "checkpoint.every_steps": 1,
    "eval.questions": 4,
    "log.every_steps": 1,
}

# The compiled programs of a run, and the modules from which the loop calls them.
PROGRAMS = {
    "init_decode": grpo_jax.rollout.sampler,
    "decode_tokens": grpo_jax.rollout.sampler,
    "score_completions": grpo_jax.run.stages,
    "update": grpo_jax.run.train,  # made by make_update
}
LEARNING = ("score_completions", "update")
POLICY = ("update", "policy")  # the program alone could differ in a metric
PROMPTS = ("train prompt", "eval prompt")
COMPLETIONS = ("train completion", "eval completion")
REWARDS = ("train reward", "train advantage", "metrics")

# What some cases need besides `BASE`: a second update whose ratios are not 1, and rewards that depend on the length.
OFF_POLICY = {"train.epochs": 2, "loss.kl_coef": 0.1}
BREVITY = {"reward.parts": ("FOLDER/functions.py:brevity",), "reward.weights": (1.0,)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Two values of a key and what they change, in runs with the keys `given` besides those of `BASE`."""

    value: Any
    other: Any
    changes: tuple[str, ...]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "seed": Case(0, 1, ("train prompt", "eval completion")),
    "total_steps": Case(2, 1, ("metrics", "checkpoints")),
    "model.path": Case("tiny", "FOLDER/model", ("update", "decode_tokens")),
    "model.param_dtype": Case("float32", "bfloat16", POLICY),
    "model.reference_dtype": Case("float32", "bfloat16", ("score_completions", "reference")),
    "model.compute_dtype": Case("float32", "bfloat16", tuple(PROGRAMS)),
    "model.logit_dtype": Case("float32", "bfloat16", (*LEARNING, "decode_tokens")),
    "model.attention": Case("plain", "blocks", (*LEARNING, "init_decode")),
    "task.name": Case("addition", "FOLDER/functions.py:successor", PROMPTS),
    "task.digits": Case(3, 2, PROMPTS),
    "task.shots": Case(0, 1, PROMPTS, {"rollout.max_prompt_tokens": 128}),
    "task.path": Case("FOLDER/a.jsonl", "FOLDER/b.jsonl", PROMPTS, {"task.name": "file"}),
    "task.question": Case("question", "twist", PROMPTS, {"task.name": "file", "task.path": "FOLDER/a.jsonl"}),
    "task.answer": Case("answer", "twice", ("eval expected",), {"task.name": "file", "task.path": "FOLDER/a.jsonl"}),
    "task.choices": Case("", "offers", PROMPTS, {"task.name": "file", "task.path": "FOLDER/a.jsonl"}),
    "task.max_unreadable": Case(0.5, 0.01, ("error",), {"task.name": "file", "task.path": "FOLDER/unreadable.jsonl"}),
    "task.eval_path": Case(
        "FOLDER/a.jsonl", "FOLDER/b.jsonl", ("eval prompt",), {"task.name": "file", "task.path": "FOLDER/c.jsonl"}
    ),
    "task.too_long": Case(
        "refuse",
        "drop",
        ("error",),
        {"task.name": "file", "task.path": "FOLDER/long.jsonl", "rollout.max_prompt_tokens": 80},
    ),
    "derive": Case(False, True, ("metrics",)),
    "prompt.instruction": Case("", "Think first.", PROMPTS, {"rollout.max_prompt_tokens": 128}),
    "prompt.examples": Case((), ("1 + 1?", "<answer> 2 </answer>"), PROMPTS, {"rollout.max_prompt_tokens": 128}),
    "prompt.template": Case("r1zero", "FOLDER/template.txt", PROMPTS),
    "reward.parts": Case(
        ("accuracy", "format"), ("accuracy", "FOLDER/functions.py:brevity"), ("train reward", "eval reward", "metrics")
    ),
    "reward.weights": Case((1, 1), (1, -1), ("train reward", "train advantage", "policy")),
    "reward.language": Case(
        "en",
        "zh",
        ("train rewards", *REWARDS, "policy"),
        {"reward.parts": ("accuracy", "language"), "rollout.temperature": 2.0},
    ),
    "reward.format_empty": Case(False, True, ("train rewards", *REWARDS), {"model.path": "FOLDER/blank"}),
    "reward.deadline": Case(
        10.0,
        0.5,
        ("train rewards", "train why", *REWARDS),
        {"reward.parts": ("format", "FOLDER/functions.py:hesitant"), "rollout.prompts": 2},
    ),
    "rollout.prompts": Case(4, 8, ("train prompt", "init_decode", "update")),
    "rollout.samples": Case(4, 8, ("train completion", "init_decode", "update")),
    "rollout.max_prompt_tokens": Case(0, 96, ("init_decode", "update")),
    "rollout.max_tokens": Case(24, 8, (*COMPLETIONS, "update")),
    "rollout.temperature": Case(1.0, 2.0, ("train completion", *LEARNING)),
    "rollout.stop_strings": Case(("</answer>",), (">",), COMPLETIONS),
    "rollout.overlong": Case("keep", "zero", (*REWARDS, "policy"), BREVITY),
    "rollout.overlong_cache": Case(8, 24, ("train rewards", *REWARDS, "policy"), {"rollout.overlong": "soft"}),
    "rollout.slots": Case(0, 8, ("init_decode", "decode_tokens")),
    "rollout.mesh.tensor": Case(1, 2, ("init_decode", "decode_tokens")),
    "rollout.mesh.expert": Case(1, 2, ("init_decode", "decode_tokens")),
    "groups.equal": Case(
        "keep", "drop", ("train update_steps", "metrics", "policy"), {"rollout.prompts": 8, "rollout.samples": 2}
    ),
    "advantage.mean": Case("group", "batch", ("train advantage", "policy")),
    "advantage.std": Case("group", "none", ("train advantage", "policy")),
    "advantage.ddof": Case(0, 1, ("train advantage", "policy")),
    "advantage.eps": Case(0.0, 0.5, ("train advantage", "policy")),
    "train.minibatches": Case(1, 2, ("update", "train prompt")),
    "train.epochs": Case(1, 2, ("train prompt", "metrics")),
    "train.micro_tokens": Case(1024, 104, LEARNING, {"rollout.samples": 8}),
    "train.chunk_tokens": Case(512, 16, LEARNING),
    "train.remat": Case("layers", "none", ("update",)),
    "loss.kl_coef": Case(1e-3, 1.0, POLICY),
    "loss.clip_low": Case(0.2, 0.0, POLICY, {"train.epochs": 2}),
    "loss.clip_high": Case(0.2, 0.0, POLICY, {"train.epochs": 2}),
    "loss.ratio": Case("token", "sequence", POLICY, OFF_POLICY),
    "loss.clip_dual": Case(0.0, 1.01, (*POLICY, "metrics"), OFF_POLICY),
    "loss.clip_difference": Case(0.2, 0.0, (*POLICY, "metrics"), OFF_POLICY | {"loss.ratio": "difference"}),
    "loss.aggregate": Case("sequence", "token", ("policy", "metrics")),
    "loss.constant_length": Case(24, 4, ("policy", "metrics"), {"loss.aggregate": "constant"}),
    "loss.kl": Case("k3", "k1", POLICY),
    "loss.kl_corrected": Case(False, True, POLICY, OFF_POLICY),
    "loss.kl_in": Case("loss", "reward", ("train advantage", "metrics", *POLICY), {"loss.kl_coef": 0.1}),
    "loss.entropy_coef": Case(0.0, 0.1, POLICY),
    "reference.every_updates": Case(0, 1, ("reference", "train ref_logps", "policy")),
    "optim.name": Case("adamw", "lion", POLICY),
    "optim.lr": Case(1e-3, 2e-3, POLICY),
    "optim.schedule": Case("linear", "cosine", POLICY, {"optim.decay_steps": 4}),
    "optim.warmup_steps": Case(0, 2, POLICY),
    "optim.decay_steps": Case(4, 6, POLICY, {"optim.schedule": "linear"}),
    "optim.end_lr_fraction": Case(0.0, 0.5, POLICY, {"optim.schedule": "linear", "optim.decay_steps": 4}),
    "optim.b1": Case(0.9, 0.8, POLICY),
    "optim.b2": Case(0.999, 0.9, POLICY),
    "optim.eps": Case(1e-8, 1e-3, POLICY),
    "optim.mu_dtype": Case("float32", "bfloat16", POLICY),
    "optim.weight_decay": Case(0.0, 0.1, POLICY),
    "optim.grad_clip": Case(1.0, 0.01, POLICY),
    "optim.max_skips": Case(1, 2, ("metrics", "error"), {"optim.lr": 1e38, "train.epochs": 4, "total_steps": 4}),
    "mesh.data": Case(8, 4, tuple(PROGRAMS), {"mesh.fsdp": -1}),
    "mesh.fsdp": Case(1, 2, tuple(PROGRAMS)),
    "mesh.expert": Case(1, 2, tuple(PROGRAMS)),
    "mesh.tensor": Case(1, 2, tuple(PROGRAMS)),
    "checkpoint.every_steps": Case(1, 2, ("checkpoints",)),
    "checkpoint.keep": Case(2, 1, ("checkpoints",)),
    "checkpoint.retry_s": Case(0, 1, ("error", "checkpoints")),
    "checkpoint.best": Case(
        "", "eval/accuracy", ("checkpoints",), {"total_steps": 3, "checkpoint.keep": 1, "eval.every_steps": 1}
    ),
    "eval.every_steps": Case(0, 1, ("eval prompt", "metrics")),
    "eval.questions": Case(4, 5, ("eval prompt",)),
    "eval.temperature": Case(1.0, 2.0, ("eval completion",)),
    "eval.top_k": Case(0, 1, ("eval completion",)),
    "eval.top_p": Case(1.0, 0.1, ("eval completion",)),
    "eval.min_p": Case(0.0, 1.0, ("eval completion",)),
    "run.time_limit": Case(0.0, 0.001, ("error",)),
    "log.every_steps": Case(1, 3, ("console", "train prompt"), {"total_steps": 3, "checkpoint.every_steps": 3}),
    "log.samples": Case(16, 3, ("train prompt",)),
    "log.sinks": Case(("jsonl", "tensorboard"), ("jsonl",), ("files",)),
    "log.entropy": Case(True, False, ("update", "metrics")),
}

# Further values, where the code that a key switches on lies outside of the loss.
MORE_CASES = [
    ("rollout.overlong", Case("keep", "mask", ("train update_steps", "metrics", "policy"))),
    (
        "rollout.overlong",
        Case(
            "keep",
            "soft",
            ("train rewards", *REWARDS, "policy"),
            {"reward.parts": ("format", "length"), "rollout.overlong_cache": 8},
        ),
    ),
    ("rollout.overlong_cache", Case(8, 24, ("train rewards", *REWARDS), {"reward.parts": ("format", "length")})),
    ("advantage.mean", Case("group", "leave_one_out", ("train advantage", "policy"))),
    ("advantage.std", Case("group", "batch", ("train advantage", "policy"))),
    ("loss.kl", Case("k3", "k1", ("train advantage", "metrics"), {"loss.kl_in": "reward"})),
    ("loss.kl_coef", Case(0.1, 0.2, ("train advantage", "policy"), {"loss.kl_in": "reward"})),
    ("loss.kl_coef", Case(0.1, 0.0, ("update", "metrics", "checkpoints"))),
    ("reference.every_updates", Case(1, 2, ("reference", "train ref_logps"), {"total_steps": 3})),
]


class EndOfRecording(Exception):
    """Ends a run all of whose programs have been recorded."""


class ProgramRecorder:
    """Keeps the lowered text of some programs of a run, up to the first update, before which each has been called."""

    def __init__(self, names: set[str], only_programs: bool):
        self.texts: dict[str, set[str]] = {name: set() for name in names}
        self.only_programs, self.is_done = only_programs, False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts recording functions in the place of those that the loop calls."""
        for name, module in PROGRAMS.items():
            if name != "update":
                patch.setattr(module, name, self.recording(name, getattr(module, name)))
        make_update = grpo_jax.run.train.make_update
        patch.setattr(grpo_jax.run.train, "make_update", lambda *args: self.recording("update", make_update(*args)))

    def recording(self, name, function):
        def record_and_call(*args, **kwargs):
            if name in self.texts and not self.is_done:
                self.texts[name].add(lowered_text(function, *args, **kwargs))
            self.is_done |= name == "update"
            if self.is_done and self.only_programs:
                raise EndOfRecording
            return function(*args, **kwargs)

        return record_and_call


def lowered_text(function, *args, **kwargs) -> str:
    """Returns the program that a jitted function is lowered to for these arguments.

    This is not `function.lower`, which puts descriptions of arrays into dataclasses where the annotations, which tests
    check, do not allow them.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)}

    def call(arrays):
        args, kwargs = tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return function(*args, **kwargs)

    return jax.jit(call).lower(arrays).as_text()


def fingerprint(path: Path) -> dict[str, str]:
    """Returns the dtype and a hash of each array of an item of a checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path.absolute()))
    return {
        jax.tree_util.keystr(name): f"{x.dtype} {hashlib.sha256(np.asarray(x).tobytes()).hexdigest()}"
        for name, x in leaves
    }


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns what a run has written, without what a clock measures: metrics, samples by field, and checkpoints."""
    seen: dict[str, Any] = {"metrics": [json.loads(line) for line in (workdir / "metrics.jsonl").open()]}
    for row in seen["metrics"]:
        for name in [name for name in row if re.search("^time/|_per_s$", name)]:
            del row[name]
    for kind in ("train", "eval"):
        files = {path.name: path.open(encoding="utf-8") for path in (workdir / "samples").glob(f"{kind}-*.jsonl")}
        records = [(name, json.loads(line)) for name, lines in sorted(files.items()) for line in lines]
        for field in records[0][1]:
            seen[f"{kind} {field}"] = [(name, record[field]) for name, record in records]
    seen["files"] = sorted(path.name for path in workdir.iterdir())
    checkpoints = {path.name: path for path in (workdir / "checkpoints").iterdir()}
    seen["checkpoints"] = sorted(checkpoints)
    last = checkpoints[max(filter(str.isdigit, checkpoints), key=int)]
    seen["policy"] = fingerprint(last / "policy")
    if "reference" in checkpoints:
        replaced = last / "reference"
        seen["reference"] = fingerprint(replaced if replaced.exists() else checkpoints["reference"])
    return seen


def fill_disk(patch) -> None:
    """Makes the second of a run's saves fail."""
    save, saves = CheckpointStore.save, []

    def save_or_fail(*args):
        saves.append(args)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args)

    patch.setattr(CheckpointStore, "save", save_or_fail)


def run(workdir: Path, values: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Runs `main` with the given values of keys and returns what is wanted, among other things that can be seen."""
    recorder = ProgramRecorder(wanted & PROGRAMS.keys(), wanted <= PROGRAMS.keys())
    flags = [
        f"--config.{name}={json.dumps(value) if isinstance(value, tuple) else value}" for name, value in values.items()
    ]
    console, error = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(console):
        recorder.install(patch)
        if "checkpoint.retry_s" in values:
            fill_disk(patch)
        try:
            main([f"--config={REPO}/configs/r1zero.py", f"--workdir={workdir}", *flags])
        except EndOfRecording:
            return dict(recorder.texts)
        except (UserError, RunStopped) as user_error:
            error = str(user_error)
    lines = re.sub(r"[\d,]+ tokens/s +[\d.]+ s|(Wrote|Training in) .*", "", console.getvalue())
    # There are no files if the run was refused, and no metrics if it has stopped before its first line.
    written = read_run(workdir) if (workdir / "metrics.jsonl").exists() else {}
    return {**recorder.texts, **written, "console": lines, "error": error}


FUNCTIONS = """
import time

from grpo_jax.text.problem import Problem

def successor(index, *, seed, split):
    return Problem(f"What follows {index}?", str(index + 1))

def brevity(problems, texts, lengths):
    return -lengths

def hesitant(problems, texts, lengths):
    time.sleep(1.5 * (len(texts[0]) % 4 == 0))
    return 1 + lengths
"""


@pytest.fixture(scope="module")
def observe(tmp_path_factory):
    """Returns a function from the values of keys to what can be seen of a run with them. Equal runs are made once."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, number in (("a", 3), ("b", 4), ("c", 5)):
        problems = [{"question": f"What is {n} + {number}?", "answer": n + number} for n in range(100)]
        for problem in problems:
            answer = problem["answer"]
            problem |= {"twist": f"Now {problem['question']}", "twice": 2 * answer, "offers": [answer, answer + 1]}
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
    (folder / "unreadable.jsonl").write_text(
        "".join(f"{json.dumps(problem | {'answer': ''})}\n" for problem in problems[:9])
    )
    with (folder / "unreadable.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(problem)}\n" for problem in problems)
    long = [{"question": f"What is {n} + 1?{'?' * (n % 4 * 10)}", "answer": n + 1} for n in range(100)]
    (folder / "long.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in long))
    (folder / "template.txt").write_text("Question: {question}\nAnswer:")
    shutil.copytree(find_model("tiny"), folder / "model")
    model_config = folder / "model" / "config.json"
    model_config.write_text(json.dumps(json.loads(model_config.read_text()) | {"rms_norm_eps": 1e-3}))
    shutil.copytree(find_model("tiny"), folder / "blank")  # in which digits are white space
    tokenizer = json.loads((folder / "blank" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for digit, blank in zip("123456789", "ĉĊċČčĜĝĞğ", strict=True):
        vocabulary[digit], vocabulary[blank] = vocabulary[blank], vocabulary[digit]
    (folder / "blank" / "tokenizer.json").write_text(json.dumps(tokenizer))
    runs: dict[str, dict[str, Any]] = {}

    def observe(values: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
        text = json.dumps(BASE | values, sort_keys=True).replace("FOLDER", str(folder))
        if text == json.dumps(BASE, sort_keys=True):
            wanted = wanted | {*PROGRAMS, "metrics"}  # for later calls
        if not wanted <= runs.get(text, {}).keys():
            values = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()}
            runs[text] = run(tmp_path_factory.mktemp("run") / "run", values, wanted)
        return runs[text]

    return observe


def test_every_key_has_a_case():
    assert {"job", *CASES} == set(key_specs(Config))


def test_a_run_can_be_repeated(observe, tmp_path):
    seen = observe({}, {"metrics"})
    assert run(tmp_path / "run", BASE, set(PROGRAMS) | {"metrics"}) == seen
    assert [name for name in seen if not seen[name]] == ["error"]


@pytest.mark.parametrize(
    "key, case",
    [*CASES.items(), *MORE_CASES],
    ids=lambda x: f"{x.value}-{x.other}" if isinstance(x, Case) else x,
)
def test_a_key_matters(key, case, observe):
    seen, other = (observe(case.given | {key: value}, set(case.changes)) for value in (case.value, case.other))
    assert [name for name in case.changes if seen[name] == other[name]] == []


def test_the_job_decides_which_keys_a_config_has(tmp_path):
    with pytest.raises(UserError, match=r"job='pretrain' must have the keys of config\.pretrain_default"):
        main([f"--config={REPO}/configs/r1zero.py", f"--workdir={tmp_path}", "--config.job=pretrain"])
