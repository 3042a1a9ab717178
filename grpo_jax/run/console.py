"""Reports on a run while it trains: a progress bar, lines on the console, and the sinks of `log.sinks`."""

import time
from pathlib import Path
from typing import Any

import jax

from grpo_jax.config.schema import Config
from grpo_jax.run.context import RunContext
from grpo_jax.run.diagnosis import Diagnosis
from grpo_jax.run.disk import DiskError, disk_errors
from grpo_jax.run.metrics import LogFile, console_line, finite_or_none, truncate_logs
from grpo_jax.run.progress import announce, close_bar, step_bar
from grpo_jax.run.sinks import open_sinks
from grpo_jax.run.state import RunState, describe_failure, wait_for_update

METRICS_AND_SAMPLES = "metrics and samples"

SAMPLER_DRIFT_METRICS = ("policy/kl_sampler", "policy/logp_gap/mean", "policy/logp_gap/max")


def describe_run(cfg: Config, context: RunContext, run: RunState) -> str:
    """Describes the model, the devices and the rollouts of a run for the console, and where the run resumes."""
    param_count = sum(leaf.size for leaf in jax.tree.leaves(run.train.params))
    devices = jax.devices()
    axes, rollout_axes = (
        " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        for mesh in (context.mesh, context.rollout_mesh)
    )
    own_mesh = "" if rollout_axes == axes else f", on the mesh {rollout_axes}"
    resuming = f"\nResuming after step {run.step}" if 0 < run.step < cfg.total_steps else ""
    return (
        f"{cfg.model.path}: {param_count:,} parameters on {len(devices)} {devices[0].device_kind} "
        f"device{'s' if len(devices) > 1 else ''} ({axes})\n"
        f"Each rollout: {cfg.rollout.prompts} prompts x {cfg.rollout.samples} completions, {context.rollout_plan}"
        f"{own_mesh}{resuming}"
    )


def is_reported(cfg: Config, step: int) -> bool:
    """Returns whether the console has a line for a step."""
    return step % cfg.log.every_steps == 0 or step in (1, cfg.total_steps)


def num_records(cfg: Config, first_step: int) -> int:
    """Returns how many completions of the rollout whose first update is `first_step` go to samples/.

    A rollout is recorded if one of its updates is reported, or if its policy is in a checkpoint, from which the
    completions can be drawn again.
    """
    steps = range(first_step, first_step + cfg.train.minibatches * cfg.train.epochs)
    if (first_step - 1) % cfg.checkpoint.every_steps and not any(is_reported(cfg, step) for step in steps):
        return 0
    completions = cfg.rollout.prompts * cfg.rollout.samples
    return completions if cfg.log.samples < 0 else min(cfg.log.samples, completions)


class RunLog:
    """Logs the metrics of a run and prints lines on the console, on process 0 only."""

    def __init__(self, cfg: Config, context: RunContext, workdir: Path, step: int, line: dict[str, Any] | None = None):
        """Opens the log of a run that starts (step 0) or resumes after `step`, whose line its checkpoint has."""
        self.cfg, self.workdir = cfg, workdir
        self.unwritten: list[tuple] = []  # calls of the sinks, from the first that failed on
        self.sinks: list = []
        if jax.process_index() == 0:
            with disk_errors(workdir, METRICS_AND_SAMPLES):
                truncate_logs(workdir, step or -1, line)
                self.sinks = open_sinks(cfg, workdir, step or -1)
        self.warnings = LogFile(workdir / "warnings.jsonl")
        self.diagnosis = Diagnosis(cfg, context, workdir)
        self.last_metrics: dict[str, float] = {}  # of the last update; empty before the first
        self.last_line: dict[str, Any] = {}  # of metrics.jsonl
        self.step_end = time.monotonic()  # when the previous step ended
        self.save_seconds = 0.0  # of the checkpoint after the previous step, for the line of the next one
        self.bar = step_bar(cfg.total_steps, step)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, on process 0."""
        announce(line)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step, and prints them if the step is reported. Step 0 is not an update."""
        values = finite_or_none(metrics)
        self.last_line = {"step": step} | values
        for sink in self.sinks:
            self.attempt(sink.write, step, values)
        if step:
            self.last_metrics = {"step": step} | metrics
            self.bar.update()
        if step and is_reported(self.cfg, step):
            self.say(console_line(step, self.cfg.total_steps, metrics))
        self.observe(step, metrics)

    def observe(self, step: int, metrics: dict[str, float]) -> None:
        """Prints new warnings, given the metrics of a step or facts that are not metrics."""
        for warning in self.diagnosis.observe(step, metrics):
            self.attempt(self.warnings.append_json, warning)
            self.say(f"warning: step {step}: {warning['text']}")

    def write_samples(self, kind: str, step: int, records: list[dict]) -> None:
        """Logs completions of a rollout (`kind` "train") or of an evaluation ("eval") with the step they belong to."""
        for sink in self.sinks:
            self.attempt(sink.write_samples, kind, step, records)

    def attempt(self, *call: Any) -> None:
        """Calls a function, the first of the arguments, that writes to the workdir.

        Raises:
            DiskError: It could not write, and `checkpoint.retry_s` is 0. Otherwise, it is called again before the next.
        """
        was_failing = bool(self.unwritten)
        self.unwritten += [call] * bool(call)
        try:
            with disk_errors(self.workdir, METRICS_AND_SAMPLES):
                while self.unwritten:
                    function, *arguments = self.unwritten[0]
                    function(*arguments)
                    del self.unwritten[0]
        except DiskError as error:
            if not self.cfg.checkpoint.retry_s:
                self.unwritten = []
                raise
            if not was_failing:
                self.say(f"warning: {error.found} The run continues, and writes them as soon as it can.")

    def close(self) -> None:
        """Closes the progress bar and the sinks."""
        close_bar()
        for sink in (*self.sinks, self.warnings):
            sink.close()


def fetch_update(cfg: Config, log: RunLog, run: RunState) -> RunState:
    """Fetches the metrics of the update in flight, if there is one; they are not logged yet."""
    if run.flight is None:
        return run
    flight = wait_for_update(run).flight
    # Every process has them all, so they need no collective, which the devices would run after the next update.
    metrics = {name: float(value) for name, value in jax.device_get(flight.metrics).items()}
    rollout_metrics = run.rollout_metrics
    if flight.rollout_metrics is not None:  # in later updates the policy is no longer the one that sampled the rollout
        rollout_metrics = flight.rollout_metrics | {name: metrics[name] for name in SAMPLER_DRIFT_METRICS}
    metrics |= rollout_metrics | flight.times
    # What the host did while the previous update was still running took no time of this step.
    start, packed = max(flight.start, log.step_end), max(flight.packed, log.step_end)
    metrics["time/pack_s"] = packed - start
    metrics["time/update_s"] = flight.end - packed - flight.times.get("time/record_s", 0.0)
    metrics["time/save_s"], log.save_seconds = log.save_seconds, 0.0
    metrics["time/step_s"] = flight.end - log.step_end
    log.step_end = flight.end
    skipped = run.skipped_in_a_row + 1 if metrics["optim/skipped"] else 0
    failure = run.failure or describe_failure(cfg, skipped, run.step)
    run = run._replace(flight=None, rollout_metrics=rollout_metrics, skipped_in_a_row=skipped, failure=failure)
    return run._replace(unlogged=metrics)


def finish_update(cfg: Config, log: RunLog, run: RunState, eval_metrics: dict[str, float] | None = None) -> RunState:
    """Fetches and logs the metrics of the last update, unless they have been logged.

    Args:
        cfg: The run's config.
        log: Where the metrics go.
        run: The state of the run.
        eval_metrics: Metrics of an evaluation after this update.

    Returns:
        The state without an update in flight.
    """
    run = fetch_update(cfg, log, run)
    if run.unlogged:
        log.write(run.step, run.unlogged | (eval_metrics or {}))
    return run._replace(unlogged=None)
