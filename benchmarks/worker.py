"""Runs one part of `on_device.py`: `python benchmarks/worker.py PART [--small]`.

The process imports and prepares what the part needs, then reads its deadline (seconds since the epoch) from stdin and
measures. Measurements are lines of JSON on stdout; the last line has a `status`: "done", "failed" or "absent" (this
machine cannot run the part). Everything else that is printed goes to stderr. The process kills itself when stdin is
closed.
"""

import importlib
import os
import signal
import sys
import threading
import time
import traceback

from parts import NotHere, json_line


def end_with_driver() -> None:
    """Waits until stdin is closed, then kills this process and those that it has started."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main(name: str, small: bool) -> None:
    """Runs the part `name`."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the results

    def report(fields: dict) -> None:
        results.write(json_line({"part": name} | fields))
        results.flush()

    start, ending = time.time(), {"status": "done"}
    try:
        module = importlib.import_module(f"parts.{name}")
        if hasattr(module, "prepare"):
            module.prepare(small)
        deadline = float(sys.stdin.readline() or 0)
        start = time.time()
        threading.Thread(target=end_with_driver, daemon=True).start()
        for fields in module.measure(small, lambda: deadline - time.time()):
            report({"device": module.device_name()} | fields)
    except NotHere as reason:
        ending = {"status": "absent", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        ending = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}
    report(ending | {"seconds": time.time() - start})
    sys.stderr.flush()
    os._exit(0)  # does not wait for threads or processes that the part has started


if __name__ == "__main__":
    main(sys.argv[1], "--small" in sys.argv[2:])
