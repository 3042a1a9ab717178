"""Writes the metrics and the recorded completions of a run to the sinks that `log.sinks` names.

    jsonl               metrics.jsonl and samples/, which resumed runs and reports read
    tensorboard         tensorboard/
    wandb and trackio   trackers, which show metrics and completions in a browser

A sink has the methods `write(step, metrics)`, `write_samples(kind, step, records)` and `close()`. Values that are not
finite arrive as None. Only process 0 has sinks.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config.keys import flatten
from grpo_jax.config.schema import TRACKERS, Config
from grpo_jax.config.workdir import replace_file
from grpo_jax.errors import UserError
from grpo_jax.run.metrics import LogFile, as_json, write_samples
from grpo_jax.run.progress import announce, phase
from grpo_jax.text.terminal import printable

# Fields of a record that a tracker's table shows, besides the reward parts.
TABLE_FIELDS = ("step", "prompt_id", "sample_id", "question", "completion", "expected", "parsed", "why", "reward")
TABLE_NUMBERS = ("advantage", "length")
FINISH_SECONDS = 300  # how long the end of a run waits for wandb to send what is left


def check_sinks(names: Sequence[str]) -> None:
    """Raises a UserError if the package of a tracker is not installed."""
    for name in set(names) & set(TRACKERS):
        spec = importlib.util.find_spec(name)
        # A folder of that name, such as the one in which wandb keeps its files, looks like a package without an origin.
        if spec is None or spec.origin is None:
            raise UserError(
                f"log.sinks has {name!r}, which needs the package {name}; it is not installed. Run `pip install "
                f"{name}`, or leave it out of --config.log.sinks."
            )


class JsonLines:
    """Writes metrics.jsonl and the files in samples/."""

    def __init__(self, workdir: Path):
        """Opens the files of a run, which must hold nothing that is to be written again."""
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self.file = workdir, LogFile(workdir / "metrics.jsonl")

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Appends one line."""
        self.file.append_json({"step": step} | metrics)

    def write_samples(self, kind: str, step: int, records: list[dict]) -> None:
        """Writes samples/KIND-STEP.jsonl."""
        write_samples(self.workdir, kind, step, records)

    def close(self) -> None:
        """Closes metrics.jsonl."""
        self.file.close()


class TensorBoard:
    """Writes metrics as TensorBoard events; completions are not shown.

    tensorboardX's own writer would hold events back in a queue and a thread: a killed run would lose them, and a full
    disk would end the thread and leave the run waiting for it.
    """

    def __init__(self, workdir: Path, step: int):
        """Opens the events of a run that resumes after `step` (-1: a new run); TensorBoard ignores later ones."""
        from tensorboardX.proto.event_pb2 import SessionLog

        folder = workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = LogFile(folder / name)
        self.append(file_version="brain.Event:2")
        self.append(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def append(self, **fields: Any) -> None:
        """Appends an event, stored as its length, a checksum, the event and another checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        parts = (struct.pack("<Q", len(event)), event)
        self.file.append(b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts))

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Appends an event with the metrics that have a value."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items() if value is not None]
        self.append(step=step, summary=Summary(value=values))

    def write_samples(self, kind: str, step: int, records: list[dict]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Closes the events."""
        self.file.close()


class Tracker:
    """Sends metrics, and completions as tables, to Weights & Biases or to Trackio, which has the same interface.

    A tracker never stops a run: the first exception that it raises is reported in one line, and the run continues
    without it. The id of the tracker's run is kept in the workdir, so a resumed run continues it.
    """

    def __init__(self, name: str, cfg: Config, workdir: Path):
        """Starts the tracker's run, or continues it. `name` is "wandb" or "trackio", an installed package."""
        self.name, self.run, self.module = name, None, None
        with phase(f"Starting {name}"):
            self.attempt(self.start, cfg, workdir)

    def attempt(self, function: Callable, *args: Any) -> None:
        """Calls a function of the tracker. If it raises an exception, the tracker is not used any more."""
        try:
            function(*args)
        except Exception as error:
            self.run = None
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            announce(f"{self.name} failed, and the run continues without it; its files still hold everything. {reason}")

    def start(self, cfg: Config, workdir: Path) -> None:
        """Imports the package and starts its run."""
        id_file = workdir / f"{self.name}_id"
        if not id_file.exists():
            replace_file(id_file, secrets.token_hex(4).encode())
        run_id = id_file.read_text().strip()
        self.module = importlib.import_module(self.name)
        options = dict(project=os.environ.get("WANDB_PROJECT", "grpo_jax"), resume="allow")
        options["config"] = flatten(dataclasses.asdict(cfg))
        if self.name == "trackio":  # identifies a run by its name
            self.run = self.module.init(name=f"{workdir.name}-{run_id}", **options)
            return
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
        self.run = self.module.init(name=workdir.name, id=run_id, dir=workdir, **options)
        # wandb's own steps must not decrease, but a resumed run repeats the steps after its checkpoint.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Logs values that belong to a step."""
        if self.name == "trackio":  # "step" is a reserved name
            self.run.log(values, step=step)
        else:
            self.run.log({"step": step} | values)

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Logs the metrics that have a value."""
        if self.run is not None:
            self.attempt(self.log, step, {name: value for name, value in metrics.items() if value is not None})

    def write_samples(self, kind: str, step: int, records: list[dict]) -> None:
        """Logs completions as the table samples/KIND."""
        if self.run is not None:
            self.attempt(self.log_table, kind, step, records)

    def log_table(self, kind: str, step: int, records: list[dict]) -> None:
        """Logs completions as a table."""
        columns, rows = completion_table(step, records)
        self.log(step, {f"samples/{kind}": self.module.Table(columns=columns, data=rows)})

    def close(self) -> None:
        """Ends the tracker's run."""
        if self.run is not None:
            self.attempt(self.run.finish)


def completion_table(step: int, records: list[dict]) -> tuple[list[str], list[list]]:
    """Returns the columns and rows of a table of completions. A column holds either texts or numbers, or None."""
    parts = list(records[0]["rewards"])

    def cell(value: Any) -> Any:
        if value is None or isinstance(value, int | float):
            return value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be encoded

    rows = []
    for record in map(as_json, records):
        fields = {"step": step} | record
        values = [*(fields[name] for name in TABLE_FIELDS), *(record["rewards"][part] for part in parts)]
        rows.append([cell(value) for value in (*values, *(fields.get(name) for name in TABLE_NUMBERS))])
    return [*TABLE_FIELDS, *(f"reward/{part}" for part in parts), *TABLE_NUMBERS], rows


def open_sinks(cfg: Config, workdir: Path, step: int) -> list[JsonLines | TensorBoard | Tracker]:
    """Opens the sinks of a run that resumes after `step` (-1: a new run)."""
    makers = {"jsonl": lambda: JsonLines(workdir), "tensorboard": lambda: TensorBoard(workdir, step)}
    makers |= {name: lambda name=name: Tracker(name, cfg, workdir) for name in TRACKERS}
    return [makers[name]() for name in cfg.log.sinks]
