"""The parts of `on_device.py`. `worker.py` runs each in a process of its own.

A part is a module with two functions, and may have a third:

    measure(small, seconds_left)  yields a dict per measurement, as soon as it is known. `small` asks for shapes that
                                  two CPU cores can handle. `seconds_left()` returns the time until the part is killed.
                                  What would not fit is left out: {"left_out": what, "reason": why}
    device_name()                 returns the name of the device that the part measures on
    prepare(small)                does what takes time and does not need the device, while an earlier part measures

`on_device.py` reads two fields of a measurement:

    ok    whether the results are right
    aim   {"name": ..., "measured": ..., "aim": ...}: `measured` ought to be at least `aim`
"""

import json
import math
from typing import Any


class NotHere(Exception):
    """Says why this machine cannot run a part, which does not count as a failure."""


def round_floats(value: Any) -> Any:
    """Returns a JSON value with floats rounded to 4 significant digits, and None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: round_floats(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(element) for element in value]
    return value


def json_line(fields: dict[str, Any]) -> str:
    """Formats a measurement as one line of JSON."""
    return json.dumps(round_floats(fields)) + "\n"
