"""Files that are written whole or not at all, and JSON objects that are checked when they are read."""

import json
import os
from pathlib import Path
from typing import Any

from fedfreeze.errors import DataError, one_line


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
