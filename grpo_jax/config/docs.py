"""Renders the schema as docs/config.md: `python -m grpo_jax.config.docs > docs/config.md`."""

import itertools
import operator

from grpo_jax.config.help import describe_key
from grpo_jax.config.keys import key_specs
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.config.schema import Config

INTRO = """# Config keys

<!-- Written by `python -m grpo_jax.config.docs > docs/config.md` from schema.py and pretrain_schema.py in
grpo_jax/config/; edit these files. -->

This page lists every config key with its default, allowed values and meaning. A config file sets a key by
`cfg.section.key = value`, the command line by `--config.section.key=value`. Keys with a star may change when a run is
resumed. A key must keep its default where it has no effect."""


def markdown() -> str:
    """Returns the contents of docs/config.md."""
    lines = [INTRO]
    for title, config_class in (("Training", Config), ("Pretraining", PretrainConfig)):
        lines += ["", f"## {title}"]
        specs = key_specs(config_class)
        for section, names in itertools.groupby(specs, key=lambda name: name.rpartition(".")[0]):
            if section:
                lines += ["", f"### `{section}`", "", f"{type(operator.attrgetter(section)(config_class)).__doc__}"]
            lines += ["", "| key | default | allowed | meaning |", "|---|---|---|---|"]
            for name in names:
                allowed, meaning = describe_key(name, specs[name])
                star = " \\*" if specs[name].resumable else ""
                lines.append(f"| `{name}`{star} | `{specs[name].default!r}` | {allowed} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
