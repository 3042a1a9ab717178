"""Real runs are recomputed from their own files by `tests/outside`, which shares no code with the package.

This shows that every config key, random key and number reaches the place it is meant for. Units are tested elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import grpo_jax.run.train
from grpo_jax import generate, load, sample
from grpo_jax.main import main
from grpo_jax.run.context import EVALUATION_KEY, GENERATION_KEY, SAMPLING_KEY, SHUFFLING_KEY
from grpo_jax.weights.tokenizer import load_tokenizer

REPO = Path(__file__).parent.parent
BASE = REPO / "grpo_jax" / "tiny" / "base"
# The tiny base model sometimes solves the sums of three-digit numbers, in 44 to 46 tokens, and never the others.
SUMS = [(337, 304), (616, 235), (45, 6), (701, 971), (742, 660), (9, 9)]
SUMS += [(384, 315), (169, 473), (7, 8), (691, 498), (787, 934), (12, 34)]
# No key has a value with which ignoring the key would go unnoticed, such as a weight of 1. Slots are refilled, and an
# update has several micro-batches. Evaluation asks the questions of training, at the temperature of training.
COMMON = """
    rollout.prompts=5 rollout.samples=4 rollout.max_tokens=45 rollout.temperature=0.7 rollout.slots=8
    train.micro_tokens=128 train.chunk_tokens=64 optim.lr=2e-4 optim.b1=0.8 optim.b2=0.99
    optim.schedule=linear optim.warmup_steps=3 optim.decay_steps=12 optim.end_lr_fraction=0.1 optim.weight_decay=0.1
    optim.grad_clip=1.5 eval.questions=10 eval.temperature=0.7 log.every_steps=1 log.samples=-1
    mesh.data=2 mesh.fsdp=2 mesh.tensor=2 checkpoint.every_steps=1
""".split()
FLAGS = """
    reward.weights=1.0,0.5 train.minibatches=2 train.epochs=2 loss.kl_coef=0.5 loss.clip_low=0.1 loss.clip_high=0.3
    eval.every_steps=1
""".split()
SKIPPED_STEP, STOPPED_STEP, LAST_STEP = 2, 6, 8
# Together, these runs use every value of the settings of groups, advantages, loss and reference.
RECIPES = {
    "sequence": """
        reward.weights=1.0,0.5 rollout.overlong=soft rollout.overlong_cache=16 groups.equal=drop
        advantage.mean=leave_one_out advantage.std=batch advantage.ddof=1 advantage.eps=0.1 loss.ratio=sequence
        loss.aggregate=prompt loss.clip_low=0.003 loss.clip_high=0.004 loss.clip_dual=1.01 loss.kl=k2
        loss.kl_corrected=True loss.kl_coef=0.3 loss.entropy_coef=0.02 train.minibatches=4 reference.every_updates=3
        optim.eps=1e-4
    """,
    "difference": """
        reward.parts=["accuracy","format","length"] reward.weights=1.0,0.5,0.25 rollout.overlong=zero
        rollout.overlong_cache=16 advantage.mean=batch advantage.std=none loss.ratio=difference
        loss.clip_difference=0.01 loss.aggregate=constant loss.constant_length=30 loss.kl_in=reward loss.kl=k3
        loss.kl_coef=0.7 train.minibatches=2 train.epochs=2 reference.every_updates=3
    """,
    "sequence_token": """
        reward.weights=1.0,0.5 rollout.overlong=mask groups.equal=drop advantage.ddof=1 advantage.eps=0.05
        loss.ratio=sequence_token loss.aggregate=token loss.clip_low=0.003 loss.clip_high=0.002 loss.kl=k1
        loss.kl_corrected=True loss.kl_coef=0.2 train.minibatches=4
    """,
    "detached": """
        reward.weights=1.0,0.5 rollout.overlong=mask advantage.mean=batch advantage.std=batch loss.ratio=detached
        loss.aggregate=prompt loss.clip_high=0.05 loss.kl_coef=0 train.minibatches=4 optim.eps=1e-3
    """,
    "reward": """
        rollout.samples=2 rollout.prompts=10
        reward.weights=1.0,0.5 groups.equal=drop advantage.mean=leave_one_out advantage.std=group advantage.eps=0.1
        loss.aggregate=constant loss.constant_length=45 loss.clip_low=0.05 loss.clip_high=0.1 loss.clip_dual=1.2
        loss.kl_in=reward loss.kl=k1 loss.kl_coef=0.1 train.minibatches=4 reference.every_updates=4
    """,
}


# A task that asks SUMS, for training and evaluation alike.
TASK = f"""
from grpo_jax.tasks import Problem

SUMS = {SUMS}


def ask(index, *, seed, split):
    a, b = SUMS[(5 * index + seed) % len(SUMS)]
    return Problem(f"What is {{a}} + {{b}}?", str(a + b), dict(a=a, b=b))
"""


@pytest.fixture
def train(tmp_path):
    """Returns a function that trains on SUMS with the given flags and returns the workdir."""
    task, workdir = tmp_path / "sums.py", tmp_path / "run"
    task.write_text(TASK)

    def train(*flags):
        keys = (f"--config.{key}" for key in (*COMMON, f"task.name={task}:ask", *flags))
        main([f"--config={REPO}/configs/r1zero.py", f"--workdir={workdir}", *keys])
        return workdir

    return train


def train_with_a_skip_and_a_stop(train, folder, monkeypatch):
    """Trains for two rollouts of four updates, with a skipped update, a lost checkpoint and a resume.

    The gradient of step 2 is not finite. The run stops after step 6, loses its last checkpoint, and resumes with
    checkpoint.keep=3.

    Returns:
        (workdir, kept): The workdir, where the older checkpoints have been put back, and the names of those kept.
    """
    take_rows, taken, saved = grpo_jax.run.train.take_rows, [], folder / "saved"

    def take_rows_with_nan(*args):
        taken.append(take_rows(*args))
        scale = np.nan if len(taken) == SKIPPED_STEP else 1
        return taken[-1].replace(advantages=taken[-1].advantages * scale)

    monkeypatch.setattr(grpo_jax.run.train, "take_rows", take_rows_with_nan)
    workdir = train(*FLAGS, f"total_steps={STOPPED_STEP}", "checkpoint.keep=100")
    shutil.copytree(workdir / "checkpoints", saved, copy_function=os.link)
    shutil.rmtree(workdir / "checkpoints" / str(STOPPED_STEP))
    train(*FLAGS, f"total_steps={LAST_STEP}", "checkpoint.keep=3")
    kept = sorted(os.listdir(workdir / "checkpoints"))
    for step in set(os.listdir(saved)) - set(kept):
        (saved / step).rename(workdir / "checkpoints" / step)
    return workdir, kept


def recompute_run(workdir):
    """Returns the comparisons that `tests.outside.run` prints."""
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.outside.run", str(workdir), str(BASE)]
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def count_redrawn(workdir):
    """Draws the completions of the second rollout again from their ids, with the policy and keys that the docs name.

    Returns:
        (equal, total): How many are the same, and how many there are.
    """
    lines = (workdir / "samples" / "train-000005.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    tokenizer, model_cfg = load_tokenizer(BASE), load(BASE)[0]
    with ocp.StandardCheckpointer() as checkpointer:
        params = jax.tree.map(np.asarray, checkpointer.restore(workdir / "checkpoints" / "4" / "policy"))
    prompts = {record["prompt_id"]: tokenizer(record["prompt"])["input_ids"] for record in records}
    rollout = sample(
        replace(model_cfg, tokenizer_vocab_size=len(tokenizer.get_vocab())),
        params,
        list(prompts.values()),
        jax.random.fold_in(jax.random.fold_in(jax.random.key(0), SAMPLING_KEY), 1),  # seed, purpose, rollout
        samples=4,
        max_tokens=45,
        temperature=0.7,
        stop_ids=model_cfg.eos_ids,
        stop_strings=["</answer>"],
        prompt_ids=list(prompts),
    )
    tokens, lengths = np.asarray(rollout.tokens).reshape(len(records), -1), np.asarray(rollout.lengths).ravel()
    redrawn = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    return sum(again == record["tokens"] for again, record in zip(redrawn, records, strict=True)), len(records)


def check_redraw_command(workdir, capsys):
    """Draws the last completion of the second rollout and of an evaluation again, with the command that does it."""
    for file in ("train-000005", "eval-000006"):
        record = json.loads((workdir / "samples" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        name = f"{file}/{record['prompt_id']}/{record['sample_id']}"
        generate.main([f"--workdir={workdir}", f"--sample={name}", "--json"])  # raises SystemExit if it is another
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == record["tokens"]


def check_recomputation(workdir):
    """Raises an AssertionError that shows where a run differs from its recomputation, and returns its metrics."""
    comparisons, wrong = recompute_run(workdir), defaultdict(list)
    for line in comparisons:
        if not line["difference"] <= line["tolerance"]:
            wrong[line["topic"]].append(json.dumps(line))
    summary = [f"{topic}: {len(lines)} differ\n" + "\n".join(lines[:5]) for topic, lines in wrong.items()]
    assert not wrong, "\n".join(summary)
    topics = {line["topic"] for line in comparisons}
    assert topics == {"rollouts", "log-probs", "minibatches", "updates", "evaluations", "draws", "logs"}
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]


def test_a_run_agrees_with_its_recomputation_from_its_files(train, tmp_path, monkeypatch, capsys):
    """This is a single test, because a run takes long and every test worker would repeat it."""
    workdir, kept = train_with_a_skip_and_a_stop(train, tmp_path, monkeypatch)
    assert kept == ["6", "7", "8", "reference"]
    rows = check_recomputation(workdir)
    equal, total = count_redrawn(workdir)
    assert total - equal <= 2, f"{total - equal} of {total} differ"  # near-ties, decided by rounding on another mesh

    check_redraw_command(workdir, capsys)

    # No check passed trivially: some completions were truncated and some were not, and so on.
    assert [row["step"] for row in rows if row["optim/skipped"]] == [SKIPPED_STEP]
    for name in ("rollout/truncated_frac", "groups/zero_variance_frac", "reward/accuracy", "reward/format"):
        assert any(0 < row[name] < 1 for row in rows), name
    norms = [row["optim/grad_norm"] for row in rows if not row["optim/skipped"]]
    assert min(norms) < 1.5 < max(norms)  # optim.grad_clip
    assert max(row["policy/kl_ref"] for row in rows) > 0.05
    assert len({row["optim/lr"] for row in rows}) > 4


@pytest.mark.parametrize(
    "name", [name if name == "sequence" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_runs_with_other_settings_agree_with_their_recomputation(train, name):
    workdir = train(*RECIPES[name].split(), f"total_steps={LAST_STEP}", "checkpoint.keep=100")
    rows = check_recomputation(workdir)
    records = [json.loads(line) for file in workdir.glob("samples/train-*") for line in file.read_text().splitlines()]
    left_out = sum(not record["update_steps"] for record in records)
    assert 0 < left_out < len(records) or name == "difference"
    for metric in ("rollout/truncated_frac", "reward/accuracy", "reward/format"):
        assert any(0 < row[metric] < 1 for row in rows), metric
    assert min(row["policy/ess_frac"] for row in rows) < 0.9999


def test_no_two_uses_of_the_random_key_share_a_constant():
    """The run above shows when samples reuse evaluation keys, but not when a shuffle reuses the keys of samples."""
    assert len({SAMPLING_KEY, EVALUATION_KEY, SHUFFLING_KEY, GENERATION_KEY}) == 4
