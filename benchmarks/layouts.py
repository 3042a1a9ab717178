"""Checks that completions do not depend on how they are decoded: slots, devices, refill. Prints one JSON line.

Samples the same rollout in every layout (each number of --slots on each number of --devices) and compares it with the
first layout. XLA does not compute a row bit for bit alike in batches of different sizes, so where the two largest
perturbed scores of a draw nearly tie, rounding may select another token, after which the completions diverge.

sequences    number of sequences in the rollout
layouts      number of layouts, including the first
differing    sequences that differ from those of the first layout, summed over the other layouts
near_ties    differing sequences whose first difference is a draw with a margin below 1e-3
unexplained  all other differing sequences; anything but 0 is a bug
logp_gap     largest absolute difference of the log-probabilities before the first difference
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

NEAR_TIE_MARGIN = 1e-3


def parse_integers(text: str) -> list[int]:
    """Parses a comma-separated list of integers."""
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark. The modules that import JAX are imported after the number of devices is set."""
    from grpo_jax.config.flags import OneLineParser
    from grpo_jax.errors import UserError

    parser = OneLineParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/layouts.py --model=smollm2 --slots=8,64 --devices=1,8",
    )
    lists = dict(type=parse_integers, metavar="N,N")
    parser.add_argument("--model", metavar="FOLDER", required=True, help="the model, given like model.path")
    parser.add_argument("--slots", default=[64, 8], help="numbers of decode slots; default: 64,8", **lists)
    parser.add_argument("--devices", default=[1], help="numbers of devices, virtual on a CPU; default: 1", **lists)
    for name, value in (("prompts", 16), ("samples", 4), ("prompt_tokens", 32), ("new_tokens", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if name not in ("model", "seed") and min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name} must be at least 1; found {value}. Raise it.")
    devices_flag = f"--xla_force_host_platform_device_count={max(flags.devices)}"  # affects CPUs only
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices_flag}"
    print(json.dumps({"model": flags.model} | compare_layouts(flags)))


def compare_layouts(flags: argparse.Namespace) -> dict[str, float]:
    """Samples the rollout in every layout and returns the counts that the module's docstring explains."""
    import jax
    import numpy as np
    from common import check_positions

    from grpo_jax.errors import UserError
    from grpo_jax.parallel.mesh import make_mesh
    from grpo_jax.rollout.sampler import generate_rollout, pad_prompts, place_for_rollout
    from grpo_jax.text.stops import build_stop_table
    from grpo_jax.weights.reading import load
    from grpo_jax.weights.source import find_model

    if max(flags.devices) > jax.device_count():
        raise UserError(f"--devices may be at most {jax.device_count()} here; found {max(flags.devices)}. Lower it.")
    key, first = jax.random.key(flags.seed), None
    counts = {"sequences": flags.prompts * flags.samples, "layouts": 0}
    counts |= {"differing": 0, "near_ties": 0, "unexplained": 0, "logp_gap": 0.0}
    for devices in flags.devices:
        mesh = make_mesh(fsdp=-1, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            model_cfg, params = load(find_model(flags.model), mesh=mesh)
            check_positions(flags, model_cfg)
            shape = flags.prompts, flags.prompt_tokens
            tokens = np.random.default_rng(flags.seed).integers(model_cfg.sampleable_vocab_size, size=shape)
            placed = place_for_rollout(model_cfg, params, mesh)
            for slots in flags.slots:
                rollout = jax.device_get(
                    generate_rollout(
                        model_cfg,
                        placed,
                        pad_prompts(tokens.tolist()),
                        key,
                        samples=flags.samples,
                        max_tokens=flags.new_tokens,
                        temperature=1.0,
                        stop_table=build_stop_table(model_cfg.vocab_size, ()),
                        slots=slots,
                    )
                )
                counts["layouts"] += 1
                print(f"{devices} device(s), {slots} slots", file=sys.stderr)
                first = rollout if first is None else first
                count_differences(model_cfg, params, tokens, key, first, rollout, counts)
    return counts


def runner_up_margin(keys, logits):
    """Returns how close each draw of `draw_tokens` came to another outcome, as one number per row.

    This is the gap between the two largest perturbed scores, in the stage where it is smaller. Rounding errors in the
    logits below half the gap cannot change the token.
    """
    import jax
    import jax.numpy as jnp

    from grpo_jax.rollout.draws import gumbel_noise, split_into_blocks

    block_noise, token_noise = gumbel_noise(keys, logits.shape[-1])
    blocks = split_into_blocks(logits, token_noise.shape[-1])
    block_scores = jax.nn.logsumexp(blocks, axis=-1) + block_noise
    block = jnp.argmax(block_scores, axis=-1)
    token_scores = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0] + token_noise

    def top_two_gap(scores):
        return -jnp.diff(jax.lax.top_k(scores, 2)[0], axis=-1)[:, 0] if scores.shape[-1] > 1 else jnp.inf

    return jnp.minimum(top_two_gap(block_scores), top_two_gap(token_scores))


def count_differences(model_cfg, params, prompts, key, first, other, counts: dict[str, float]) -> None:
    """Adds the differences between two rollouts of the same prompts and key to `counts`."""
    import jax
    import numpy as np

    from grpo_jax.model.decoder import forward

    same = np.cumprod(first.tokens == other.tokens, axis=-1).astype(bool)
    logp_gap = float(np.abs(first.logps - other.logps)[same].max(initial=0.0))
    counts["logp_gap"] = max(counts["logp_gap"], logp_gap)
    for b, g in np.argwhere(~same[..., -1]):
        t = int(same[b, g].sum())
        sequence = np.concatenate([prompts[b], first.tokens[b, g, :t]])[None]
        logits = forward(model_cfg, params, sequence)[:, -1]
        token_key = key
        for counter in (int(b), int(g), t):
            token_key = jax.random.fold_in(token_key, counter)
        margin = float(runner_up_margin(token_key[None], logits)[0])
        counts["differing"] += 1
        counts["near_ties" if margin < NEAR_TIE_MARGIN else "unexplained"] += 1


if __name__ == "__main__":
    from grpo_jax.config.flags import run_entry_point

    run_entry_point(main)
