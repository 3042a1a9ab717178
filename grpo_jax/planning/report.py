"""The report of a plan: one JSON object, its text, and the exit code.

All bytes are those of one chip. A program's peak is what lies in memory while it runs: the arguments of all programs
that are kept for later (policy, optimizer state, reference), its own arguments, results and temporaries.
"""

import math
from collections.abc import Mapping

from grpo_jax.planning import needs
from grpo_jax.planning.estimate import Estimate, Seconds, estimate_run
from grpo_jax.planning.programs import RunShapes
from grpo_jax.planning.remedies import find_remedies
from grpo_jax.planning.topology import CHIPS, GIB

FITS, DOES_NOT_FIT = 0, 3  # exit codes
USABLE = 0.95  # of a chip's memory
# Taken by Orbax, the tokenizer, data, logs and many small programs, which a process that only compiles does not have.
TRAINER_BYTES = 2 * 10**8
GPU_DEFAULT = 0.75  # of its memory, which JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
MIXTURE_NOTE = (
    "The update of a mixture multiplies every local expert with every token, so it takes far longer than needed."
)
EXPERTS_NOTE = "Every chip holds the tokens of its whole expert axis, once for each expert that a token passes through."
LONG_ROW = 16384  # tokens, from which on masks of a whole row take gibibytes
LONG_ROW_NOTE = (
    "Updates mask attention with arrays of {width:,} x {width:,}, which take {gib:.1f} GiB and are made anew in every "
    "layer."
)


def program_peak(result: Mapping, memory: needs.Memory) -> int:
    """Returns the most bytes that one chip holds while a compiled program runs."""
    own = result["argument_bytes"] + result["output_bytes"] - result["alias_bytes"] + result["temp_bytes"]
    held = {
        "placement": memory.state + memory.reference - result["argument_bytes"],  # its argument is part of the state
        "scoring": memory.state,
        "update": memory.reference,
    }
    return own + held.get(result["name"], memory.state + memory.reference)


def phase_of(name: str) -> str:
    """Returns the phase that a program belongs to."""
    return name if name in ("scoring", "update") else "rollout"


def needed_work(run: RunShapes, name: str) -> needs.Work | None:
    """Returns the work that a program has to do, of one step for `decode`, or None for placement."""
    kind, _, columns = name.partition(" ")
    works = {
        "prefill": lambda: needs.prefill_work(run),
        "decode": lambda: needs.decode_work(run, int(columns)),
        "scoring": lambda: needs.forward_work(run, needs.scored_batch(run)),
        "update": lambda: needs.update_work(run),
    }
    return works[kind]() if kind in works else None


def describe_program(run: RunShapes, result: Mapping, memory: needs.Memory) -> dict:
    """Returns the part of the report about one program: what compiling it gave, beside what is needed."""
    if result.get("error"):
        return dict(result)
    work, name = needed_work(run, result["name"]), result["name"]
    needed = {} if work is None else {"needed_product_flops": work.products, "needed_attention_flops": work.attention}
    if name.startswith("decode"):
        needed["least_bytes"] = needs.decode_bytes(run, int(name.split()[1]))
    return {**result, **needed, "peak_bytes": program_peak(result, memory)}


def plan_report(
    run: RunShapes,
    topology: str,
    kind: str,
    memory_bytes: int,
    results: Mapping[str, Mapping],
    price: float | None = None,
    refusal: str = "",
) -> dict:
    """Returns the report of a plan as plain values. The peak of a phase without a compiled program is by formula.

    Args:
        run: The run.
        topology: The name of the devices, such as "v5e:8x8".
        kind: Their kind, such as "v5e"; for those without published figures ("cpu"), no seconds are estimated.
        memory_bytes: The memory of one of them.
        results: What compiling each program gave, by name.
        price: Price of a chip for an hour, if the cost is wanted.
        refusal: Why training would refuse to start; nothing is compiled then.
    """
    memory, chips = needs.run_memory(run), math.prod(run.mesh.shape.values())
    programs = {name: describe_program(run, result, memory) for name, result in results.items()}
    peaks: dict[str, int] = {}
    for name, program in programs.items():
        if "peak_bytes" in program:
            peaks[phase_of(name)] = max(peaks.get(phase_of(name), 0), program["peak_bytes"])
    for phase, peak in needs.phase_peaks(run).items():
        peaks.setdefault(phase, peak)  # of a phase that was not compiled
    budget = int(USABLE * memory_bytes)
    errors = {name: program["error"] for name, program in programs.items() if program.get("error")}
    fits = not errors and not refusal and all(peak <= budget for peak in peaks.values())
    report: dict = {
        "model": run.cfg.model.path,
        "topology": topology,
        "platform": CHIPS[kind].platform if kind in CHIPS else kind,
        "chips": chips,
        "memory_bytes": memory_bytes,
        "budget_bytes": budget,
        "mesh": dict(run.mesh.shape),
        "rollout_mesh": dict(run.rollout_mesh.shape),
        "slots": run.slots,
        "held": memory._asdict(),
        "peaks": peaks,
        "fits": fits,
        "errors": errors,
        "refusal": refusal,
        "programs": programs,
    }
    if report["platform"] == "cpu":
        report["process_bytes"] = process_bytes(memory, chips, peaks, results)
    report["notes"] = plan_notes(run, report)
    if not fits:
        excess = {phase: peaks[phase] - budget for phase in ("rollout", "update")}
        if refusal:  # even if one slot on each data shard would fit
            excess["rollout"] = max(1, excess["rollout"])
        report["remedies"] = [remedy._asdict() for remedy in find_remedies(run, excess, memory_bytes)]
    if kind in CHIPS and not refusal:
        made = estimate_run(run, CHIPS[kind], results)
        report["estimate"] = describe_estimate(made, chips, price)
    return report


def process_bytes(memory: needs.Memory, devices: int, peaks: Mapping[str, int], results: Mapping[str, Mapping]) -> int:
    """Returns the peak resident memory of a training process whose CPU devices share it.

    It is the sum of what the process needs before it compiles, what compiling adds, and what the devices hold. Some
    memory stays in use for each compiled program; the smallest of these amounts is needed once by any compiler. Memory
    that a compiler frees is reused by the next one, so only the largest amount counts. While a checkpoint is saved,
    there is a second copy of the policy and the optimizer state.
    """
    compiled = [result for result in results.values() if "kept_bytes" in result]
    started = max((result["started_bytes"] for result in compiled), default=0)
    kept = [result["kept_bytes"] for result in compiled]
    once = min(kept, default=0)
    compiler = once + sum(size - once for size in kept)
    compiler += max((result["compiler_bytes"] - result["kept_bytes"] for result in compiled), default=0)
    saving = 2 * memory.state + memory.reference
    return TRAINER_BYTES + started + compiler + devices * max(saving, *peaks.values())


def plan_notes(run: RunShapes, report: Mapping) -> list[str]:
    """Returns what a reader should know besides the numbers."""
    notes = [MIXTURE_NOTE] if run.model_cfg.experts else []
    if run.mesh.shape["expert"] > 1:
        notes.append(EXPERTS_NOTE)
    width = needs.updated_batch(run).width
    if report["platform"] == "tpu" and width >= LONG_ROW:
        notes.append(LONG_ROW_NOTE.format(width=width, gib=6 * width**2 / GIB))
    if report["platform"] == "gpu" and max(report["peaks"].values(), default=0) > GPU_DEFAULT * report["memory_bytes"]:
        taken = f"JAX takes {GPU_DEFAULT:.0%} of a GPU's memory by default"
        notes.append(f"{taken}; this run needs XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}.")
    return notes


def describe_estimate(made: Estimate, chips: int, price: float | None) -> dict:
    """Returns the estimate as plain values."""

    def describe(seconds: Seconds) -> dict:
        return {**seconds._asdict(), "limit": seconds.limit}

    cost = {} if price is None else {"price_per_chip_hour": price, "cost_of_1000_steps": made.cost(chips, price)}
    return {
        "rollout": describe(made.rollout),
        "scoring": describe(made.scoring),
        "update": describe(made.update),
        "step_seconds": made.step,
        "tokens_per_second_per_chip": made.tokens_per_second,
        "update_mfu": made.mfu,
        **cost,
    }


def exit_code(report: Mapping) -> int:
    """Returns the exit code of a plan."""
    return FITS if report["fits"] else DOES_NOT_FIT


def gib(count: float) -> str:
    """Formats a number of bytes in GiB, right-aligned."""
    return f"{count / GIB:9.2f}"


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Formats a mesh, leaving out axes of size 1."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def format_report(report: Mapping) -> str:
    """Formats a report for the console."""
    parts = [
        f"{report['model']} on {report['topology']} ({report['chips']} chip{'s' if report['chips'] > 1 else ''}, "
        f"{report['memory_bytes'] / GIB:.2f} GiB each, {report['budget_bytes'] / GIB:.2f} usable)",
        f"updates on {mesh_text(report['mesh'])}",
        f"rollouts on {mesh_text(report['rollout_mesh'])}, with {report['slots']} decode slots",
        "",
        format_memory(report),
    ]
    parts += ["", format_work(report)] if report["programs"] else []
    parts += ["", exchanges] if (exchanges := format_exchanges(report)) else []
    parts += ["", format_estimate(report["estimate"])] if "estimate" in report else []
    parts += [f"\nNote: {note}" for note in report["notes"]]
    return "\n".join([*parts, "", format_verdict(report)])


def format_memory(report: Mapping) -> str:
    """Formats what a chip holds, and the peaks of programs and phases."""
    held = report["held"]
    rows = [
        ("policy and optimizer", held["state"]),
        ("reference", held["reference"]),
        ("rollout weights", held["rollout_weights"]),
        ("KV cache at its largest", held["cache"]),
        ("KV of the prompts", held["prompt_kv"]),
    ]
    lines = ["Memory per chip                GiB"]
    lines += [f"  {name:<24}{gib(count)}" for name, count in rows]
    if report["programs"]:
        lines += ["", "Program           arguments   results   aliased temporary      peak  compiled in"]
    for name, program in report["programs"].items():
        if program.get("error"):
            lines.append(f"  {name:<16}{program['error']}")
            continue
        columns = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes")
        lines.append(f"  {name:<15}" + " ".join(gib(program[key]) for key in columns) + f"{program['seconds']:10.0f} s")
    lines += ["", "Phase                  peak      free"]
    for phase, peak in report["peaks"].items():
        free = report["budget_bytes"] - peak
        lines.append(f"  {phase:<16}{gib(peak)} {gib(free)}{'' if free >= 0 else '  does not fit'}")
    if "process_bytes" in report:
        lines += ["", f"Peak resident memory of the process: {report['process_bytes'] / GIB:.2f} GiB"]
    return "\n".join(lines)


def format_work(report: Mapping) -> str:
    """Formats the FLOPs and bytes of the compiled programs beside what is needed."""
    header = (
        "Work per chip      TFLOP     needed  ratio  attention     needed  GB moved      least  ratio   kernels copies"
    )
    lines = [header]
    for name, program in report["programs"].items():
        counts = program.get("counts")
        if not counts:
            continue
        needed, least = program.get("needed_product_flops"), program.get("least_bytes")
        line = f"  {name:<13}{counts['product_flops'] / 1e12:11.3f}"
        line += f"{needed / 1e12:11.3f}{counts['product_flops'] / needed:7.2f}" if needed else " " * 18
        line += f"{counts['attention_flops'] / 1e12:11.3f}"
        line += f"{program['needed_attention_flops'] / 1e12:11.3f}" if needed else " " * 11
        line += f"{counts['bytes'] / 1e9:10.2f}"
        line += f"{least / 1e9:11.2f}{counts['bytes'] / least:7.2f}" if least else " " * 18
        copies = sum(copy["count"] for copy in counts["copies"])
        lines.append(line + f"{counts['kernels']:10,.0f}{copies:7,.0f}")
    lines.append("  decode: one token for every slot; the other programs: all micro-batches at full length")
    decodes = [program for name, program in report["programs"].items() if name.startswith("decode")]
    reads = [program["counts"]["host_reads"] for program in decodes if program.get("counts")]
    if reads and report["platform"] == "gpu":
        lines.append(f"  the host waits {max(reads):.0f} times per token for the condition of a loop")
    return "\n".join(lines)


def format_exchanges(report: Mapping) -> str:
    """Formats the collectives of the compiled programs, added up by kind and axes; "" if there are none."""
    lines = []
    for name, program in report["programs"].items():
        totals: dict[tuple[str, str], list[float]] = {}
        for each in (program.get("counts") or {}).get("collectives", ()):
            total = totals.setdefault((each["kind"], "+".join(each["axes"]) or "-"), [0.0, 0.0, 0.0])
            total[0] += each["count"]
            total[1] += each["sent_bytes"] * each["count"]
            total[2] = max(total[2], each["bytes"])
        for (kind, axes), (count, sent, largest) in sorted(totals.items(), key=lambda item: -item[1][1]):
            lines.append(f"  {name:<15} {kind:<19} {axes:<16}{count:9,.0f} {sent / 1e9:11.3f} {largest / 1e6:13.2f}")
    header = "Collectives       kind                over                times     GB sent   largest in MB"
    return "\n".join([header, *lines]) if lines else ""


def format_estimate(estimate: Mapping) -> str:
    """Formats the estimated seconds."""
    lines = ["Estimated seconds  total  products  memory   links  launches  bound by"]
    for phase in ("rollout", "scoring", "update"):
        seconds = estimate[phase]
        columns = f"{seconds['products']:10.1f}{seconds['memory']:8.1f}"
        columns += f"{seconds['links']:8.1f}{seconds['launches']:10.1f}"
        lines.append(f"  {phase:<14}{seconds['total']:8.1f}{columns}  {seconds['limit'] if seconds['total'] else ''}")
    speed, mfu = estimate["tokens_per_second_per_chip"], estimate["update_mfu"]
    lines.append(f"  {estimate['step_seconds']:.1f} s per update with its share of rollout and scoring")
    lines.append(f"  {speed:,.0f} tokens/s per chip in the rollout; MFU of the update {mfu:.0%}")
    if "cost_of_1000_steps" in estimate:
        cost, price = estimate["cost_of_1000_steps"], estimate["price_per_chip_hour"]
        lines.append(f"  1,000 updates cost {cost:,.2f} at {price:g} per chip-hour")
    lines.append("  estimates, from published figures and assumed efficiencies; every completion at rollout.max_tokens")
    return "\n".join(lines)


def format_verdict(report: Mapping) -> str:
    """Formats whether the run fits, and what would help if it does not."""
    if report["fits"]:
        return "Fits."
    lines = ["Does not fit." if not report["errors"] else f"Does not compile: {', '.join(report['errors'])}."]
    lines += [f"  {report['refusal']}"] if report["refusal"] else []
    for remedy in report.get("remedies", ()):
        saved = max(remedy["saves"].values())
        verdict = "would fit" if remedy["suffices"] else "not enough by itself"
        lines.append(f"  {remedy['settings']:<46} saves{gib(saved)} GiB; {verdict}")
    return "\n".join(lines)
