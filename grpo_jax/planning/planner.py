"""Makes plans: of the config as it is, or of the settings that are expected to be the fastest."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.errors import UserError
from grpo_jax.planning.compiling import compile_programs
from grpo_jax.planning.inputs import plan_inputs
from grpo_jax.planning.programs import run_programs
from grpo_jax.planning.report import plan_report
from grpo_jax.planning.suggest import suggest_settings
from grpo_jax.planning.topology import CHIPS


class Target(NamedTuple):
    """What plans are made for, and how their programs are compiled."""

    topology: str
    kind: str  # of the devices
    devices: Sequence
    memory_bytes: int  # of one device
    programs: Sequence[str]  # the kinds of programs to compile, such as "decode"
    price: float | None  # of a device for an hour
    argv: Sequence[str]  # the command line
    environ: Mapping[str, str]  # of the processes that compile


def say(line: str) -> None:
    """Prints a line to stderr, where progress goes."""
    print(line, file=sys.stderr, flush=True)


def describe_result(result: dict) -> str:
    """Returns a line about a program that was compiled."""
    return f"{result['name']}: {result.get('error') or 'compiled in {:.0f} s'.format(result['seconds'])}"


def plan_config(cfg: configs.Config, target: Target, changes: Sequence[str] = ()) -> dict:
    """Returns the report of a run. If training would refuse to start, nothing is compiled.

    Args:
        cfg: The run's config.
        target: The devices.
        changes: Flags that turn the config of `target.argv` into `cfg`.
    """
    run, refusal = plan_inputs(cfg, target.devices, target.memory_bytes)
    names = [] if refusal else [name for name in run_programs(run) if name.split()[0] in target.programs]
    if names:
        say(f"Compiling {', '.join(names)} for {target.topology}")
    results = compile_programs(
        [*target.argv, *changes], names, dict(target.environ), lambda result: say(describe_result(result))
    )
    report = plan_report(run, target.topology, target.kind, target.memory_bytes, results, target.price, refusal)
    return report | {"flags": list(changes)}


def plan_suggestions(raw: Any, target: Target) -> list[dict]:
    """Returns the reports of the settings that are expected to be the fastest, which are searched by formula.

    Args:
        raw: The config, not checked yet.
        target: The devices.

    Raises:
        UserError: The figures of the devices are not known, or nothing fits by formula.
    """
    if target.kind not in CHIPS:
        raise UserError(f"--suggest needs the published figures of a chip; found none for {target.kind}. Leave it out.")
    run, _ = plan_inputs(configs.check(raw), target.devices, target.memory_bytes)
    say("Searching by formula")
    suggestions = suggest_settings(run.cfg, run.model_cfg, run.mesh.abstract_mesh, CHIPS[target.kind])
    if not suggestions:
        raise UserError(f"Some settings must fit on {target.topology}; found none by formula. Plan for more devices.")
    reports = []
    for suggestion in suggestions:
        say(f"Suggested: {' '.join(suggestion.flags)}")
        changed = raw.copy_and_resolve_references()
        flags.apply_overrides(changed, suggestion.flags)
        reports.append(plan_config(configs.check(changed), target, suggestion.flags))
    return reports
