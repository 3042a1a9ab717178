"""Trains for one update and plans the same run, and prints the digests of the programs that each of them lowers.

It also prints the names of all programs that are compiled.

`python -m tests.lowered WORKDIR KEY=VALUE ...` runs in a process of its own: annotations that are checked at run time
refuse the placeholders that lowering puts into a `DecodeState`.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import jax

import grpo_jax.learn.update
import grpo_jax.rollout.sampler
import grpo_jax.run.stages
import grpo_jax.run.train
from grpo_jax.config import check
from grpo_jax.config.flags import load_config, override_key
from grpo_jax.planning.inputs import plan_inputs
from grpo_jax.planning.programs import run_programs

CONFIG = Path(__file__).parent.parent / "configs" / "r1zero.py"


def digest(lowered) -> str:
    return sha256(lowered.as_text().encode()).hexdigest()


def record(module, name, label, digests):
    """Replaces a jitted function with one that also stores the digests of what its arguments lower to."""
    function = getattr(module, name)

    def recorded(*args, **options):
        digests.setdefault(label(*args), set()).add(digest(function.lower(*args, **options)))
        return function(*args, **options)

    setattr(module, name, recorded)


def record_factory(module, name, label, digests):
    """Replaces a function that returns a jitted function."""
    factory = getattr(module, name)

    def make(*args):
        function = factory(*args)

        def recorded(*inputs):
            digests.setdefault(label, set()).add(digest(function.lower(*inputs)))
            return function(*inputs)

        return recorded

    setattr(module, name, make)


def main(workdir, *keys):
    raw = load_config(str(CONFIG))
    for key in keys:
        override_key(raw, *key.split("=", 1))
    programs = run_programs(plan_inputs(check(raw), jax.devices(), memory_bytes=2**30)[0])
    planned = {name: digest(lower()) for name, lower in programs.items()}
    lowered, compiled = {}, []

    def listen(event: str, seconds: float, **details) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    record(grpo_jax.rollout.sampler, "init_decode", lambda *_: "prefill", lowered)
    record(
        grpo_jax.rollout.sampler, "decode_tokens", lambda *args: f"decode {args[2].kv_cache[0].k.shape[-1]}", lowered
    )
    record(grpo_jax.run.stages, "score_completions", lambda *_: "scoring", lowered)
    record_factory(grpo_jax.rollout.sampler, "rollout_placement", "placement", lowered)
    record_factory(grpo_jax.run.train, "make_update", "update", lowered)
    grpo_jax.train(raw, workdir=workdir)
    run = {name: sorted(found) for name, found in lowered.items()}
    print(json.dumps({"planned": planned, "run": run, "compiled": sorted(compiled)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
