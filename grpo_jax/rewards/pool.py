"""Grades completions, in the trainer or in a pool of worker processes that are replaced if they hang or die."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.config.functions import function_label
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.rewards.parts import RewardPart, grade_built_in, grade_texts, is_built_in
from grpo_jax.text.answers import Verdict
from grpo_jax.text.decoding import decode_completion, tokenizer_backend
from grpo_jax.text.problem import Problem

# The trainer grades with the built-in parts itself until this much time has passed; workers then grade the rest.
SECONDS_IN_TRAINER = 1.0

START_SECONDS = 60.0  # how long a worker may take to start, or to grade one completion with the built-in parts
MAX_WORKERS, MAX_CHUNK = 32, 64  # workers, and units of work that a worker receives at once
HOPELESS = 20  # if a function has timed out this often and never returned, the run stops at once

# The environment of the workers: none of the user's access tokens or keys, no extra threads and no accelerator.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
VARIABLES = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "JAX_PLATFORMS": "cpu"}
VARIABLES |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
VARIABLES |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}

FAILURES = "timeout", "error"  # the kinds of failure

Unit = tuple[int, int]  # a unit of work: the index of a completion, and a stage of its grading (`worker.make_grade`)
Reply = dict[str, Any]

START: Unit = (-1, 0)  # the unit of a worker that is not ready yet


class Grades(NamedTuple):
    """The grades of N completions."""

    texts: list[str]
    scores: dict[str, Float[np.ndarray, " N"]]  # float32, by part; and by kind of failure: 1 if a part failed that way
    verdicts: list[Verdict | None]  # why the accuracy is 0 or 1; None if it is not one of the parts
    failures: list[list[str]]  # "timeout in PART." or "error in PART: REASON" for each part without a score


@dataclass
class Worker:
    """A worker process, as the trainer sees it."""

    process: subprocess.Popen
    connection: Connection
    units: deque[Unit]  # its unfinished work; it is working on the first unit
    since: float  # when it began with that unit

    def stop(self) -> int:
        """Kills the process and all processes that it has started, and returns its exit code."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


def most_at_work() -> int:
    """Returns how many workers may grade at the same time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MAX_WORKERS)


class Grader:
    """Grades completions with the reward parts of a run.

    Built-in parts run in the trainer, or in worker processes if there are many completions. Functions that the config
    names run in workers, and functions that were passed to `grpo_jax.train` run in the trainer.

    A unit of work is one stage of one completion: stage 0 decodes the completion and grades it with the built-in parts,
    and each further stage calls one function of the user. If a worker takes too long for a unit or dies while working
    on it, the unit fails, the worker is replaced, and its other units return to the queue. No unit is lost or done
    twice.
    """

    def __init__(self, cfg: Config, parts: Mapping[str, RewardPart], tokenizer: Any, stop_ids: Sequence[int]):
        """Prepares the grading of a run without starting workers.

        Args:
            cfg: The run's config.
            parts: The reward parts by label: those of `resolve_parts`, or those that were passed to `grpo_jax.train`.
            tokenizer: A `transformers` tokenizer.
            stop_ids: Token ids that end a completion.
        """
        self.parts, self.tokenizer, self.stops = parts, tokenizer, (tuple(stop_ids), cfg.rollout.stop_strings)
        self.deadline, self.workers = cfg.reward.deadline, list[Worker]()
        self.spares = 0  # workers that are kept ready to replace one that hangs or dies
        names = {function_label(name): name for name in cfg.reward.parts if ":" in name}
        self.built_in = {label: part for label, part in parts.items() if is_built_in(part)}
        self.functions = {label: name for label, name in names.items() if label in parts.keys() - self.built_in.keys()}
        self.stages = "the built-in parts", *self.functions
        self.clear()

    def clear(self) -> None:
        """Discards the completions of the last batch."""
        self.payloads: dict[int, tuple] = {}  # by index: the problem, the tokens or the text, and the length
        self.queue: deque[Unit] = deque()
        self.replies: dict[Unit, Reply] = {}
        self.tally: Counter[tuple[int, str]] = Counter()  # of (stage, kind of failure or "")
        self.failed: dict[int, str] = {}  # the first failure of each completion that has one

    def start(self) -> None:
        """Starts a worker and waits until it is ready, if the config names functions.

        Raises:
            UserError: The worker does not start, or cannot import a function.
        """
        if self.functions and not self.workers:
            self.start_worker()
            while self.workers[0].units:
                self.turn(0.1)

    def close(self) -> None:
        """Ends the workers."""
        while self.workers:
            self.workers.pop().stop()

    def start_worker(self) -> None:
        """Starts a worker, without waiting until it is ready."""
        connection, inherited = Pipe()
        environ = VARIABLES | {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        command = [sys.executable, "-P", "-m", "grpo_jax.rewards.worker", str(inherited.fileno())]
        # The worker gets its own session, so that killing its process group also ends what a function has started.
        options: Any = dict(pass_fds=[inherited.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        process = subprocess.Popen(command, env=environ, **options)
        inherited.close()
        self.workers.append(Worker(process, connection, deque([START]), time.monotonic()))
        backend = tokenizer_backend(self.tokenizer)
        setup = self.built_in, self.functions, backend and backend.to_str(), *self.stops
        with suppress(OSError):  # if the worker is gone, `turn` finds out
            connection.send((setup, 2 * max(self.deadline, START_SECONDS)))

    def submit(self, item: int, problem: Problem, tokens: np.ndarray) -> None:
        """Queues completion number `item` of the batch for the workers, unless it is queued already."""
        if item not in self.payloads:
            completion = tokens if tokenizer_backend(self.tokenizer) else self.decode(tokens)
            self.payloads[item] = problem, completion, len(tokens)
            self.queue.extend((item, stage) for stage in range(len(self.stages)))

    def collect(self) -> None:
        """Waits until all queued completions are graded.

        Raises:
            UserError: More than half of them failed, or a function never returns.
        """
        count, stages = len(self.payloads), range(len(self.stages))
        while True:
            hopeless = any(self.tally[n, "timeout"] >= HOPELESS and not self.tally[n, ""] for n in stages)
            if hopeless or 2 * len(self.failed) > count:
                raise UserError(
                    f"Reward parts must grade at least half of the completions; {len(self.failed)} of {count} failed. "
                    f"Correct the function, or raise reward.deadline={self.deadline:g} if it needs more seconds. The "
                    f"first failure: {next(iter(self.failed.values()))}"
                )
            if not self.queue and not any(worker.units for worker in self.workers):
                return
            self.turn(0.2)

    def turn(self, timeout: float) -> None:
        """Hands out work, waits up to `timeout` seconds for replies, and replaces workers that hang or have died."""
        most, idle = most_at_work(), [worker for worker in self.workers if not worker.units]
        needed = min(most + self.spares, len(self.workers) - len(idle) + len(self.queue))
        for _ in range(needed - len(self.workers)):
            self.start_worker()
        working = sum(1 for worker in self.workers if worker.units and worker.units[0] != START)
        for worker in idle[: max(0, min(most - working, len(self.queue)))]:
            # Small chunks if little work is left, so that all workers finish at about the same time.
            count = min(MAX_CHUNK, len(self.queue) // (2 * most) + 1)
            worker.units.extend(self.queue.popleft() for _ in range(min(count, len(self.queue))))
            worker.since = time.monotonic()
            with suppress(OSError):
                payloads = {item: pickle.dumps(self.payloads[item]) for item, _ in worker.units}
                worker.connection.send((payloads, list(worker.units)))
        wait([worker.connection for worker in self.workers], timeout)
        for worker in list(self.workers):
            # It may have ended even if the socket is open, because a child process still holds the other end.
            ended = worker.process.poll() is not None
            try:
                while worker.connection.poll():
                    reply = json.loads(worker.connection.recv_bytes(2**30))
                    if tuple(reply.pop("unit", START)) != worker.units[0]:
                        raise ValueError("a function has written to the socket")
                    self.store(worker.units.popleft(), reply, "error" if "failure" in reply else "")
                    worker.since = time.monotonic()
            except (EOFError, OSError, ValueError, IndexError):
                ended = True
            in_function = worker.units and worker.units[0][1]
            limit = self.deadline if in_function else max(self.deadline, START_SECONDS)
            if ended or (worker.units and time.monotonic() - worker.since > limit):
                self.replace(worker, "error" if ended else "timeout")

    def replace(self, worker: Worker, kind: str) -> None:
        """Ends a worker. The unit that it is working on fails, and its other units return to the queue."""
        code, self.spares = worker.stop(), 1  # from now on, since a function that fails once often fails again
        self.workers.remove(worker)
        if worker.units:
            reason = "ran out of memory" if code == errno.ENOMEM else f"ended with exit code {code}"
            self.store(worker.units.popleft(), {"failure": f"Its process {reason}."}, kind)
        self.queue.extend(worker.units)

    def store(self, unit: Unit, reply: Reply, kind: str) -> None:
        """Stores the reply for a unit. If `kind` is a kind of failure, `reply["failure"]` says why.

        Raises:
            UserError: A worker did not start, or cannot import a function.
        """
        item, stage = unit
        if kind and unit == START:
            raise UserError(
                f"Workers that grade completions must start within {START_SECONDS:g} seconds; one failed: "
                f"{reply['failure']} Workers see none of your environment variables except "
                f"{', '.join(KEPT_VARIABLES)}. Correct the function, or pass it to grpo_jax.train(rewards=...), which "
                "calls it in the trainer."
            )
        if kind:
            reason = f"{kind} in {self.stages[stage]}" + (f": {reply['failure']}" if kind == "error" else ".")
            reply |= {"failure": reason, "scores": {kind: 1.0}}
            self.failed.setdefault(item, reason)
        if unit != START:
            self.replies[unit] = reply
            self.tally[stage, kind] += 1

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of a completion."""
        return decode_completion(self.tokenizer, tokens, *self.stops)

    def grade(
        self, problems: Sequence[Problem], tokens: Int[np.ndarray, "N S"], lengths: Int[np.ndarray, " N"]
    ) -> Grades:
        """Grades N completions.

        Args:
            problems: The problem of each completion.
            tokens: Their tokens, padded.
            lengths: Their lengths in tokens.

        Raises:
            UserError: A function from Python raises or does not return N finite numbers, or functions that the config
                names fail for more than half of the completions.
        """
        self.start()
        start, rows = time.thread_time(), [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        for item, (problem, row) in enumerate(zip(problems, rows, strict=True)):
            if self.workers or time.thread_time() - start > SECONDS_IN_TRAINER:
                self.submit(item, problem, row)
            else:
                text = self.decode(row)
                graded, verdict = grade_built_in(self.built_in, problem, text, len(row))
                self.replies[item, 0] = {"text": text, "scores": graded, "verdict": verdict}
        self.collect()
        replies, scores = self.replies, {label: np.zeros(len(rows), np.float32) for label in (*self.parts, *FAILURES)}
        self.clear()
        failures: list[list[str]] = [[] for _ in rows]
        for (item, _), reply in sorted(replies.items()):
            failures[item] += [reply["failure"]] if "failure" in reply else []
            for label, score in reply["scores"].items():
                scores[label][item] = score
        texts = [replies[item, 0].get("text") or self.decode(row) for item, row in enumerate(rows)]
        verdicts = [replies[item, 0].get("verdict") for item in range(len(rows))]
        for label, part in self.parts.items():
            if label not in self.built_in and label not in self.functions:
                scores[label] = grade_texts(label, part, problems, texts, lengths)
        return Grades(texts, scores, [verdict and Verdict(*verdict) for verdict in verdicts], failures)
