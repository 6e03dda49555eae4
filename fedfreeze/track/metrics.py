"""Reads a run folder as `fedfreeze sync` needs it: config.yaml, the whole lines of metrics.jsonl, status and id."""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from fedfreeze.config.file import config_values, make_config, read_yaml, told_of_writer
from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config
from fedfreeze.errors import ConfigError, DataError, ExitCode, one_line
from fedfreeze.storage.files import json_object, read_lines, told_of_reading
from fedfreeze.storage.run_folder import RunFolder
from fedfreeze.track.live import is_id, known_id

Count = Annotated[int, Field(ge=0, le=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Device = Annotated[int, Field(ge=0, lt=10**6)]

_ROUND = '{"kind": "round", '  # how the line of a round begins


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True, allow_inf_nan=False))
class RoundRecord:
    """What the tracker needs of a round; all else in its record is logged as it stands."""

    round: Count
    selected: list[Device]
    failed: dict[Device, str]
    peak_memory_mib: dict[Device, Amount]
    tensor_peak_mib: dict[Device, Amount] = Field(default_factory=dict)
    """Empty: of a revision that did not count them."""
    cap_mib: dict[Device, Amount | None]
    bytes_up: Count
    bytes_down: Count
    emulated_s: Amount | None = None
    wall_s: Amount


@dataclass(frozen=True)
class Metrics:
    """The whole lines of a metrics.jsonl. Of rounds there may be 100,000, so they stay in the file: see `records`."""

    path: Path
    starts: list[dict[str, Any]]
    """The records `run_start`: of the first life of the run, the second, ..."""
    stages: list[dict[str, Any]]
    end: dict[str, Any] | None
    """The record of the run's end; None if it has not come."""
    rounds: int
    """How many are done."""
    count: int
    """How many lines there are."""
    head: str
    """The lines up to that of the first round."""
    size: int
    """In bytes, of these lines."""
    sha256: str
    torn: bool
    """Whether a piece of a line stands after them."""

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records once more. Raises DataError where the file is no longer what it was."""
        for line in read_lines(self.path, self.size):
            yield json_object(line.text, f"{self.path} line {line.number}")


@dataclass(frozen=True)
class Source:
    """A run as its folder tells it."""

    path: Path
    config: Config
    metrics: Metrics
    status: str
    exit_code: int
    wandb_id: str


def read_source(path: Path, notice: Callable[[str], None], checked_before: Mapping[str, Any] | None = None) -> Source:
    """Return the run in a folder, as far as it went; `checked_before`: see read_metrics.

    Raises ConfigError if it is no run folder or no round is done, DataError for what is missing or damaged in one.
    """
    config = _read_config(path)
    metrics = read_metrics(path / "metrics.jsonl", checked_before)
    holder = _holder(path)
    if holder is not None:
        notice(f"{path} is in use by {holder}: synced as far as it is written; sync again when the run has ended")
    if metrics.torn:
        why = "it is being written" if holder else "as a kill leaves it"
        notice(f"{path / 'metrics.jsonl'}: the last line is not whole ({why}); left out")
    if not metrics.rounds:
        raise ConfigError(f"{path / 'metrics.jsonl'} holds no finished round; there is nothing to sync yet")
    summary = RunFolder(path).read_summary() or {}
    status, code = summary.get("status"), summary.get("exit_code")
    if metrics.end is not None:
        status, code = "finished", 0
    elif status == "finished" and not metrics.torn:
        raise DataError(
            f"{path / 'metrics.jsonl'} ends after round {metrics.rounds}, line {metrics.count}, without the end "
            "of the run; summary.json says finished: lines are missing"
        )
    elif status not in ("failed", "preempted") or not isinstance(code, int) or code == 0:
        status, code = "running", int(ExitCode.RUN_AGAIN)  # also where it was killed too hard to say otherwise
    return Source(path, config, metrics, status, code, _id_of(path, config, metrics))


def read_metrics(path: Path, checked_before: Mapping[str, Any] | None = None) -> Metrics:
    """Return what the whole lines of a metrics.jsonl come to, each checked. Raises DataError that names the line.

    `checked_before`: the note of a sync; lines of its `bytes` and `sha256` were checked then, and rounds are not again.
    """
    size, sha256, torn = _whole_lines(path)
    known = checked_before or {}
    checked = (known.get("bytes"), known.get("sha256")) == (size, sha256)
    starts: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []
    head: list[str] = []
    rounds = count = 0
    end = None
    for line in read_lines(path, size):
        count, where = line.number, f"{path} line {line.number}"
        if checked and rounds and line.text.startswith(_ROUND):
            rounds, end = rounds + 1, None
            continue
        record = json_object(line.text, where)
        kind = record.get("kind")
        if count == 1 and kind != "run_start":
            raise DataError(f"{where}: its kind is {str(kind)[:60]!r}, but a run begins with 'run_start'")
        if not isinstance(kind, str):
            raise DataError(f"{where}: lacks 'kind', which every record of a run has")
        if not rounds:
            head.append(line.text)
        if kind == "round":
            rounds += 1
            _check_round(line.text, rounds, where)
        elif kind == "run_start":
            starts.append(record)
        elif kind == "stage":
            stages.append(record)
        end = record if kind == "run_end" else None
    if not count:
        raise DataError(f"{path} holds no whole line; the run folder is not whole")
    return Metrics(path, starts, stages, end, rounds, count, "\n".join(head), size, sha256, torn)


def _whole_lines(path: Path) -> tuple[int, str, bool]:
    """Return bytes and sha256 of a file's whole lines, and whether a piece of a line stands after them."""
    digest = hashlib.sha256()
    size, rest = 0, b""
    with told_of_reading(path), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") or _is_json(line):  # of which only the end is missing
                digest.update(line)
                size += len(line)
            else:
                rest = line
    return size, digest.hexdigest(), bool(rest)


def _check_round(text: str, number: int, where: str) -> None:
    try:
        # as JSON: there, strict still takes the text "3" for the key 3 of a mapping
        found = _round_adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise DataError(f"{where}: lacks {key!r}, which every record of a round has") from None
        raise DataError(
            f"{where}: {key} is {str(first['input'])[:60]!r}: {one_line(Exception(first['msg']))}"
        ) from None
    except ValueError as error:  # NaN, which JSON does not have
        raise DataError(f"{where}: {one_line(error)[:120]}") from None
    if found.round != number:
        raise DataError(f"{where}: round {found.round} where round {number} should be")
    strange = sorted(set(found.peak_memory_mib) - set(found.cap_mib))
    if strange:
        raise DataError(f"{where}: device {strange[0]} has a peak and no entry in cap_mib")


@cache
def _round_adapter() -> TypeAdapter[RoundRecord]:
    return TypeAdapter(RoundRecord)


def _read_config(path: Path) -> Config:
    try:
        if not (path / "config.yaml").is_file():
            reason = (
                "it holds no config.yaml" if path.is_dir() else "not a folder" if path.exists() else "does not exist"
            )
            raise ConfigError(
                f"{str(path)[:200]} is not a run folder ({reason}); give the folders of runs, such as runs/digits"
            )
        with told_of_writer(path / "config.yaml"):
            return make_config(read_yaml(path / "config.yaml"))
    except OSError as error:
        raise ConfigError(f"{str(path)[:200]} cannot be read: {error.strerror or one_line(error)}") from None
    except ConfigError as error:
        text = one_line(error)
        raise (error if str(path)[:200] in text else ConfigError(f"{path / 'config.yaml'}: {text}")) from None


def _id_of(path: Path, config: Config, metrics: Metrics) -> str:
    """Return the id that the run has, or one made of what it is.

    A run that was never tracked has the same id whenever it is synced, and another one than its twin of the same
    configuration: no two have the same first round, down to the wall time.
    """
    said = [record.get("wandb_id") for record in metrics.starts]
    found = next((wandb_id for wandb_id in reversed(said) if wandb_id is not None), None) or known_id(path)
    if found is not None:
        if not is_id(found):
            raise DataError(f"{path / 'metrics.jsonl'}: wandb_id is {str(found)[:80]!r}, which wandb cannot take")
        return str(found)
    values = {section: value for section, value in config_values(config).items() if section not in RESUME_MAY_DIFFER}
    text = json.dumps(values, sort_keys=True, default=str) + metrics.head
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _holder(path: Path) -> str | None:
    """Name the process that holds the run folder; None if there is none, or it is known to be gone."""
    try:
        holder = json.loads((path / "lock").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(holder, dict) or "pid" not in holder:
        return None
    pid, host = holder["pid"], holder.get("host")
    if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
        return None
    return f"pid {pid} on {host}"


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False
