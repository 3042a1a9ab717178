"""Declares config keys: dataclass fields that carry a default, a meaning and the allowed values."""

import dataclasses
import json
import operator
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

BOUNDS = {"at_least": operator.ge, "more_than": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclasses.dataclass(frozen=True)
class KeySpec:
    """What the schema says about one key.

    Attributes:
        default: Its default, which also fixes its type.
        meaning: What it does, as a phrase without a full stop.
        at_least: Smallest allowed value.
        more_than: Lower bound that is itself not allowed.
        at_most: Largest allowed value.
        below: Upper bound that is itself not allowed.
        choices: The allowed values, where they can be listed.
        check: A predicate on the value and its description, for any other restriction.
        because: Why the value is restricted, where that is not obvious.
        resumable: Whether the key may change when a run is resumed, because it does not affect what an update computes.
        path: Whether the value may be a path, in which `~` stands for the home directory.
    """

    default: Any
    meaning: str
    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    check: tuple[Callable[[Any], bool], str] | None = None
    because: str = ""
    resumable: bool = False
    path: bool = False

    def bounds(self) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
        """Returns the bounds that are set: in words, as a comparison, and the bound itself."""
        every = ((name.replace("_", " "), compare, getattr(self, name)) for name, compare in BOUNDS.items())
        return [(words, compare, bound) for words, compare, bound in every if bound is not None]

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as "at least 2"; empty if every value of the key's type is allowed."""
        if self.check:
            return self.check[1]
        if self.choices:
            return " or ".join(", ".join(map(repr, self.choices)).rsplit(", ", 1))
        return " and ".join(f"{words} {bound}" for words, _, bound in self.bounds())

    def accepts(self, value: Any) -> bool:
        """Returns whether a value of the key's type is allowed."""
        if self.check:
            return self.check[0](value)
        if self.choices:
            return value in self.choices
        return all(compare(value, bound) for _, compare, bound in self.bounds())


def key(default: T, meaning: str, **restrictions: Any) -> T:
    """Declares a key of a section.

    For example, `samples: int = key(8, "number of completions per prompt", at_least=2)`.

    Args:
        default: The default value, of the type that the field is annotated with.
        meaning: What the key does, as a phrase without a full stop.
        **restrictions: The other attributes of `KeySpec`.

    Returns:
        A dataclass field; it is typed as the value so that type checkers and editors see a plain attribute.
    """
    return dataclasses.field(default=default, metadata={"spec": KeySpec(default, meaning, **restrictions)})


class Resumable:
    """Marks a section all of whose keys may change when a run is resumed."""


def key_specs(config_class: type) -> dict[str, KeySpec]:
    """Returns the specs of all keys of a config dataclass by dotted name, in the order of their declaration."""
    specs = {}
    for field in dataclasses.fields(config_class):
        if "spec" in field.metadata:
            specs[field.name] = field.metadata["spec"]
            continue
        section = type(field.default)
        for name, spec in key_specs(section).items():
            resumable = spec.resumable or issubclass(section, Resumable)
            specs[f"{field.name}.{name}"] = dataclasses.replace(spec, resumable=resumable)
    return specs


def require_choices(section: Any) -> None:
    """Raises a ValueError if a key of `section`, which no config check has seen, is not one of its choices."""
    for name, spec in key_specs(type(section)).items():
        if spec.choices and getattr(section, name) not in spec.choices:
            raise ValueError(f"{name} must be {spec.allowed}; found {getattr(section, name)!r}. Choose one of them.")


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one dict with dotted names: `{"loss": {"kl_coef": 0}}` becomes `{"loss.kl_coef": 0}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def format_as_flag(name: str, value: Any) -> str:
    """Returns the flag that sets a key to a value, quoted for a shell."""
    text = json.dumps(value) if isinstance(value, tuple) else str(value)
    return f"--config.{name}={shlex.quote(text)}"
