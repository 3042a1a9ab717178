"""Renders the schema for the command line: the list of sections in `--help`, and the text of `--help=SECTION`."""

import dataclasses
import textwrap

from grpo_jax.config.functions import suggest
from grpo_jax.config.keys import KeySpec, format_as_flag, key_specs
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.config.rules import NO_EFFECT
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError


def phrase(part: dataclasses.Field) -> str:
    """Returns the meaning of a key, or of a section as its docstring gives it, without a full stop."""
    meaning = part.metadata["spec"].meaning if "spec" in part.metadata else str(type(part.default).__doc__)
    return meaning[0].upper() + meaning[1:].rstrip(".")


def describe_key(name: str, spec: KeySpec) -> tuple[str, str]:
    """Returns a key's type and allowed values, and its meaning followed by when it has no effect."""
    allowed = spec.allowed if spec.choices else ", ".join(filter(None, (type(spec.default).__name__, spec.allowed)))
    idle = " or ".join(f"{switch}={off}" for switch, offs, names in NO_EFFECT for off in offs if name in names)
    return allowed, spec.meaning + (f"; no effect while {idle}" if idle else "")


def explain(topic: str) -> str:
    """Returns the text of `--help=TOPIC`.

    Args:
        topic: A section or key of a training config, `all`, or `pretrain` for all keys of pretraining.

    Raises:
        UserError: There is no such topic.
    """
    config_class = PretrainConfig if topic == "pretrain" else Config
    lines: list[str] = []
    for part in dataclasses.fields(config_class):
        keys = {name: spec for name, spec in key_specs(config_class).items() if name.split(".")[0] == part.name}
        chosen = [name for name in keys if topic in ("all", "pretrain", name) or name.startswith(f"{topic}.")]
        if chosen and "spec" not in part.metadata:
            lines.append(f"{part.name}: {phrase(part)}")
        for name in chosen:
            allowed, meaning = describe_key(name, keys[name])
            lines.append(f"  {format_as_flag(name, keys[name].default)}  ({allowed})")
            lines.append(textwrap.fill(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if not lines:
        topics = [*(part.name for part in dataclasses.fields(Config)), "all", "pretrain"]
        hint = suggest(topic, [*topics, *key_specs(Config)], "--help={}") or f"Choose one of {', '.join(topics)}."
        raise UserError(f"--help=SECTION must name a section of the config; found {topic!r}. {hint}")
    return "\n".join(lines)


def list_topics() -> str:
    """Returns the part of `--help` that lists the sections and the top-level keys with their meanings."""
    topics = {part.name: phrase(part) for part in dataclasses.fields(Config)}
    topics |= {"all": "Every key of a training config", "pretrain": "Every key of a pretraining config"}
    lines = [f"  {name:<12}{meaning}" for name, meaning in topics.items()]
    return "\n".join(["config sections (--help=SECTION shows their keys):", *lines])
