"""Reads CSV files of devices: a line a device, a column a figure; every mistake is one line."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from fedfreeze.errors import ConfigError
from fedfreeze.fleet.classes import nearest

# The figures of a device, as columns and as keys of `fleet`, and what a value of each is called.
COLUMNS = {
    "memory_cap_mib": "a cap in MiB",
    "speed_gflops": "a speed in GFLOP/s",
    "up_mbit_s": "an upload in Mbit/s",
    "down_mbit_s": "a download in Mbit/s",
    "availability": "a share of the time",
}


def read_fleet_csv(
    path: Path, devices: int, *, where: str, needed: Sequence[str] = (), only_known: bool = False
) -> dict[str, list[float]]:
    """Return the figures in a file, each in the order of the devices 0 ... devices-1.

    `where` begins each message. `needed`: columns that must be there, beside `device`. `only_known`: a column that is
    no figure is a mistake; else it is passed over, so that a run's partition.csv can be given. Values are numbers here
    and no more: their ranges are the caller's. Raises ConfigError.
    """
    where = f"{where}: {path}"
    columns, rows = _rows(path, where)
    if not columns:
        raise ConfigError(f"{where}: the file is empty, so device 0 is missing; fleet.devices is {devices}")
    _check_columns(where, columns, ["device", *needed], only_known)
    figures = [column for column in columns if column in COLUMNS]
    found: dict[int, list[float]] = {}
    for line, row in rows:
        if len(row) > len(columns):
            raise ConfigError(f"{where}: line {line} has {len(row)} values for {len(columns)} columns")
        cells = dict(zip(columns, row, strict=False))
        for column in ("device", *figures):
            if cells.get(column, "") == "":
                raise ConfigError(f"{where}: line {line} has no {column}; give each line a value for every column")
        device = _device(where, line, cells["device"], figures)
        if device in found:
            raise ConfigError(f"{where}: line {line} gives device {device} a second time")
        found[device] = [_number(where, line, cells[column], column) for column in figures]
    missing = next((device for device in range(devices) if device not in found), None)
    if missing is not None or len(found) > devices:
        said = f"it lists {len(found)} devices" if missing is None else f"device {missing} is missing"
        raise ConfigError(f"{where}: {said}; fleet.devices is {devices}, numbered 0 to {devices - 1}")
    return {column: [found[device][i] for device in range(devices)] for i, column in enumerate(figures)}


def _rows(path: Path, where: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the first line and the others with their numbers; empty lines do not count."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark at the start
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where} cannot be read: {reason}") from None
    return (lines[0][1], lines[1:]) if lines else ([], [])


def _check_columns(where: str, columns: list[str], needed: list[str], only_known: bool) -> None:
    listed = ", ".join(columns)
    shown = repr(listed if len(listed) <= 80 else f"{listed[:80]}...")  # whatever bytes a wrong file begins with
    if len(set(columns)) < len(columns):
        raise ConfigError(f"{where}: a column is named twice ({shown})")
    known = ["device", *COLUMNS]
    unknown = [column for column in columns if column not in known]
    missing = [column for column in needed if column not in columns]
    if unknown and (only_known or missing):
        strange = unknown[0][:40]
        lack = f", and line 2 has no {missing[0]}" if missing else ""
        raise ConfigError(
            f"{where}: unknown column {strange!r}{lack}{nearest(strange, known)}; the first line must name the "
            f"columns; allowed: {', '.join(known)}"
        )
    if missing:
        raise ConfigError(
            f"{where}: line 2 has no {missing[0]}; the first line must name the columns {' and '.join(needed)}, it "
            f"names {shown}"
        )


def _device(where: str, line: int, text: str, figures: list[str]) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        value = f" and {COLUMNS[figures[0]]}" if len(figures) == 1 else ""
        raise ConfigError(f"{where}: line {line} is not a device number{value}: {text[:40]!r}")
    return int(text)


def _number(where: str, line: int, text: str, column: str) -> float:
    try:
        if "_" in text:  # Python's own way to write 1000
            raise ValueError
        return float(text)
    except ValueError:
        raise ConfigError(
            f"{where}: line {line} is not a device number and {COLUMNS[column]}: {column} is {text[:40]!r}"
        ) from None
