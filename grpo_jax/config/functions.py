"""Imports the function that a config value names: a built-in one, `module:function` or `path/file.py:function`."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.errors import UserError


def function_label(name: str) -> str:
    """Returns a function's label in metrics and samples: what follows the colon of its name, or all of a bare name."""
    return name.rpartition(":")[2]


def resolve_function(name: str, key: str, built_in: Mapping[str, Callable], hint: str = "") -> Callable[..., Any]:
    """Returns the function that a config value names.

    Args:
        name: The value: a name in `built_in`, `module:function`, or `path/file.py:function`, where `~` stands for the
            home directory and a relative path starts in the current directory.
        key: The config key of the value, for errors.
        built_in: The functions that need no module, by name.
        hint: A sentence to add to the error for an unknown name without a colon.

    Raises:
        UserError: There is no such function, it cannot be called, or importing its module or file fails.
    """
    if name in built_in:
        return built_in[name]
    source, colon, function = name.rpartition(":")
    is_source = source.endswith(".py") or all(map(str.isidentifier, source.split(".")))
    if not (is_source and function.isidentifier()):
        fix = suggest(name, built_in) or "Correct the name."
        raise UserError(
            f"{key} must be {', '.join(map(repr, built_in))}, module:function or path/file.py:function; found "
            f"{name!r}. " + (fix if colon or not hint else f"{fix} {hint}")
        )
    module = import_source(source, key)
    value = getattr(module, function, None)
    if not callable(value):
        found = "none" if value is None else f"{function} of type {type(value).__name__}"
        functions = [other for other, value in vars(module).items() if callable(value)]
        fix = suggest(function, functions) or "Define it there."
        raise UserError(f"{key}={name} must name a function in {source}; found {found}. {fix}")
    return value


def suggest(name: str, options: Iterable[str], form: str = "{!r}") -> str:
    """Returns "Did you mean ...?" with the option closest to `name`, formatted with `form`; "" if none is close."""
    close = difflib.get_close_matches(name, options, n=1)
    return f"Did you mean {form.format(close[0])}?" if close else ""


def import_source(source: str, key: str) -> ModuleType:
    """Imports a module by name, or a Python file by path.

    Raises:
        UserError: There is no such module or file, or importing it raises an exception.
    """
    is_file, path = source.endswith(".py"), Path(source).expanduser()
    if is_file and not path.is_file():
        raise UserError(f"{key} must name a function in a Python file; found no file {source}. Correct the path.")
    try:
        return import_file(path.resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and f"{source}.".startswith(f"{error.name}."):
            raise UserError(
                f"{key} must name a function in a module that can be imported; found no module {error.name!r}. Correct "
                "the name, add the module's folder to PYTHONPATH, or write path/file.py:function."
            ) from error
        raise UserError(
            f"{key} must name a function in {source}; importing it raised {describe_error(error)}. Correct it."
        ) from error


def import_file(path: Path) -> ModuleType:
    """Imports a Python file. Later calls return the same module until the file is edited."""
    name = f"_grpo_jax_file_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path  # every .py file has a loader
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look up the module of their class
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def describe_error(error: BaseException) -> str:
    """Describes an exception in one line: its type and message, and where it was raised, unless that is our call."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    message, place = str(error), f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    if isinstance(error, SyntaxError) and Path(str(error.filename)).is_file():  # in a file that is being imported
        message, place = error.msg, f" ({error.filename}:{error.lineno})"
    return textwrap.shorten(f"{type(error).__name__}: {message}", 300, placeholder=" ...") + place
