"""What a run says: metrics.jsonl, TensorBoard, samples/ and the console. Only process 0 writes.

A metric is `group/quantity[/stat]`, a float. The line of step s in metrics.jsonl belongs to the s-th update; the line of
step 0 holds the evaluation before the first.
"""

import json
import math
import re
from pathlib import Path

import jax


def truncate_logs(workdir: Path, step: int) -> None:
    """Removes from metrics.jsonl and samples/ what lies after `step`, so that a resumed run says each step once."""
    path = workdir / "metrics.jsonl"
    if path.is_file():
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
    for sample_file in (workdir / "samples").glob("*.jsonl"):
        ours = re.fullmatch(r"(?:train|eval)-(\d+)", sample_file.stem)
        if ours and int(ours[1]) > step:
            sample_file.unlink()


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run that goes on after `step` (-1: that begins)."""

    def __init__(self, workdir: Path, step: int):
        self.writes = jax.process_index() == 0
        if self.writes:
            from tensorboardX import SummaryWriter

            workdir.mkdir(parents=True, exist_ok=True)
            truncate_logs(workdir, step)
            self.lines = open(workdir / "metrics.jsonl", "a", buffering=1)
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line; a number that is not finite is written as null."""
        if not self.writes:
            return
        finite = {name: float(value) if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        self.lines.write(json.dumps({"step": step} | finite) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writes:
            self.lines.close()
            self.board.close()


def write_samples(workdir: Path, kind: str, step: int, records: list[dict]) -> None:
    """samples/KIND-STEP.jsonl: completions with their prompt, ids and rewards."""
    if jax.process_index() != 0 or not records:
        return
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (workdir / "samples" / f"{kind}-{step:06d}.jsonl").write_text(text, encoding="utf-8")


def read_samples(workdir: Path, kind: str, step: int) -> list[dict]:
    """What `write_samples` wrote."""
    with open(workdir / "samples" / f"{kind}-{step:06d}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def console_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """A step for a person."""
    return (
        f"step {step:>{len(str(total))}}/{total}  reward {metrics['reward/mean']:.2f}  "
        f"accuracy {metrics['reward/accuracy']:.2f}  format {metrics['reward/format']:.2f}  "
        f"length {metrics['rollout/length_mean']:5.1f}  KL {metrics['policy/kl_ref']:.4f}  "
        f"{metrics['rollout/tokens_per_s']:,.0f} tokens/s  {metrics['time/step_s']:.1f} s"
    )


def before_and_after(workdir: Path) -> str:
    """The first and the last evaluation of a run, and one answer of each to the same question."""
    evaluated = [line for line in read_metrics(workdir) if "eval/accuracy" in line]
    if not evaluated:
        return "no evaluation in metrics.jsonl"
    first, last = evaluated[0], evaluated[-1]
    rows = ["", f"{'':24}{'before':>10}{'after':>10}", f"{'step':24}{first['step']:>10}{last['step']:>10}"]
    for name, label in (
        ("eval/accuracy", "accuracy"),
        ("eval/format", "format"),
        ("eval/length_mean", "length (tokens)"),
    ):
        rows.append(f"{label:24}{first[name]:>10.3f}{last[name]:>10.3f}")
    if not all((workdir / "samples" / f"eval-{line['step']:06d}.jsonl").is_file() for line in (first, last)):
        return "\n".join(rows)
    answers = [read_samples(workdir, "eval", line["step"])[0] for line in (first, last)]
    rows += ["", f"question  {answers[0]['question']}"]
    rows += [f"{when:10}{answer['completion'].strip()}" for when, answer in zip(("before", "after"), answers)]
    return "\n".join(rows)
