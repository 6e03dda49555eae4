"""Reads the folder of a run: config.yaml, metrics.jsonl (the truth), summary.json and partition.csv."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from fedfreeze.config.file import read_yaml, values_before
from fedfreeze.config.schema import CODE_KEYS
from fedfreeze.errors import ConfigError, DataError, one_line
from fedfreeze.storage.files import decoded, json_object, read_lines, told_of_reading

# Strict, but for keys that it does not know: a later revision may write more.
_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, le=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(ge=0, le=1)]
Device = Annotated[int, Field(ge=0, lt=10**6)]


@checked(frozen=True, kw_only=True, config=_STRICT)
class _RoundLine:
    """What a round's line must hold."""

    round: Count
    stage: Count
    accuracy: Share | None
    perturbation: float | None
    peak_memory_mib: dict[Device, Amount]
    cap_mib: dict[Device, Amount | None]
    bytes_up: Count
    bytes_down: Count
    emulated_s: Amount | None = None
    flops: Amount | None = None
    way: dict[Device, str] | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What is compared of a round; without the caps, which are the fleet's, as there may be 100,000 of these."""

    round: int
    stage: int
    accuracy: float | None
    perturbation: float | None
    peak_memory_mib: dict[int, float]
    """Of the devices that completed."""
    bytes_up: int
    bytes_down: int
    emulated_s: float | None
    """None: of a revision without an emulated clock."""
    flops: float | None
    """None: of a revision that did not count them."""
    ways: dict[str, int] | None = None
    """By way (`train.fit`) how many of the devices that completed went it; None: of a revision that did not note it."""


@checked(frozen=True, kw_only=True, config=_STRICT)
class StageRecord:
    """What is compared of a stage."""

    stage: Count
    reason: str
    rounds: Count


@checked(frozen=True, kw_only=True, config=_STRICT)
class CodeChange:
    """That the user's own code was another one until a round."""

    round: Count
    modules: list[str]
    before: dict[str, str]


@checked(frozen=True, kw_only=True, config=_STRICT)
class Summary:
    """What is taken from summary.json: what metrics.jsonl does not say."""

    status: Literal["running", "finished", "preempted", "failed"]
    full_memory_mib: Amount | None = None
    inclusion: Share | None = None
    small_batch_share: Share | None = None
    rounds: Count | None = None
    num_classes: Count | None = None
    image_shape: list[int] | None = None
    world_size: Count | None = None
    backend: str | None = None
    device: str | None = None
    cap_enforcement: str | None = None
    git_revision: str | None = None
    own_code: dict[str, str] | None = None
    """Digests of the user's own code by module; None: of a revision that did not note them."""
    code_changes: list[CodeChange] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class DeviceRow:
    """A device of the fleet."""

    number: int
    cap_mib: float | None
    """None: not capped, or not known (a run without partition.csv in which it never was selected)."""


@dataclass(frozen=True)
class Run:
    """A run as it stands in its folder."""

    path: Path
    config: dict[str, Any]
    """Values by key (`train.rounds`); keys of later revisions than the run's have what it did."""
    rounds: tuple[RoundRecord, ...]
    stages: tuple[StageRecord, ...]
    summary: Summary
    devices: tuple[DeviceRow, ...]
    num_classes: int | None
    notices: tuple[str, ...] = field(default=())

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.status == "finished"


def read_run(path: Path) -> Run:
    """Return the run in a folder.

    Raises ConfigError if it is no run folder or no round is done, DataError for what is missing or damaged in one.
    """
    _check_run_folder(path)
    config = _read_config(path / "config.yaml")
    summary = _read_summary(path / "summary.json")
    if any(":" in str(config.get(key)) for key in CODE_KEYS):
        config["own_code"] = _code_of(summary)
    metrics = _read_metrics(path / "metrics.jsonl", summary)
    rounds, stages, notices = metrics.rounds, metrics.stages, metrics.notices
    devices, classes = _read_devices(path / "partition.csv", config["fleet.devices"], metrics.caps_mib, notices)
    if metrics.largest[0] >= len(devices):
        device, number = metrics.largest
        raise DataError(f"{path / 'metrics.jsonl'}: round {number} names device {device}; there are {len(devices)}")
    if summary.status != "finished":
        count = f"{len(rounds)} round{'s' * (len(rounds) > 1)}"
        notices.append(f"{path} is not finished (status {summary.status}): compared as far as it went, {count}")
    for change in summary.code_changes:
        notices.append(f"{path}: its own code changed after round {change.round} ({', '.join(change.modules)})")
    num_classes = summary.num_classes or classes
    return Run(path, config, tuple(rounds), tuple(stages), summary, devices, num_classes, tuple(notices))


def _code_of(summary: Summary) -> str:
    """Return what is the same for two runs exactly if their users' code was, all along."""
    if summary.own_code is None:
        return "unknown"
    before = [f"{_digest(change.before)} until round {change.round}" for change in summary.code_changes]
    return ", then ".join([*before, _digest(summary.own_code)])


def _digest(code: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:8]


def _check_run_folder(path: Path) -> None:
    try:
        if (path / "config.yaml").is_file():
            return
        reason = "it holds no config.yaml" if path.is_dir() else "not a folder" if path.exists() else "does not exist"
    except OSError as error:
        reason = error.strerror or one_line(error)
    raise ConfigError(
        f"{str(path)[:200]} is not a run folder ({reason}); give the folders of runs, such as runs/digits"
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Return every key with its value. Raises DataError."""
    _text(path)  # tells what is not text
    try:
        values = read_yaml(path)
        json.dumps(values, sort_keys=True, default=str)  # no value within itself, no keys that cannot be sorted
    except ConfigError as error:
        raise DataError(one_line(error)) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} holds a value that no run has: {one_line(error)[:120]}") from None
    found = dict(_before())
    for section, value in values.items():
        if isinstance(value, dict):
            found |= {f"{section}.{name}": item for name, item in value.items()}
        else:
            found[section] = value
    for key, kind in (("seed", int), ("method.name", str), ("select.name", str), ("fleet.devices", int)):
        written = values.get(key.partition(".")[0])
        if isinstance(written, dict):
            written = written.get(key.partition(".")[2])
        if not isinstance(written, kind) or isinstance(written, bool):
            raise DataError(f"{path}: {key} is {written!r}; a run's configuration has {kind.__name__} there")
    if not 1 <= found["fleet.devices"] <= 10**6:
        raise DataError(f"{path}: fleet.devices is {found['fleet.devices']}, not 1 to 1000000")
    return found


@cache
def _before() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section, value in values_before().items():
        if isinstance(value, dict):
            found |= {f"{section}.{name}": item for name, item in value.items()}
        else:
            found[section] = value
    return found


def _read_summary(path: Path) -> Summary:
    text = _text(path)
    json_object(text, str(path))
    return _checked_text(Summary, text, str(path))


@dataclass
class _Metrics:
    """What metrics.jsonl has told so far."""

    rounds: list[RoundRecord] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    caps_mib: dict[int, float | None] = field(default_factory=dict)
    """Of the devices that were selected."""
    largest: tuple[int, int] = (-1, 0)
    """The largest number of a device, and the first round that names it."""

    def add_round(self, found: _RoundLine) -> None:
        """Take a round."""
        self.caps_mib.update(found.cap_mib)
        largest = max([*found.peak_memory_mib, *found.cap_mib], default=-1)
        if largest > self.largest[0]:
            self.largest = (largest, found.round)
        self.rounds.append(
            RoundRecord(
                found.round,
                found.stage,
                found.accuracy,
                found.perturbation,
                found.peak_memory_mib,
                found.bytes_up,
                found.bytes_down,
                found.emulated_s,
                found.flops,
                None if found.way is None else _ways(found.way, found.peak_memory_mib),
            )
        )


def _ways(way: dict[int, str], completed: Iterable[int]) -> dict[str, int]:
    return dict(Counter(way[device] for device in completed if device in way))


def _read_metrics(path: Path, summary: Summary) -> _Metrics:
    """Return what the lines hold. Raises DataError for a damaged file, ConfigError if no round is done."""
    metrics = _Metrics()
    ended = False
    count = 0
    for line in read_lines(path):
        if not line.ended and summary.status != "finished" and not _is_json(line.text):
            metrics.notices.append(f"{path}: the last line is cut, as a kill leaves it; left out")
            break
        count = line.number
        where = f"{path} line {line.number}"
        kind = json_object(line.text, where).get("kind")
        if not isinstance(kind, str):
            raise DataError(f"{where}: lacks 'kind', which every record of a run has")
        if kind == "round":
            found = _checked_text(_RoundLine, line.text, where)
            if found.round != len(metrics.rounds) + 1:
                raise DataError(f"{where}: round {found.round} where round {len(metrics.rounds) + 1} should be")
            metrics.add_round(found)
        elif kind == "stage":
            metrics.stages.append(_checked_text(StageRecord, line.text, where))
        ended = kind == "run_end"
    done = len(metrics.rounds)
    if summary.status == "finished" and (not ended or summary.rounds not in (None, done)):
        raise DataError(
            f"{path} ends after round {done}, line {count}, without the end of the run; summary.json says "
            f"finished after {summary.rounds} rounds: lines are missing"
        )
    if not metrics.rounds:
        raise ConfigError(f"{path} holds no finished round; there is nothing to compare yet")
    return metrics


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_devices(
    path: Path, count: int, seen: dict[int, float | None], notices: list[str]
) -> tuple[tuple[DeviceRow, ...], int | None]:
    """Return the fleet, and the number of classes where the file tells it. Raises DataError."""
    if not path.exists():
        notices.append(f"{path} is missing: the caps of devices that never were selected are not known")
        return tuple(DeviceRow(number, seen.get(number)) for number in range(count)), None
    rows = csv.DictReader(io.StringIO(_text(path)))
    devices: list[DeviceRow] = []
    try:
        for number, row in enumerate(rows):
            if int(row["device"]) != number:
                raise ValueError(f"device {row['device']} where device {number} should be")
            cap = float(row["memory_cap_mib"]) if row["memory_cap_mib"] else None
            if cap is not None and not 0 < cap < 1e18:
                raise ValueError(f"a cap of {cap} MiB")
            devices.append(DeviceRow(number, cap))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path} line {rows.line_num} is not a line of a partition: {one_line(error)}") from None
    if len(devices) != count:
        raise DataError(f"{path} holds {len(devices)} devices; fleet.devices of config.yaml is {count}")
    classes = sum(name.startswith("label_") for name in rows.fieldnames or [])
    return tuple(devices), classes or None


def _text(path: Path) -> str:
    """Return a file's text. Raises DataError."""
    with told_of_reading(path):
        return decoded(path, path.read_bytes())


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _checked_text(kind: type, text: str, where: str) -> Any:
    """Return a JSON object as a record of this kind. Raises DataError."""
    try:
        # as JSON: there, strict still takes the text "3" for the key 3 of a mapping
        return _adapter(kind).validate_json(text)
    except (ValidationError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise DataError(f"{where}: {one_line(error)[:120]}") from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise DataError(f"{where}: lacks {key!r}, which every such record has") from None
        raise DataError(
            f"{where}: {key} is {str(first['input'])[:60]!r}: {one_line(Exception(first['msg']))}"
        ) from None
