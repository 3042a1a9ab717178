"""Checks the checkpoints of a run: whether everything that a resumed run reads is still what was saved.

Reads all checkpoints and changes nothing. The exit code is 0 if all of them are sound and 3 if not.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.config import flags
from grpo_jax.config.workdir import read_config
from grpo_jax.errors import UserError
from grpo_jax.run.progress import announce, phase


@phase("Reading the checkpoints")
def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(__doc__, "python -m grpo_jax.check --workdir=runs/r1zero")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if not options.workdir:
        raise UserError("--workdir=DIR must be given; found none. Run with --help for an example.")
    workdir = Path(options.workdir)
    read_config(workdir)  # raises a UserError unless it is the folder of a run

    # Imported here so that a mistake in the flags is reported without waiting for these imports.
    from grpo_jax.run.checkpoint import checkpoints_folder, damage_of, initial_reference_damage, saved_steps

    damage = {str(step): damage_of(workdir, step) for step in saved_steps(workdir)}
    reference = initial_reference_damage(workdir)
    if reference is not None:
        damage["reference"] = reference
    aside = sorted(path.name for path in checkpoints_folder(workdir).glob("damaged-*"))
    if options.json:
        announce(json.dumps({"sound": not any(damage.values()), "damage": damage, "aside": aside}))
    else:
        for name, text in damage.items():
            label = "The initial reference" if name == "reference" else f"The checkpoint of step {name}"
            announce(f"{label} is {f'damaged: {text}' if text else 'sound'}.")
        for name in aside:
            announce(f"{name} was found to be damaged earlier and is not used.")
        if not damage:
            announce(f"The run in {workdir} has not saved a checkpoint yet.")
    if any(damage.values()):
        sys.exit(3)


if __name__ == "__main__":
    flags.run_entry_point(main)
