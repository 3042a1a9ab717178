"""Parses the command line of every entry point, and turns a user's mistake into one line and exit code 2.

`--config=FILE.py[:PRESET]` names a Python file with a function `get_config(preset)` that returns a config, and
`--config.section.key=VALUE` overrides one of its keys. This does not use `ml_collections.config_flags`, because absl
answers a user's mistake with a traceback and ignores stray arguments.
"""

import argparse
import ast
import contextlib
import difflib
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from grpo_jax.config.functions import import_file, suggest
from grpo_jax.config.help import explain, list_topics
from grpo_jax.config.keys import flatten
from grpo_jax.config.other_names import our_keys
from grpo_jax.config.presets import find_config, shipped_configs
from grpo_jax.config.rules import REFUSED
from grpo_jax.config.schema import default
from grpo_jax.config.workdir import continue_derived, has_checkpoint, read_config
from grpo_jax.errors import RunStopped, UserError
from grpo_jax.foreign import name_problem
from grpo_jax.signals import receive_signals
from grpo_jax.text.terminal import printable

MAX_MESSAGE = 3000  # characters of an error message, which may quote a file


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that raises a UserError on a mistake, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises the UserError."""
        raise UserError(f"The flags must be as --help lists them; found a mistake: {message}. Correct it.")

    def flag_names(self) -> list[str]:
        """Returns the flags that --help lists, such as "--workdir"."""
        return [name for action in self._actions for name in action.option_strings]


class HelpAction(argparse.Action):
    """Shows help and exits with code 0."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Prints the flags and the config's sections, or for `--help=SECTION` the keys of that section."""
        print(explain(values) if values else parser.format_help().rstrip())
        sys.exit(0)


def path_flag(text: str) -> str:
    """Returns the value of a flag that is a path, with `~` expanded.

    Raises:
        argparse.ArgumentTypeError: No file can have this path.
    """
    path = os.path.expanduser(text)
    problem = name_problem(path.partition(".py:")[0])
    if problem:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a path ({problem})")
    return path


def make_parser(description: str, example: str, *, of_a_run: bool = False, several_runs: bool = False) -> OneLineParser:
    """Builds a parser with the flags that all entry points share.

    Args:
        description: What the entry point does, for --help.
        example: A command line, for --help.
        of_a_run: Whether the entry point reads the policy of a run; adds --base and --step, which choose the policy.
        several_runs: Whether --workdir may be repeated, and --config is only compared with the runs.
    """
    epilog, as_written = f"{list_topics()}\n\nexample:\n  {example}", argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(
        description=description, epilog=epilog, formatter_class=as_written, add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action=HelpAction, nargs="?", metavar="SECTION", help="show this, or a section")
    about_config, about_workdir = (
        "config; --config.KEY=VALUE sets a key",
        "folder of the run; default: runs/FILE[-PRESET]",
    )
    if several_runs:
        about_config, about_workdir = (
            "config to compare the runs with; default: the nearest preset of the package",
            "folder of a run; may be repeated",
        )
    parser.add_argument("--config", metavar="FILE.py[:PRESET]", type=path_flag, help=about_config)
    action = "append" if several_runs else "store"
    parser.add_argument("--workdir", metavar="DIR", type=path_flag, action=action, help=about_workdir)
    if of_a_run:
        parser.add_argument("--base", action="store_true", help="use the base model instead of the trained policy")
        parser.add_argument(
            "--step", type=int, metavar="N", help="use the policy after update N; default: the newest checkpoint"
        )
    parser.set_defaults(of_a_run=of_a_run)
    return parser


def load_config(spec: str) -> ConfigDict:
    """Returns what `get_config` of `FILE.py[:PRESET]` returns.

    Raises:
        UserError: There is no such file, or its `get_config` is missing, fails, or returns something else. A config
            file raises its own UserError for an unknown preset.
    """
    file, _, preset = spec.partition(":")
    path = find_config(file)
    if path is None:
        names = sorted(config.stem for config in shipped_configs().glob("*.py"))
        hint = suggest(Path(file).stem, names, "--config={}") or f"Check the path, or use one of {', '.join(names)}."
        raise UserError(f"--config must name a Python file such as configs/r1zero.py; found no file {file!r}. {hint}")
    try:
        module = import_file(path)
        if not hasattr(module, "get_config"):
            raise UserError(f"{file} must define a function get_config(preset); found none. Add it.")
        raw = module.get_config(preset) if preset else module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{file} line {lines[-1]}" if lines else file
        raise UserError(
            f"get_config(preset) must return a config; {where} raised {type(error).__name__}: {error}. Fix that file."
        ) from None
    if not isinstance(raw, ConfigDict):
        raise UserError(
            f"get_config(preset) of {file} must return a ConfigDict; found {type(raw).__name__}. "
            "Return config.default() or a changed one."
        )
    return raw


def parse_value(key: str, text: str, old: Any) -> Any:
    """Returns `text` as a value of the type of `old`.

    Raises:
        UserError: The text is not such a value, or not a finite number.
    """
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            value = json.loads(text) if text.lstrip().startswith("[") else ast.literal_eval(text)
            if not isinstance(value, list | tuple):
                raise ValueError
            return tuple(value)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError, SyntaxError, TypeError):
        expected = "a JSON list" if kind is tuple else f"of type {kind.__name__}"
        like = json.dumps(old) if kind is tuple else old
        raise UserError(f"--config.{key} must be {expected}; found {text!r}. Write it like {like!r}.") from None


def suggest_keys(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean ...?" with the keys that a wrong key probably stands for, or ""; see `OTHER_NAMES`."""
    known = list(known)
    same_name = [key for key in known if key.split(".")[-1] == name.split(".")[-1]]
    likely = [key for key in our_keys(name) if key in known]
    likely = likely or difflib.get_close_matches(name, known, n=1) or same_name[:1]
    return f"Did you mean {' or '.join(f'--config.{key}' for key in likely)}?" if likely else ""


def override_key(raw: ConfigDict, key: str, text: str) -> None:
    """Sets one key of a config in place, from the text of a flag.

    Raises:
        UserError: The key is unknown, or the text is not a value of its type.
    """
    known = flatten(raw.to_dict())
    if key in REFUSED:
        raise UserError(f"--config.{key} must not be set, because {REFUSED[key]}; found {text}. Leave it out.")
    if key not in known:
        hint = suggest_keys(key, known) or f"The keys are {', '.join(sorted(known))}."
        raise UserError(f"--config.KEY must name a key of the config; found --config.{key}. {hint}")
    raw.update_from_flattened_dict({key: parse_value(key, text, known[key])})


def apply_overrides(raw: ConfigDict, arguments: Sequence[str], options: Iterable[str]) -> frozenset[str]:
    """Applies all `--config.KEY=VALUE` and `--config.KEY VALUE` to a config in place, and returns the keys.

    Args:
        raw: The config.
        arguments: The arguments that the parser does not know.
        options: The flags that it knows, for error messages.

    Raises:
        UserError: There are other arguments.
    """
    rest, given = list(arguments), set()
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            what, name = "flag" if flag.startswith("-") else "argument", flag.lstrip("-")
            known = flatten(raw.to_dict())
            hint = "" if our_keys(name) else suggest(flag, options, "{}")
            hint = hint or suggest_keys(name, known) or "Leave it out."
            raise UserError(f"The flags must be as --help lists them; found the unknown {what} {flag!r}. {hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag} must be followed by a value; found none. Write {flag}=VALUE.")
            text = rest.pop(0)
        override_key(raw, flag.removeprefix("--config."), text)
        given.add(flag.removeprefix("--config."))
    return frozenset(given)


def default_workdir(spec: str) -> Path:
    """Returns runs/NAME, or runs/NAME-PRESET, for a config NAME.py[:PRESET]."""
    file, _, preset = spec.partition(":")
    return Path("runs") / (Path(file).stem + (f"-{preset}" if preset else ""))


class CommandLine(NamedTuple):
    """A parsed command line."""

    options: argparse.Namespace  # all flags except --config.KEY
    raw: ConfigDict  # the config with its overrides, not checked yet
    workdir: Path
    given: frozenset[str]  # the keys that the command line sets


def parse_flags(parser: OneLineParser, argv: Sequence[str]) -> CommandLine:
    """Parses a command line.

    Args:
        parser: A parser from `make_parser`.
        argv: The command line, without the program's name.

    Returns:
        The command line. Without --config, `raw` is the config of the run in the workdir; an entry point that only
        reads the run gets the config with a mesh that fits any number of devices.

    Raises:
        UserError: The command line has a mistake.
    """
    flags, rest = parser.parse_known_args(argv)
    if flags.config is None and flags.workdir is None:
        raise UserError("--config=FILE.py or --workdir=DIR must be given; found none. Run with --help for an example.")
    if flags.of_a_run and flags.base and flags.step is not None:
        raise UserError("Only one of --base and --step may be given; found both. Leave one of them out.")
    if flags.workdir is not None and (not flags.workdir.strip() or "://" in flags.workdir):
        raise UserError(f"--workdir must be a folder of a mounted file system; found {flags.workdir!r}. Name another.")
    workdir = Path(flags.workdir) if flags.workdir else default_workdir(flags.config)
    if flags.config is not None:
        raw = load_config(flags.config)
    else:
        raw = read_config(workdir)
        if flags.of_a_run and "mesh" in raw and "rollout" in raw:  # there may be fewer devices here
            raw.mesh = default().mesh
            raw.mesh.data, raw.mesh.fsdp = 1, -1
            raw.rollout.mesh = default().rollout.mesh
    given = apply_overrides(raw, rest, parser.flag_names())
    if flags.of_a_run or has_checkpoint(workdir):
        raw = continue_derived(raw, given, workdir)
    if flags.of_a_run and getattr(raw, "derive", False):
        raise UserError(
            f"A config that derives its keys must belong to a run that has been started; found none in {workdir}. "
            "Train first, or pass the --workdir of a run."
        )
    if flags.of_a_run and not flags.base and (workdir / "config.json").is_file():
        configs = (read_config(workdir), raw)
        base, other = (os.path.expanduser(str(flatten(config.to_dict()).get("model.path"))) for config in configs)
        if other != base:
            raise UserError(
                f"model.path must be {base}, with which the run in {workdir} was started; found {other}. "
                "Leave out --config.model.path."
            )
    return CommandLine(flags, raw, workdir, given)


def run_entry_point(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line, handles signals, and turns exceptions for users into messages and exit codes.

    A UserError becomes `error: ...` on stderr and exit code 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    try:
        with receive_signals():
            main(sys.argv[1:])
    except UserError as error:
        message = " ".join(str(error).split())
        if len(message) > MAX_MESSAGE:  # the end is kept, because it says what to do
            message = f"{message[: MAX_MESSAGE - 300]} [...] {message[-300:]}"
        leave(f"error: {message}", 2, at_once=error.leaves_threads)
    except RunStopped as stopped:
        leave(str(stopped), stopped.exit_code)


def leave(message: str, code: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process with a message, which is lost if stderr is a file on a full disk.

    Args:
        message: The message; empty for none.
        code: The exit code.
        at_once: Whether not to wait for threads and other processes, which may be waiting for this one.
    """
    with contextlib.suppress(OSError):
        if message:
            print(printable(message), file=sys.stderr)
        sys.stdout.flush()
    if at_once:
        os._exit(code)
    sys.exit(code)
