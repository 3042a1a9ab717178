"""One way to parse flags for all entry points, and one way to end on a user's mistake.

`--config=FILE.py[:PRESET]` names a Python file with `get_config(preset)`; `--config.section.key=VALUE` overrides a key,
with a value of the key's type. A mistake of the user ends with exit code 2 and one line.
"""

import argparse
import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import at, flat, read_config
from grpo_jax.types import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a mistake as a UserError instead of with its usage."""

    def error(self, message):
        raise UserError(f"expected flags as --help lists them; found: {message}")


def make_parser(doc: str, example: str) -> OneLineParser:
    """A parser whose help is the entry point's docstring, its flags and an example."""
    parser = OneLineParser(
        description=doc, epilog=f"example:\n  {example}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.py[:PRESET]", help="the config; --config.KEY=VALUE overrides a key")
    parser.add_argument("--workdir", metavar="DIR", help="where a run lives; default: runs/ plus the config's name")
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
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"expected a function get_config(preset) in {file}; found none")
    return module.get_config(preset) if preset else module.get_config()


def parse_value(key: str, text: str, old):
    """`text` as a value of the type of `old`."""
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise UserError(f"expected --config.{key} to be of type {kind.__name__} (as {old!r}); found {text!r}") from None


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key in place."""
    known = flat(config.to_dict())
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
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


def parse(parser: OneLineParser, argv: Sequence[str], *, of_a_run: bool = False):
    """The flags, the config with its overrides and the workdir.

    Args:
      of_a_run: the entry point reads a finished or running workdir: without --config the run's own config is used.
    Returns:
      (flags, ConfigDict, workdir).
    Raises:
      UserError: any mistake on the command line.
    """
    flags, rest = parser.parse_known_args(argv)
    if flags.config is None and not (of_a_run and flags.workdir):
        raise UserError(f"expected --config=FILE.py{' or --workdir=DIR' if of_a_run else ''}; found neither; see --help")
    workdir = Path(flags.workdir) if flags.workdir else default_workdir(flags.config)
    config = load_config(flags.config) if flags.config is not None else read_config(workdir)
    overrides(config, rest)
    return flags, config, workdir


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an entry point on the command line; a UserError becomes `error: ...` on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
