"""Writes a report of one or more runs: an HTML page with curves, completions, timing and configs. It needs no network.

A run may still be training. The page can average runs whose configs differ only in the seed.
"""

from collections.abc import Sequence
from pathlib import Path

from grpo_jax.config import flags
from grpo_jax.config.keys import flatten
from grpo_jax.config.presets import nearest_preset
from grpo_jax.errors import UserError
from grpo_jax.reporting.page import make_page, report_data, write_page
from grpo_jax.reporting.runs import read_runs
from grpo_jax.run.progress import phase
from grpo_jax.text.terminal import printable


def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        __doc__,
        "python -m grpo_jax.report --workdir=runs/r1zero --workdir=runs/seed1 --out=report.html",
        several_runs=True,
    )
    parser.add_argument(
        "--out", metavar="FILE.html", type=flags.path_flag, default="report.html", help="default: report.html"
    )
    parser.add_argument(
        "--topology", metavar="KIND:SIZES", help="devices of the runs, such as h100:8; adds the model FLOPs utilization"
    )
    options = parser.parse_args(argv)
    if not options.workdir:
        raise UserError("--workdir=DIR must be given, once for each run; found none. Run with --help for an example.")
    out = Path(options.out)
    if out.suffix != ".html" or not out.parent.is_dir():
        raise UserError(f"--out must be a file FILE.html in a folder that exists; found {options.out!r}. Correct it.")
    with phase("Reading the runs"):
        runs = read_runs(options.workdir)
        if options.config:
            preset, base = options.config, flatten(flags.load_config(options.config).to_dict())
        else:
            preset, base = nearest_preset(runs[0].config)
        data = report_data(runs, base, preset, options.topology)
    page = make_page(data)
    try:
        write_page(out, page)
    except OSError as error:
        raise UserError(f"--out must be a file that can be written, but {error}. Name another one.") from None
    size = out.stat().st_size / 1e6
    print(printable(f"Wrote {out} ({size:.1f} MB): {', '.join(run.name for run in runs)}"))


if __name__ == "__main__":
    flags.run_entry_point(main)
