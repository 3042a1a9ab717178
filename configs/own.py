"""Trains your own model on your own problems, and derives everything else from them and from the machine.

    python -m grpo_jax.main --config=configs/own.py --workdir=runs/own \
        --config.model.path=FOLDER --config.task.path=FILE

Add --dry-run to see what is derived, three prompts, three expected answers and one group of completions; it writes
nothing. --config.KEY=VALUE sets a key, and the rules for the other keys use its value. docs/own.md lists the rules.
Running the same command again resumes the run with its own values.
"""

from grpo_jax import config


def get_config(preset: str = ""):
    """Returns a config that lacks a model and problems, and whose other keys a new run derives."""
    cfg = config.default()
    cfg.derive = True
    cfg.model.path, cfg.task.name = "", "file"
    return cfg
