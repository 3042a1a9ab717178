"""The loop: a resumed run equals an uninterrupted one, files are as documented, and rewards alone teach."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import grpo_jax.run.train
from grpo_jax.errors import UserError
from grpo_jax.main import main

REPO = Path(__file__).parent.parent
FEW = [
    "--config.rollout.prompts=4",
    "--config.rollout.samples=4",
    "--config.rollout.max_tokens=14",
    "--config.eval.questions=8",
    "--config.log.every_steps=1",
    "--config.log.samples=3",
    "--config.loss.kl_coef=0.1",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
]


def train(workdir, *extra):
    main(["--config=configs/r1zero.py", f"--workdir={workdir}", *FEW, *extra])


def lines(workdir):
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = lambda name: name.startswith("time/") or name.endswith("_per_s")
    return [{name: value for name, value in row.items() if not clock(name)} for row in rows]


def saved(workdir, step, item):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoints" / str(step) / item).absolute())


def test_resume_equals_uninterrupted(tmp_path, monkeypatch):
    """Stopped after 3 of 5 updates, in the middle of a rollout that feeds 4 of them (2 minibatches, 2 epochs)."""
    monkeypatch.chdir(REPO)
    several = ["--config.train.minibatches=2", "--config.train.epochs=2", "--config.checkpoint.every_steps=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, *several, "--config.total_steps=5")
    train(broken, *several, "--config.total_steps=3")
    # As if it had gone on to step 4 and been killed before the next checkpoint.
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/mean": 9}\n{"step": 5, "rew')
    train(broken, *several, "--config.total_steps=5")

    for item in ("policy", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, saved(whole, 5, item), saved(broken, 5, item))
    changed = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), saved(whole, 5, "policy"), saved(whole, 3, "policy")
    )
    assert max(jax.tree.leaves(changed)) > 1e-5
    without_eval = lambda rows: [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows]
    assert without_eval(lines(broken)) == without_eval(lines(whole))
    assert [row["step"] for row in lines(broken)] == [0, 1, 2, 3, 4, 5]
    # The drift from the sampler is that of the rollout's first update; afterwards the policy has moved.
    assert len({row["policy/kl_sampler"] for row in lines(whole)[1:5]}) == 1
    assert lines(whole)[1]["policy/ratio_max"] < 1.0001 < lines(whole)[4]["policy/ratio_max"]


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    train(tmp_path / "run", "--config.total_steps=1")
    before = lines(tmp_path / "run")
    reference = saved(tmp_path / "run", "reference", "")
    capsys.readouterr()
    train(tmp_path / "run", "--config.total_steps=1")
    assert lines(tmp_path / "run") == before
    assert "before" in capsys.readouterr().out
    # The reference is the base, the policy has left it.
    jax.tree.map(np.testing.assert_array_equal, reference, saved(tmp_path / "run", "reference", ""))
    policy = saved(tmp_path / "run", 1, "policy")
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), reference, policy)))


def test_a_run_stops_after_updates_that_are_not_finite(tmp_path, monkeypatch):
    """Two may be left out; between step 1, left out, and steps 3 and 4 is one that is fine, and counts from 0 again."""
    monkeypatch.chdir(REPO)
    calls, pack_batch = [], grpo_jax.run.train.pack_batch

    def broken(*args):
        calls.append(args)
        batch = pack_batch(*args)
        return batch if len(calls) == 2 else batch.replace(advantages=batch.advantages * np.nan)

    monkeypatch.setattr("grpo_jax.run.train.pack_batch", broken)
    with pytest.raises(
        UserError, match="2 updates in a row, the last one step 4; the policy has not changed since step 2"
    ):
        train(
            tmp_path / "run",
            "--config.total_steps=9",
            "--config.optim.max_skips=2",
            "--config.loss.kl_coef=0",
            "--config.checkpoint.every_steps=1",
        )
    assert [row["optim/skipped"] for row in lines(tmp_path / "run")[1:]] == [1, 0, 1, 1]
    policies = [saved(tmp_path / "run", step, "policy") for step in (3, 4)]
    jax.tree.map(np.testing.assert_array_equal, *policies)
    meta = json.loads((tmp_path / "run" / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert meta["skipped"] == 3 and meta["skipped_in_a_row"] == 2


NAMES = """reward/mean reward/accuracy reward/format rollout/length_mean rollout/truncated_frac rollout/tokens_per_s
groups/zero_variance_frac policy/kl_ref policy/kl_sampler policy/ratio_max policy/clip_frac policy/entropy loss/total
policy/logp_gap/mean policy/logp_gap/max optim/grad_norm optim/lr time/rollout_s time/reward_s time/update_s time/step_s""".split()


def test_a_workdir_holds_what_is_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    run, slots, generate = tmp_path / "run", [], grpo_jax.run.train.generate_rollout
    monkeypatch.setattr(
        "grpo_jax.run.train.generate", lambda *args, **how: slots.append(how["slots"]) or generate(*args, **how)
    )
    train(
        run,
        "--config.total_steps=2",
        "--config.eval.every_steps=1",
        "--config.loss.kl_coef=0",
        "--config.rollout.slots=6",
    )
    assert slots == [8, 8]  # two for each of the four shards of rows
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(name in row for row in rows for name in ("eval/accuracy", "eval/format", "eval/length_mean"))
    assert all(isinstance(row[name], float) for row in rows[1:] for name in NAMES)
    assert abs(rows[1]["policy/kl_sampler"]) < 1e-6 and abs(rows[1]["policy/ratio_max"] - 1) < 1e-3
    assert 0 < rows[1]["policy/logp_gap/mean"] < rows[1]["policy/logp_gap/max"] < 1e-3
    samples = [json.loads(line) for line in (run / "samples" / "train-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert samples[0].keys() >= {
        "step",
        "prompt_id",
        "sample_id",
        "prompt",
        "completion",
        "accuracy",
        "format",
        "advantage",
    }
    assert json.loads((run / "config.json").read_text())["rollout"]["prompts"] == 4
    assert any((run / "tensorboard").iterdir())
    assert not (run / "checkpoints" / "reference").exists()  # no KL, no reference


def test_rewards_alone_teach(tmp_path):
    """20 updates of 64 rows from the packaged base raise the mean reward by 0.4 (it starts at about 1.0 of 2)."""
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [
        sys.executable,
        "-m",
        "grpo_jax.main",
        "--config=configs/r1zero.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.rollout.prompts=8",
        "--config.total_steps=20",
        "--config.eval.questions=32",
    ]
    subprocess.run(command, check=True, cwd=REPO, env=environ, timeout=600, capture_output=True)
    rewards = [row["reward/mean"] for row in lines(tmp_path / "run")[1:]]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.4
