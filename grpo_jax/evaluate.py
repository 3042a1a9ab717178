"""Evaluates the policy of a run on held-out problems: the mean of each reward part, and the mean length in tokens."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.config.keys import flatten
from grpo_jax.config.workdir import changed_files, read_config, run_digests
from grpo_jax.errors import UserError
from grpo_jax.run.progress import announce, mute, phase


@phase("Starting")
def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.evaluate --workdir=runs/r1zero --questions=mine.jsonl --json", of_a_run=True
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        type=flags.path_flag,
        help="your own problems: JSON lines, JSON, CSV, parquet or a Hugging Face dataset, like task.path",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, raw, workdir, _ = flags.parse_flags(parser, argv)
    cfg = configs.check(raw)
    if not options.questions:
        check_held_out(cfg, workdir)

    # Imported here so that a mistake in the flags is reported without waiting for these imports.
    import jax

    from grpo_jax.parallel.compilation import keep_compiled_programs
    from grpo_jax.parallel.processes import join_processes
    from grpo_jax.rewards.parts import accuracy_part, resolve_parts
    from grpo_jax.rollout.sampler import place_for_rollout
    from grpo_jax.run.context import EVALUATION_KEY, build_context, read_base_model
    from grpo_jax.run.evaluation import evaluate
    from grpo_jax.run.metrics import evaluation_line
    from grpo_jax.run.policy import load_policy
    from grpo_jax.run.prompt_limit import fit_prompts
    from grpo_jax.run.stages import fold_in_all
    from grpo_jax.tasks.problem_file import read_with_notes
    from grpo_jax.tasks.problem_list import ProblemList
    from grpo_jax.tasks.streams import held_out_problems, make_task

    keep_compiled_programs(os.environ)
    reward_parts = resolve_parts(cfg)
    join_processes(os.environ)
    mute(jax.process_index() != 0)
    graded = accuracy_part in reward_parts.values()
    if options.questions:
        problems, note = read_with_notes(options.questions, cfg.task, graded=graded)
        task = ProblemList([], problems, [note])
    else:
        task = make_task(None, cfg, graded=graded)
    if jax.process_index() == 0:
        digests = run_digests(task, cfg.prompt.template)
        changed = [name for name in changed_files(workdir, digests) if name in digests]
        notes = [f"{', '.join(changed)} changed since the run was started."] if changed else []
        for note in [*getattr(task, "notes", ()), *notes]:
            announce(note, sys.stderr)
    base = read_base_model(cfg)
    cfg, task, prompt_lengths = fit_prompts(cfg, base, task)
    for line in prompt_lengths.splitlines()[:-1]:  # about prompts that are left out
        announce(line, sys.stderr)
    context = build_context(cfg, base, reward_parts=reward_parts)
    problems = task.held_out if options.questions else held_out_problems(task, cfg.eval.questions)
    with jax.set_mesh(context.mesh), closing(context.grader):
        step, params = load_policy(cfg, context, workdir, base=options.base, step=options.step)
        placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
        key = fold_in_all(jax.random.key(cfg.seed), EVALUATION_KEY, step)  # that of the run's own evaluation
        metrics, _ = evaluate(cfg, context, placed, problems, key)
    if options.json:
        announce(json.dumps({"step": step, "questions": len(problems)} | metrics))
    else:
        announce(
            f"{'Base model' if options.base else f'Policy after step {step}'}, {len(problems)} questions, "
            f"temperature {cfg.eval.temperature}: {evaluation_line(metrics)}"
        )


def check_held_out(cfg: configs.Config, workdir: Path) -> None:
    """Raises a UserError if the run in a workdir holds out no problems, so that it may have trained on all of them."""
    run = flatten(read_config(workdir).to_dict()) if (workdir / "config.json").is_file() else {}
    if 0 in (cfg.eval.questions, run.get("eval.questions")):
        raise UserError(
            f"An evaluation needs held-out problems, but the run in {workdir} has none, because its eval.questions is "
            "0. Pass --questions=FILE."
        )


if __name__ == "__main__":
    flags.run_entry_point(main)
