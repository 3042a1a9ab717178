"""Plans a run for hardware that you need not have: compiles its programs and says whether they fit, and how fast.

The exit code is 0 if the run fits in the memory of the devices and 3 if it does not.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.errors import UserError
from grpo_jax.planning.topology import CHIPS, check_compiler, compiler_environment, parse_topology, topology_devices

PROGRAM_KINDS = ("placement", "prefill", "decode", "scoring", "update")


def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.plan --config=configs/r1zero.py:qwen2.5-7b --topology=v5p:2x2x2"
    )
    parser.add_argument(
        "--topology", metavar="KIND:SIZES", help="v5e:8x8, v6e:2x2, v5p:4x4x4, h100:8, l4:1, cpu:8, ..."
    )
    parser.add_argument("--price", metavar="DOLLARS", type=float, help="price of one device for an hour; adds the cost")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--suggest", action="store_true", help="search meshes, slots and micro-batches, and plan the best 3"
    )
    parser.add_argument(
        "--programs",
        metavar="KIND,KIND,...",
        type=lambda text: tuple(text.split(",")),
        default=PROGRAM_KINDS,
        help=f"compile only these of {', '.join(PROGRAM_KINDS)}; formulas stand in for the others",
    )
    parser.add_argument(
        "--earlier",
        metavar="FILE.json",
        type=os.path.expanduser,
        help="an earlier plan of the same run as JSON; programs that have not changed are not compiled again",
    )
    parser.add_argument("--program", help=argparse.SUPPRESS)  # see grpo_jax.planning.compiling
    options, raw, *_ = flags.parse_flags(parser, argv)
    cfg = configs.check(raw)
    if cfg.derive:
        raise UserError(
            "A plan needs a config with all its keys, but this one derives them on the machine that trains. Pass the "
            "--workdir of a run that has been started, or another --config."
        )
    if options.topology is None:
        expected = "--topology=KIND:SIZES must be given, such as v5e:8x8 or h100:8"
        raise UserError(f"{expected}; found none. Run with --help for an example.")
    if not set(options.programs) <= set(PROGRAM_KINDS):
        raise UserError(
            f"--programs must list some of {', '.join(PROGRAM_KINDS)}; found {','.join(options.programs)}. Correct it."
        )
    kind, _ = parse_topology(options.topology)
    check_compiler(kind)
    environ = compiler_environment(options.topology, os.environ)
    os.environ.update(environ)  # before JAX is imported

    from grpo_jax.planning import compiling, inputs, planner, report
    from grpo_jax.rollout.memory import device_memory_bytes

    devices = topology_devices(options.topology)
    memory_bytes = CHIPS[kind].memory_bytes if kind in CHIPS else device_memory_bytes()
    if options.program:
        run, _ = inputs.plan_inputs(cfg, devices, memory_bytes)
        print(json.dumps(compiling.compile_program(run, options.program, compiling.read_earlier(options.earlier))))
        return
    target = planner.Target(
        options.topology, kind, devices, memory_bytes, options.programs, options.price, argv, environ
    )
    plans = planner.plan_suggestions(raw, target) if options.suggest else [planner.plan_config(cfg, target)]
    if options.json:
        print(json.dumps(plans if options.suggest else plans[0]))
    else:
        print("\n\n\n".join(map(report.format_report, plans)))
    sys.exit(min(map(report.exit_code, plans)))


if __name__ == "__main__":
    flags.run_entry_point(main)
