"""Typed configs: every key with its meaning, default and allowed values, the check of a config, and the flags.

Modules, in reading order:

    keys         declares a config key as a typed dataclass field
    functions    imports the function that a config value names
    schema       all keys of training, one frozen dataclass per section
    pretrain_schema  all keys of pretraining, likewise
    other_names  what other trainers call our keys
    presets      helpers for config files: choosing a preset, and settings for models on the hub
    rules        checks a config before any device work and builds the frozen `Config`
    workdir      reads and writes a run's config.json, and decides which runs may be resumed
    help         renders the schema for `--help` and `--help=SECTION`
    docs         renders the schema as docs/config.md
    flags        parses the command line of every entry point

A config file is written with ml_collections and starts from `default()`:

    from grpo_jax import config

    def get_config(preset=""):
        cfg = config.default()
        cfg.train.minibatches = 4
        return cfg

`check` turns it into the frozen `Config` that the rest of the package reads.
"""

from grpo_jax.config.pretrain_schema import pretrain_default
from grpo_jax.config.rules import check, check_model
from grpo_jax.config.schema import Config, default
from grpo_jax.config.workdir import check_files, check_workdir, write_config

__all__ = [
    "Config",
    "check",
    "check_files",
    "check_model",
    "check_workdir",
    "default",
    "pretrain_default",
    "write_config",
]
