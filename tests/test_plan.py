"""Plans lower the programs that training runs, and refuse what they cannot plan."""

import jax
import pytest

import grpo_jax.learn.update
import grpo_jax.rollout.sampler
import grpo_jax.run.stages
import grpo_jax.run.train
from grpo_jax.config import check
from grpo_jax.config.flags import load_config, override_key
from grpo_jax.planning.inputs import plan_inputs
from grpo_jax.planning.programs import run_programs
from tests.test_presets import CONFIGS

# Several micro-batches, slots that are refilled, a cache that grows, and a rollout mesh that differs from the mesh.
KEYS = """
    rollout.prompts=4 rollout.samples=4 rollout.max_tokens=60 rollout.slots=8 rollout.mesh.tensor=2 train.micro_tokens=128
    mesh.data=2 mesh.fsdp=4 model.reference_dtype=bfloat16 total_steps=1 eval.questions=0
""".split()


def run_config(*keys):
    raw = load_config(f"{CONFIGS}/r1zero.py")
    for key in (*KEYS, *keys):
        override_key(raw, *key.split("=", 1))
    return raw


def test_a_plan_lowers_the_programs_of_a_run(monkeypatch, tmp_path):
    """The arguments that a real run passes to its jitted functions lower to the same text as those of the plan."""
    lowered = {}

    def record(module, name, label):
        function = getattr(module, name)

        def recorded(*args, **options):
            lowered[label(args) if callable(label) else label] = function.lower(*args, **options).as_text()
            return function(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    def recorded_factory(module, name, label):
        factory = getattr(module, name)

        def make(*args):
            function = factory(*args)

            def recorded(*inputs):
                lowered[label] = function.lower(*inputs).as_text()
                return function(*inputs)

            return recorded

        monkeypatch.setattr(module, name, make)

    record(grpo_jax.rollout.sampler, "init_decode", "prefill")
    record(grpo_jax.rollout.sampler, "decode_tokens", lambda args: f"decode {args[2].kv_cache[0].k.shape[-1]}")
    record(grpo_jax.run.stages, "score_completions", "scoring")
    recorded_factory(grpo_jax.rollout.sampler, "rollout_placement", "placement")
    recorded_factory(grpo_jax.run.train, "make_update", "update")
    raw = run_config("log.samples=0")
    grpo_jax.train(raw, workdir=tmp_path / "run")
    monkeypatch.undo()
    programs = run_programs(plan_inputs(check(raw), jax.devices(), memory_bytes=2**30))
    assert set(programs) <= set(lowered)
    assert set(programs) == {"placement", "prefill", "decode 128", "decode 140", "scoring", "update"}
    different = [name for name, lower in programs.items() if lower().as_text() != lowered[name]]
    assert different == []
