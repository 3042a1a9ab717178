"""One way to parse flags for all entry points, and one way to end on a user's mistake.

`--config=FILE.py[:PRESET]` names a Python file with `get_config(preset)`; `--config.section.key=VALUE` overrides a key,
with a value of the key's type. A mistake of the user ends with exit code 2 and one line.
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import REFUSED, at, default, flat, read_config
from grpo_jax.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a mistake as a UserError instead of with its usage."""

    def error(self, message):
        raise UserError(f"expected flags as --help lists them; found: {message}")


def make_parser(doc: str, example: str, *, of_a_run: bool = False) -> OneLineParser:
    """A parser whose help is `doc`, the flags and an example.

    Args:
      of_a_run: the entry point reads the workdir of a run.
    """
    parser = OneLineParser(
        description=doc,
        epilog=f"example:\n  {example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.py[:PRESET]", help="the config; --config.KEY=VALUE overrides a key")
    parser.add_argument("--workdir", metavar="DIR", help="where a run lives; default: runs/ plus the config's name")
    if of_a_run:
        parser.add_argument("--base", action="store_true", help="the model that the run began with, not its policy")
    return parser


def load_config(spec: str) -> ConfigDict:
    """`get_config(preset)` of FILE.py[:PRESET].

    Raises:
      UserError: no such file, or no get_config in it. A get_config raises its own for an unknown preset.
    """
    file, _, preset = spec.partition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"expected --config to name a Python file such as configs/r1zero.py; found no file {file!r}")
    module_spec = importlib.util.spec_from_file_location("grpo_jax_config_file", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"expected a function get_config(preset) in {file}; found none")
        config = module.get_config(preset) if preset else module.get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{file} line {lines[-1]}" if lines else file
        raise UserError(
            f"expected get_config(preset) of {where} to give a config; "
            f"found {type(error).__name__}: {error}; mend it there"
        ) from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"expected get_config(preset) of {file} to return a ConfigDict; found {type(config).__name__}")
    return config


def parse_value(key: str, text: str, old):
    """`text` as a value of the type of `old`."""
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            value = json.loads(text)
            if not isinstance(value, list):
                raise ValueError
            return tuple(value)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        form = f"a JSON list (as {json.dumps(old)})" if kind is tuple else f"of type {kind.__name__} (as {old!r})"
        raise UserError(f"expected --config.{key} to be {form}; found {text!r}") from None


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key in place."""
    known = flat(config.to_dict())
    if key in REFUSED:
        raise UserError(f"expected no {key} in training; found {text}; {REFUSED[key]}")
    if key not in known:
        same_name = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        close = difflib.get_close_matches(key, known, n=1) or same_name
        hint = f"Did you mean --config.{close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"
        raise UserError(f"expected a key of the config; found --config.{key}; {hint}")
    section, _, name = key.rpartition(".")
    (at(config, section) if section else config)[name] = parse_value(key, text, known[key])


def overrides(config: ConfigDict | None, rest: Sequence[str]) -> None:
    """Applies the `--config.KEY=VALUE` of a command line to `config` and refuses everything else."""
    rest = list(rest)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            what = "flag" if flag.startswith("-") else "argument"
            raise UserError(f"expected flags as --help lists them; found the unknown {what} {flag!r}")
        if config is None:
            raise UserError(f"expected --config=FILE.py before {flag}; found no config to change")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"expected a value for {flag}; found none; write {flag}=VALUE")
            text = rest.pop(0)
        override(config, flag.removeprefix("--config."), text)


def default_workdir(spec: str) -> Path:
    """runs/NAME or runs/NAME-PRESET for a config NAME.py[:PRESET]."""
    file, _, preset = spec.partition(":")
    return Path("runs") / (Path(file).stem + (f"-{preset}" if preset else ""))


def parse(parser: OneLineParser, argv: Sequence[str]):
    """The flags, the config with its overrides and the workdir.

    An entry point of a run needs no --config: the run's own is used.

    Returns:
      (flags, ConfigDict, workdir).
    Raises:
      UserError: any mistake on the command line.
    """
    flags, rest = parser.parse_known_args(argv)
    of_a_run = hasattr(flags, "base")
    if flags.config is None and not (of_a_run and flags.workdir):
        either = " or --workdir=DIR" if of_a_run else ""
        raise UserError(f"expected --config=FILE.py{either}; found neither; see --help")
    if flags.workdir is not None and (not flags.workdir.strip() or "://" in flags.workdir):
        raise UserError(
            f"expected --workdir to be a folder of a file system; found {flags.workdir!r}; mount it if need be"
        )
    workdir = Path(flags.workdir) if flags.workdir else default_workdir(flags.config)
    if flags.config is not None:
        config = load_config(flags.config)
    else:
        config = read_config(workdir)
        if "mesh" in config:  # the run's own may be that of a larger machine
            config.mesh = default().mesh
            config.mesh.data, config.mesh.fsdp = 1, -1
    overrides(config, rest)
    if of_a_run and not flags.base and (workdir / "config.json").is_file():
        theirs, ours = (flat(c.to_dict()).get("model.path") for c in (read_config(workdir), config))
        if theirs != ours:
            raise UserError(f"expected model.path={theirs}, with which {workdir} was begun; found {ours}; leave it out")
    return flags, config, workdir


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an entry point on the command line; a UserError becomes `error: ...` on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last checkpoint when started again", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # an orderly exit would wait for the other processes of a run, which may be waiting for this one
