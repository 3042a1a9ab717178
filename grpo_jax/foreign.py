"""Opens and parses files from other people, within limits, so that none can hang a program or exhaust its memory.

Only regular files are opened, because a device or a pipe may never end. SECURITY.md describes what is protected.
"""

import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

MAX_BYTES = 1 << 26  # of a file that is read in one piece; a tokenizer.json with 262,144 tokens has 33 MB
MAX_LINE = 1 << 24  # bytes or characters of a line
MAX_DEPTH = 100  # levels of nesting
MAX_VALUES = 2_000_000  # a parsed value takes up to about 120 bytes

# A JSON string, or a character that begins a value or separates values.
_STRING_OR_VALUE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{,:]', re.DOTALL)


def open_regular(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading bytes.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
        ValueError: The path contains a zero byte or cannot be encoded.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)  # opening a pipe would otherwise wait for its writer
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", name)

    return open(path, "rb", opener=opener)


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the content of a file.

    Raises:
        OSError: It cannot be read, or is not a regular file.
        ValueError: It has more than `max_bytes` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes and len(content := file.read(max_bytes + 1)) <= max_bytes:
            return content
    raise ValueError(f"{path} has more than {max_bytes:,} bytes")


def read_json_file(path: str | Path, **options: Callable[..., Any]) -> Any:
    """Returns the value that a JSON file holds.

    Args:
        path: The file.
        **options: Options of `json.loads`.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: It is not JSON in UTF-8, or exceeds a limit (see `read_bytes` and `parse_json`).
    """
    return parse_json(read_bytes(path).decode("utf-8"), **options)


def parse_json(text: str, **options: Callable[..., Any]) -> Any:
    """Parses JSON.

    Args:
        text: The text.
        **options: Options of `json.loads`.

    Raises:
        ValueError: It is not JSON, has more than `MAX_DEPTH` levels of nesting, or more than `MAX_VALUES` values.
    """
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") + text.count(":") > MAX_VALUES:  # most of them may be in strings
        if sum(match[0][0] != '"' for match in _STRING_OR_VALUE.finditer(text)) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting") from None
    if opened > MAX_DEPTH and is_deep(value):
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
    return value


def is_deep(value: Any) -> bool:
    """Returns whether a parsed value has more than `MAX_DEPTH` levels of nesting."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list | tuple)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, dict | list | tuple)
    ]:
        depth += 1
        if depth >= MAX_DEPTH:
            return True
    return False


def read_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yields the lines of a file of bytes or text, including their line ends.

    Raises:
        ValueError: A line has more than `MAX_LINE` bytes or characters.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} has more than {MAX_LINE:,} bytes or characters")
        yield line


def name_problem(path: str | Path) -> str:
    """Returns why no file can have this path, for example because a part is too long; "" if one can."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return ""
