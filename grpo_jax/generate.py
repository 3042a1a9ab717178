"""Samples a completion from the policy of a run and prints it as it is sampled, or draws a recorded one again."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.errors import UserError
from grpo_jax.run.progress import phase
from grpo_jax.text.terminal import printable


def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        f"{__doc__} The same prompt gives the same completion; --config.seed=1 gives another.",
        'python -m grpo_jax.generate --workdir=runs/r1zero --prompt="What is 347 + 589?"',
        of_a_run=True,
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the question, which is inserted into prompt.template")
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy; default: rollout.temperature; eval.top_k, top_p, min_p apply"
    )
    parser.add_argument(
        "--sample",
        metavar="STEP/PROMPT_ID/SAMPLE_ID",
        help="draw this record of samples/train-STEP.jsonl again; for an evaluation, eval-STEP/PROMPT_ID/SAMPLE_ID",
    )
    parser.add_argument("--json", action="store_true", help="with --sample: print one JSON object")
    options, raw, workdir, _ = flags.parse_flags(parser, argv)
    if options.sample:
        for flag, value in (("--prompt", options.prompt), ("--temperature", options.temperature)):
            if value is not None:
                raise UserError(f"{flag} has no effect with --sample; found {value!r}. Leave out one of them.")
        if options.base or options.step is not None:
            raise UserError("--sample determines the policy; found --base or --step too. Leave it out.")
        cfg = configs.check(raw)
        configs.check_workdir(workdir, cfg)
        show_sample(cfg, workdir, options.sample, as_json=options.json)
        return
    if not options.prompt:
        raise UserError('--prompt must hold a question; found none. Pass --prompt="What is 347 + 589?".')
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        raise UserError(f"--temperature must be a number of 0 or more; found {options.temperature}. Pass 0 for greedy.")
    with contextlib.suppress(AttributeError, TypeError):  # `check` reports a config without these keys
        # So that eval.top_k, eval.top_p and eval.min_p are checked at the temperature that is used here.
        raw.eval.temperature = raw.rollout.temperature if options.temperature is None else options.temperature
    show_completion(configs.check(raw), workdir, options.prompt, base=options.base, step=options.step)


# The following functions import what needs JAX, so that a mistake in the flags is reported without waiting for it.


@phase("Importing JAX")
def prepare_devices() -> None:
    """Turns on the compilation cache.

    Raises:
        UserError: The process is one of several.
    """
    from grpo_jax.parallel.compilation import keep_compiled_programs
    from grpo_jax.parallel.processes import is_multiprocess

    keep_compiled_programs(os.environ)
    if is_multiprocess(os.environ):
        raise UserError("generate runs in one process; found the variables of several. Start it on its own.")


def show_completion(cfg: configs.Config, workdir: Path, question: str, *, base: bool, step: int | None) -> None:
    """Samples a completion from a policy of a run (see `load_policy`) and prints it as it is sampled."""
    prepare_devices()

    import jax

    from grpo_jax.rollout.sampler import place_for_rollout
    from grpo_jax.run.context import GENERATION_KEY, build_context, read_base_model
    from grpo_jax.run.generation import stream_completion
    from grpo_jax.run.policy import load_policy
    from grpo_jax.run.prompt_limit import fit_prompts
    from grpo_jax.tasks.problem_list import ProblemList
    from grpo_jax.text.problem import Problem

    model = read_base_model(cfg)
    cfg, _, _ = fit_prompts(cfg, model, ProblemList([], [Problem(question, "", id="--prompt")]))
    context = build_context(cfg, model)
    with jax.set_mesh(context.mesh):
        _, params = load_policy(cfg, context, workdir, base=base, step=step)
        placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
        with jax.set_mesh(context.rollout_mesh):
            key = jax.random.fold_in(jax.random.key(cfg.seed), GENERATION_KEY)
            pieces = stream_completion(cfg, context, placed, question, key)
            with phase("Starting the completion"):
                first = next(pieces)
            for piece in itertools.chain([first], pieces):
                print(printable(piece), end="", flush=True)
    print()


def show_sample(cfg: configs.Config, workdir: Path, text: str, *, as_json: bool) -> None:
    """Draws a recorded sample again and prints it; exits with code 3 if its tokens are not the recorded ones."""
    from grpo_jax.run.redraw import describe_redrawn, parse_sample_name, redraw_sample

    name = parse_sample_name(text)
    prepare_devices()
    drawn, note = redraw_sample(cfg, workdir, name)
    if note:
        print(printable(note), file=sys.stderr)
    if as_json:
        fields = drawn._asdict() | {"equal": drawn.first_difference is None, "largest_gap": drawn.largest_gap()}
        print(json.dumps({"sample": text, "policy_step": name.policy_step} | fields))
    else:
        policy = f"the policy after step {name.policy_step}" if name.policy_step else "the base model"
        print(printable(f"Drawn again by {policy}: {drawn.record['question']}\n{describe_redrawn(cfg, drawn)}"))
    if drawn.first_difference is not None:
        sys.exit(3)


if __name__ == "__main__":
    flags.run_entry_point(main)
