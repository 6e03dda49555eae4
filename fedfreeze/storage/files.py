"""Files that are written whole or not at all, and lines and JSON objects that are checked when they are read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfreeze.errors import DataError, one_line


@dataclass(frozen=True)
class Line:
    """A line of a text file, without its end."""

    number: int
    """From 1."""
    text: str
    ended: bool
    """Whether a line feed ends it; the last one's may be missing."""


def read_lines(path: Path, size: int | None = None) -> Iterator[Line]:
    """Yield the lines of a text file one by one, so that it need not fit into memory; of `size`: its first bytes.

    Raises DataError where it is missing, cannot be read or is not text.
    """
    begin = 0
    with told_of_reading(path), open(path, "rb") as file:
        for number, content in enumerate(file, 1):
            if size is not None and begin >= size:
                return
            whole = content if size is None else content[: size - begin]
            yield Line(number, decoded(path, whole.removesuffix(b"\n"), begin), whole.endswith(b"\n"))
            begin += len(content)


@contextmanager
def told_of_reading(path: Path) -> Iterator[None]:
    """Turn what reading a file of a run folder raises inside into one line. Raises DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the run folder is not whole") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def decoded(path: Path, content: bytes, begin: int = 0) -> str:
    """Return the text of a file's bytes from `begin` on. Raises DataError."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text (byte {begin + error.start} is no UTF-8)") from None


def json_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object. Raises DataError for anything else, also for NaN, which JSON does not have."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {one_line(error)[:120]}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
