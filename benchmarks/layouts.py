"""Whether a completion depends on how it was drawn: slots, devices, refill. Prints one JSON line.

The same rollout is drawn in every layout (each number of --slots on each number of --devices) and compared with the first.
XLA does not give a row the same bits in another batch size, so where the two largest perturbed scores of a draw nearly
tie, another token may win; what follows then differs altogether.

sequences    in a rollout             layouts  compared, the first among them
differing    sequences that differ from the first layout's, summed over the others
near_ties    those whose first difference is a draw with a gap under 1e-3
unexplained  the rest: 0, or something is wrong
logp_gap     the largest |difference| of log-probabilities of tokens that are the same
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

NEAR = 1e-3


def main(argv: Sequence[str]) -> None:
    from grpo_jax.errors import UserError
    from grpo_jax.config.flags import OneLineParser

    parser = OneLineParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/layouts.py --model=smollm2 --slots=8,64 --devices=1,8",
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="what model.path may be")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--slots", type=numbers, default=[64, 8], metavar="N,N", help="default: 64,8")
    parser.add_argument("--devices", type=numbers, default=[1], metavar="N,N", help="default: 1; virtual ones on a CPU")
    for name, value in (("prompts", 16), ("samples", 4), ("prompt_tokens", 32), ("new_tokens", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if name not in ("model", "seed") and min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"expected --{name} of 1 or more; found {value}")
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")  # of CPUs alone
        + f" --xla_force_host_platform_device_count={max(flags.devices)}"
    )
    print(json.dumps({"model": flags.model} | compare(flags)))


def compare(flags) -> dict:
    """The counts of the module's docstring."""
    import jax
    import numpy as np

    from grpo_jax.errors import UserError
    from grpo_jax.parallel.mesh import make_mesh
    from grpo_jax.rollout.sampler import generate_rollout, pad_prompts, place_for_rollout
    from grpo_jax.text.stops import build_stop_table
    from grpo_jax.weights.model_io import load
    from grpo_jax.weights.source import find_model

    if max(flags.devices) > jax.device_count():
        raise UserError(f"expected --devices of at most {jax.device_count()}; found {max(flags.devices)}")
    key, first = jax.random.key(flags.seed), None
    found = {
        "sequences": flags.prompts * flags.samples,
        "layouts": 0,
        "differing": 0,
        "near_ties": 0,
        "unexplained": 0,
        "logp_gap": 0.0,
    }
    for devices in flags.devices:
        mesh = make_mesh(fsdp=-1, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            model_cfg, params = load(find_model(flags.model), mesh=mesh)
            if flags.prompt_tokens + flags.new_tokens > model_cfg.max_positions:
                raise UserError(
                    f"expected prompt_tokens + new_tokens of at most {model_cfg.max_positions} positions; "
                    f"found {flags.prompt_tokens} + {flags.new_tokens}"
                )
            shape = flags.prompts, flags.prompt_tokens
            tokens = np.random.default_rng(flags.seed).integers(model_cfg.sampleable_vocab_size, size=shape)
            placed = place_for_rollout(model_cfg, params, mesh)
            for slots in flags.slots:
                drawn = jax.device_get(
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
                found["layouts"] += 1
                print(f"{devices} device(s), {slots} slots", file=sys.stderr)
                first = drawn if first is None else first
                count(model_cfg, params, tokens, key, first, drawn, found)
    return found


def count(cfg, params, tokens, key, first, drawn, found: dict) -> None:
    """Adds what differs between two rollouts to `found`."""
    import jax
    import numpy as np

    from grpo_jax.model.decoder import forward
    from grpo_jax.rollout.draws import runner_up_margin

    same = np.cumprod(first.tokens == drawn.tokens, axis=-1).astype(bool)
    found["logp_gap"] = max(found["logp_gap"], float(np.abs(first.logps - drawn.logps)[same].max(initial=0.0)))
    for b, g in np.argwhere(~same[..., -1]):
        t = int(same[b, g].sum())
        row = np.concatenate([tokens[b], first.tokens[b, g, :t]])[None]
        logits = forward(cfg, params, row)[:, -1]
        draw_key = key
        for counter in (int(b), int(g), t):
            draw_key = jax.random.fold_in(draw_key, counter)
        near = float(runner_up_margin(draw_key[None], logits)[0]) < NEAR
        found["differing"] += 1
        found["near_ties" if near else "unexplained"] += 1


if __name__ == "__main__":
    from grpo_jax.config.flags import run_entry_point

    run_entry_point(main)
