"""The console script `grpo-jax`, whose subcommands are the entry points: `grpo-jax train --workdir=runs/r1zero`."""

import importlib
import os
import sys
from collections.abc import Sequence

from grpo_jax.config.flags import run_entry_point
from grpo_jax.config.functions import suggest
from grpo_jax.errors import UserError

COMMANDS = {  # by name: the module of this package, which is only imported to run it, and what it does
    "train": ("main", "trains a model, or resumes a run"),
    "evaluate": ("evaluate", "evaluates the policy of a run on held-out problems, or on your own"),
    "generate": ("generate", "samples a completion from the policy of a run"),
    "export": ("export", "writes the policy of a run as a Hugging Face folder"),
    "check": ("check", "checks whether the checkpoints of a run are undamaged"),
    "plan": ("plan", "estimates whether a run fits on hardware that you do not have, and how fast it is"),
    "report": ("report", "writes a report of one or more runs as an HTML page"),
    "help": ("", "shows this help, or the flags of a subcommand (grpo-jax help train)"),
}


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand at the beginning of a command line, program name excluded.

    Raises:
        UserError: There is no such subcommand, or a flag is wrong.
    """
    name, *rest = argv or ["help"]
    if name in ("help", "-h", "--help"):
        if not rest:
            lines = [f"  {command:<10}{what}" for command, (_, what) in COMMANDS.items()]
            print("\n".join(["usage: grpo-jax SUBCOMMAND [FLAG ...]", "", "subcommands (SUBCOMMAND --help):", *lines]))
            return
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS or name == "help":
        hint = suggest(name, COMMANDS, "grpo-jax {}") or "Run grpo-jax --help."
        raise UserError(f"The subcommand must be one of {', '.join(COMMANDS)}; found {name!r}. {hint}")
    sys.argv[0] = f"grpo-jax {name}"  # the name of the program in --help
    importlib.import_module(f"grpo_jax.{COMMANDS[name][0]}").main(rest)


def run() -> None:
    """Runs the console script."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does: a config may name functions of modules in this folder
    run_entry_point(main)
