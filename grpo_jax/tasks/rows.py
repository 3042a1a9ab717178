"""Reads the rows of a file: JSON lines, a JSON document, CSV or parquet, each also gzipped, or a Hugging Face dataset.

The format of a file is recognized by its content, not by its name. A row is a dict of JSON values, and comes with its
place, such as "line 17" (where it starts) or "row 17" (counted from 1).
"""

import csv
import difflib
import gzip
import io
import json
import os
import re
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from grpo_jax.errors import UserError
from grpo_jax.foreign import MAX_BYTES, MAX_DEPTH, MAX_LINE, open_regular, parse_json, read_lines

MAX_RATIO, MIN_BOMB = 100, 1 << 24  # compressed content that is so many times larger, and has so many bytes, is refused
BATCH_ROWS = 128  # rows of a parquet file or a dataset that are converted at a time
DATASET_ID = re.compile(r"(?!.*\.(jsonl?|csv|tsv|txt|parquet|gz)$)[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")


class RepeatedKey(NamedTuple):
    """Stands in for a JSON object with a repeated key until the row is known."""

    key: str


def most_common(names: list[str]) -> str:
    """Returns the name that is in a list most often."""
    return Counter(names).most_common(1)[0][0]


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a file or of a Hugging Face dataset (a folder, or a hub id `owner/name[:config[:split]]`).

    Raises:
        UserError: The file cannot be read, or a row is malformed; the message names the row.
    """
    is_dataset = os.path.isdir(path) or (not os.path.exists(path) and DATASET_ID.fullmatch(path))
    place = ""
    try:
        for place, row in read_dataset(path) if is_dataset else read_file(path):
            if not isinstance(row, dict | RepeatedKey):
                raise ValueError(f"{place} must be an object with named fields; found {row!a:.40}")
            yield place, plain(row, place)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror + similar_name(path)
        if isinstance(error, UnicodeEncodeError):  # of `plain`
            text = ascii(error.object[max(0, error.start - 20) : error.end])
            reason = f"{place} has half of a surrogate pair, or bytes that are not UTF-8, in {text}"
        raise UserError(f"Problems could not be read from {path}: {reason}. Correct the path or the file.") from None


def similar_name(path: str) -> str:
    """Returns a phrase with the name in the folder of a path that is most like the path's own, or ""."""
    folder, name = os.path.split(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") and not os.path.exists(path) else []
    return "".join(f"; the folder has {found}" for found in difflib.get_close_matches(name, names, 1))


def plain(value: Any, place: str, depth: int = 0) -> Any:
    """Returns a value of a row in types that JSON has.

    Raises:
        ValueError: It has a key twice in one object, text that is not Unicode, or more than `MAX_DEPTH` levels.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode().decode()
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, RepeatedKey):
        raise ValueError(f"{place} has the key {value.key!a} twice in an object")
    if depth > MAX_DEPTH:
        raise ValueError(f"{place} has more than {MAX_DEPTH} levels of nesting")
    if isinstance(value, dict):
        return {plain(str(name), place): plain(element, place, depth + 1) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element, place, depth + 1) for element in value]
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def read_file(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the places and rows of a file in any of the formats."""
    with open_regular(path) as raw:
        stream: Any = raw
        if raw.peek(2)[:2] == b"\x1f\x8b":
            check_ratio(path)
            stream = gzip.open(raw)
        head = stream.peek(4096)
        if head[:4] == b"PAR1":
            content = raw if stream is raw else io.BytesIO(stream.read(MAX_BYTES + 1))
            if stream is not raw and content.seek(0, os.SEEK_END) > MAX_BYTES:
                raise ValueError(
                    f"it is a gzipped parquet file of more than {MAX_BYTES:,} bytes, which must be unpacked"
                )
            yield from read_parquet(content)
            return
        encoding = json.detect_encoding(head[:4])  # UTF-8, or UTF-16 or UTF-32 with or without a byte order mark
        if encoding.startswith("utf-8") and b"\0" in head:
            raise ValueError("it is neither text nor parquet, because it holds zero bytes")
        # Bytes that are not UTF-8 become surrogates, which `plain` reports with their line.
        text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")
        is_json = head.decode(encoding, "ignore").lstrip()[:1] in ("", "[", "{") or ".json" in path.lower()
        yield from read_json(text) if is_json else read_table(text)


def check_ratio(path: str) -> None:
    """Raises a ValueError if the content of a gzipped file is out of proportion to its size."""
    size, largest = 0, max(MIN_BOMB, MAX_RATIO * os.path.getsize(path))
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            if size > largest:
                raise ValueError(f"its content is more than {MAX_RATIO} times as large as the gzipped file")


def read_json(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Yields the rows of JSON lines, of a JSON array, or of the only array of objects in a JSON object."""
    values = parse_lines(text)
    first = list(islice(values, 2))
    if len(first) != 1:
        yield from chain(first, values)
        return
    value = first[0][1]
    lists = [value] if isinstance(value, list) else []
    if isinstance(value, dict):
        lists = [
            v for v in value.values() if isinstance(v, list) and isinstance((v or [0])[0], dict) and "role" not in v[0]
        ]
    yield from number_rows(lists[0]) if len(lists) == 1 else first


def parse_lines(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Yields the value of each line that is not empty, or of the whole text if its first line alone is not JSON."""
    is_first = True
    for number, line in enumerate(read_lines(text), start=1):
        if not line.strip():
            continue
        try:
            value = parse_row(line)
        except ValueError as error:
            if not is_first:
                raise ValueError(f"line {number} is {error}") from None
            rest = text.read(MAX_BYTES)
            if len(rest) == MAX_BYTES:
                raise ValueError(
                    f"it has more than {MAX_BYTES:,} characters, so it must have a JSON object on each line; line "
                    f"{number} is {error}"
                ) from None
            value = parse_row("\n" * (number - 1) + line + rest)
        yield f"line {number}", value
        is_first = False


def parse_row(text: str) -> Any:
    """Parses JSON; an object that has a key twice becomes a `RepeatedKey`."""

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKey:
        names = [name for name, _ in pairs]
        return dict(pairs) if len(set(names)) == len(names) else RepeatedKey(most_common(names))

    try:
        return parse_json(text, object_pairs_hook=as_dict)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}; found {text.lstrip()[:40]!a}") from None


def read_table(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a CSV file with a header; the delimiter is a comma, a tab or a semicolon."""
    lines = read_lines(text)
    header = next((line for line in lines if line.strip()), "")
    csv.field_size_limit(MAX_LINE)
    delimiter = max(",\t;", key=header.count)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    end, has_rows = 0, False
    try:
        for values in reader:
            place, end = f"line {end + 1}", reader.line_num
            if not names:
                names = values
                if len(set(names)) < len(names):
                    raise ValueError(f"the header has the column {most_common(names)!a:.60} twice")
            elif values:
                if len(values) != len(names):
                    raise ValueError(f"{place} has {len(values)} columns, but the header has {len(names)}")
                has_rows = True
                yield place, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"the row that begins on line {end + 1} is not valid CSV: {error}") from None
    if names and not has_rows:
        raise ValueError(f"read as CSV, it has the header {delimiter.join(names)!a:.60}, but no rows")


def read_parquet(file: Any) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a parquet file, which is open for reading.

    Raises:
        ValueError: It is malformed, or its content is out of proportion to its size.
    """
    import pyarrow.parquet as pq

    bytes_left = max(MIN_BOMB, MAX_RATIO * file.seek(0, os.SEEK_END))

    def rows() -> Iterator[Any]:
        nonlocal bytes_left
        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            bytes_left -= batch.nbytes
            if bytes_left < 0:
                raise ValueError(f"its content is more than {MAX_RATIO} times as large as the compressed file")
            yield from batch.to_pylist()

    return number_rows(rows())


def read_dataset(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a dataset. Since version 4, `datasets` does not run code that comes with a dataset."""
    try:
        import datasets
    except ImportError:
        raise ValueError("reading a dataset needs `pip install datasets`") from None
    name, config, split = (path, "", "") if Path(path).is_dir() else (*path.split(":"), "", "")[:3]
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data["train"] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # of any of the libraries that it uses
        here = "it is a folder, which is read as one dataset, but "
        if not os.path.isdir(name):
            here = "there is no such file or folder, and as the id of a dataset on the hub, "
        cause = error.__cause__ or error  # `datasets` wraps what says more
        raise ValueError(f"{here}the package `datasets` raised {type(cause).__name__}: {cause}") from None
    batches = data.with_format("arrow").iter(BATCH_ROWS)
    return number_rows(chain.from_iterable(batch.to_pylist() for batch in batches))


def number_rows(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yields rows with their places, counted from 1."""
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))
