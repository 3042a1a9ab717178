"""Trains your own model on your own problems, and derives everything else from the two and from the machine.

    python -m grpo_jax.main --config=configs/own.py --workdir=runs/own \
        --config.model.path=FOLDER --config.task.path=FILE

Add --dry-run to see what is derived, three prompts, three expected answers and one group of completions; it writes
nothing. Every key may be set with --config.KEY=VALUE, and the other keys are then derived from what you set.
docs/own.md says how keys are derived. Running the same command again resumes the run with its own values.
"""

from grpo_jax import config


def get_config(preset: str = ""):
    """Returns a config without a model and without problems, whose other keys a new run derives."""
    cfg = config.default()
    cfg.derive = True
    cfg.model.path, cfg.task.name = "", "file"
    return cfg
