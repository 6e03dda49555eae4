"""Reads a run folder as `fedfreeze sync` needs it: config.yaml, the whole lines of metrics.jsonl, status and id."""

import hashlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from fedfreeze.config.file import config_values, make_config, read_yaml, told_of_writer
from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config
from fedfreeze.errors import ConfigError, DataError, ExitCode, one_line
from fedfreeze.storage.files import json_object
from fedfreeze.storage.run_folder import RunFolder
from fedfreeze.track.live import is_id, known_id

Count = Annotated[int, Field(ge=0, le=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Device = Annotated[int, Field(ge=0, lt=10**6)]


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
    """The whole lines of a metrics.jsonl."""

    records: list[dict[str, Any]]
    lines: list[str]
    size: int
    """In bytes, of these lines."""
    sha256: str
    torn: bool
    """Whether a piece of a line stands after them."""

    @property
    def rounds(self) -> int:
        """How many rounds are done."""
        return sum(record["kind"] == "round" for record in self.records)

    @property
    def end(self) -> dict[str, Any] | None:
        """The record of the run's end; None if it has not come."""
        return self.records[-1] if self.records[-1]["kind"] == "run_end" else None


@dataclass(frozen=True)
class Source:
    """A run as its folder tells it."""

    path: Path
    config: Config
    metrics: Metrics
    status: str
    exit_code: int
    wandb_id: str


def read_source(path: Path, notice: Callable[[str], None]) -> Source:
    """Return the run in a folder, as far as it went.

    Raises ConfigError if it is no run folder or no round is done, DataError for what is missing or damaged in one.
    """
    config = _read_config(path)
    metrics = read_metrics(path / "metrics.jsonl")
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
            f"{path / 'metrics.jsonl'} ends after round {metrics.rounds}, line {len(metrics.records)}, without the end "
            "of the run; summary.json says finished: lines are missing"
        )
    elif status not in ("failed", "preempted") or not isinstance(code, int) or code == 0:
        status, code = "running", int(ExitCode.RUN_AGAIN)  # also where it was killed too hard to say otherwise
    return Source(path, config, metrics, status, code, _id_of(path, config, metrics))


def read_metrics(path: Path) -> Metrics:
    """Return the whole lines of a metrics.jsonl, checked. Raises DataError that names the line."""
    content = _bytes(path)
    cut = content.rfind(b"\n") + 1
    if cut < len(content) and _is_json(content[cut:]):
        cut = len(content)  # only the end of the line is missing
    try:
        lines = content[:cut].decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text (byte {error.start} is no UTF-8)") from None
    records: list[dict[str, Any]] = []
    rounds = 0
    for number, line in enumerate(lines if cut else [], 1):
        where = f"{path} line {number}"
        record = json_object(line, where)
        if number == 1 and record.get("kind") != "run_start":
            raise DataError(f"{where}: its kind is {str(record.get('kind'))[:60]!r}, but a run begins with 'run_start'")
        if not isinstance(record.get("kind"), str):
            raise DataError(f"{where}: lacks 'kind', which every record of a run has")
        if record["kind"] == "round":
            rounds += 1
            _check_round(record, rounds, where)
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no whole line; the run folder is not whole")
    return Metrics(records, lines, cut, hashlib.sha256(content[:cut]).hexdigest(), cut < len(content))


def _check_round(record: dict[str, Any], number: int, where: str) -> None:
    try:
        # as JSON: there, strict still takes the text "3" for the key 3 of a mapping
        found = _round_adapter().validate_json(json.dumps(record))
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
    said = [record.get("wandb_id") for record in metrics.records if record["kind"] == "run_start"]
    found = next((wandb_id for wandb_id in reversed(said) if wandb_id is not None), None) or known_id(path)
    if found is not None:
        if not is_id(found):
            raise DataError(f"{path / 'metrics.jsonl'}: wandb_id is {str(found)[:80]!r}, which wandb cannot take")
        return str(found)
    values = {section: value for section, value in config_values(config).items() if section not in RESUME_MAY_DIFFER}
    first = next(number for number, record in enumerate(metrics.records) if record["kind"] == "round")
    text = json.dumps(values, sort_keys=True, default=str) + "\n".join(metrics.lines[: first + 1])
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


def _bytes(path: Path) -> bytes:
    """Return a file's content. Raises DataError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the run folder is not whole") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False
