"""The worker process that grades completions: `python -m grpo_jax.rewards.worker FD`, started by `pool.py`.

A worker has no JAX, limited memory and few environment variables. It receives pickles through the inherited socket FD
and replies with JSON, so that a worker cannot make the trainer run code.
"""

import errno
import faulthandler
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from grpo_jax.config.functions import describe_error, resolve_function
from grpo_jax.errors import UserError
from grpo_jax.rewards.parts import RewardPart, grade_built_in, grade_texts
from grpo_jax.text.decoding import decode_completion

MEMORY_LIMIT = 4 * 2**30  # bytes of address space; Python with NumPy and a tokenizer takes 0.2 GiB
LIMITS = {resource.RLIMIT_AS: MEMORY_LIMIT, resource.RLIMIT_CORE: 0}


def make_grade(setup: tuple) -> Callable[[bytes, int], dict[str, Any]]:
    """Returns the function `grade(payload, stage)`, which does one stage of grading a completion and returns the reply.

    Stage 0 decodes the completion and grades it with the built-in parts. Each further stage calls a user's function.

    Raises:
        UserError: A function of the user cannot be imported.
    """
    parts: Mapping[str, RewardPart]
    parts, names, tokenizer_json, stop_ids, stop_strings = setup
    tokenizer = tokenizer_json and Tokenizer.from_str(tokenizer_json)
    functions = [(label, resolve_function(name, "reward.parts", {})) for label, name in names.items()]

    @lru_cache(maxsize=1)  # all stages of a completion read the same text, one after another
    def read_text(payload: bytes) -> str:
        _, completion, _ = pickle.loads(payload)
        if isinstance(completion, str):
            return completion
        return decode_completion(tokenizer, completion, stop_ids, stop_strings)

    def grade(payload: bytes, stage: int) -> dict[str, Any]:
        (problem, _, length), text = pickle.loads(payload), read_text(payload)
        if stage == 0:
            scores, verdict = grade_built_in(parts, problem, text, length)
            return {"text": text, "scores": scores, "verdict": verdict}
        label, function = functions[stage - 1]
        values = grade_texts(label, function, [problem], [text], np.array([length]))
        return {"scores": {label: float(values[0])}}

    return grade


def end_with(trainer: int) -> None:
    """Waits until the process `trainer` has ended, then ends this process and all processes that it has started."""
    while os.getppid() == trainer:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main(fd: int) -> None:
    """Serves the trainer at the other end of socket `fd` until the trainer closes it."""
    connection, pid, devnull = Connection(fd), os.getpid(), open(os.devnull, "w")
    os.set_inheritable(fd, False)
    os.dup2(2, 1)  # what a function prints goes to stderr, so it does not mix with the trainer's output
    for limit, value in LIMITS.items():
        with suppress(ValueError):  # the limit is already lower, or the system (macOS) does not have it
            resource.setrlimit(limit, (value, value))

    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()

    def reply(values: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(values).encode())

    try:
        setup, patience = connection.recv()
        grade = make_grade(setup)
    except UserError as error:
        return reply({"failure": str(error)})
    reply({})
    while True:
        try:
            payloads, units = connection.recv()
        except (EOFError, ConnectionError):  # the trainer has ended
            os.killpg(0, signal.SIGKILL)
        for item, stage in units:
            # If the trainer has been killed, nothing else ends a function that does not let other threads run.
            faulthandler.dump_traceback_later(patience, exit=True, file=devnull)
            try:
                values = grade(payloads[item], stage)
            except BaseException as error:  # SystemExit too
                reason = str(error) if isinstance(error, UserError) else describe_error(error)
                values = {"failure": reason}
                if isinstance(error.__cause__ or error, MemoryError):
                    os._exit(errno.ENOMEM)  # a new worker starts with free memory
            if os.getpid() != pid:  # a child that the function has forked
                os._exit(0)
            faulthandler.cancel_dump_traceback_later()  # the trainer may not read the reply for a long time
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that the function has left behind would end the next one
            reply(values | {"unit": [item, stage]})


if __name__ == "__main__":
    main(int(sys.argv[1]))
