"""The run folder: its lock, config.yaml, data.json, metrics.jsonl and summary.json."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import fedfreeze
from fedfreeze.comm.slurm import job_has_ended
from fedfreeze.config.file import (
    config_values,
    filled_up,
    read_yaml,
    resume_difference,
    writer_of,
    written_config,
)
from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config
from fedfreeze.errors import ConfigError, storage_error
from fedfreeze.storage import lock
from fedfreeze.storage.files import write_whole


class RunFolder:
    """A run's folder on disk; rank 0 alone holds it."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.data_path = path / "data.json"
        self.model_path = path / "model.safetensors"
        self.stop_path = path / "stop"
        self._save_path = path / "save"
        self._lock_path = path / "lock"
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def open(self, config: Config) -> list[str]:
        """Create or take the folder, lock it and hold its configuration against ours. Return notices for the user.

        Nothing is written but the lock: a run that turns out to be impossible leaves nothing behind.

        Raises ConfigError if it is in use or belongs to another configuration, StorageError if it cannot be written.
        """
        try:
            self._made = [parent for parent in (self.path, *self.path.parents) if not parent.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            notices = self._lock()
        except OSError as error:
            self._unmake()
            raise storage_error("use run folder", self.path, error) from None
        try:
            notices += self._check_config(config)
        except BaseException:
            self.close()
            raise
        return notices

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            lock.give_back(self._descriptor, self._lock_path)
            self._descriptor = None
            self._unmake()

    def _unmake(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: a run has begun in it; or it could not be made
                folder.rmdir()

    def claim(self, config: Config) -> None:
        """Write config.yaml: from now on the folder belongs to this run. Raises StorageError."""
        _write(self.path / "config.yaml", written_config(config))

    def _lock(self) -> list[str]:
        descriptor = lock.take(self._lock_path, wait=False)
        if descriptor is None:
            holder = self._holder() or {}
            raise ConfigError(
                f"run folder {self.path} is in use by pid {holder.get('pid', '?')} on {holder.get('host', '?')}; "
                "wait for it or use --run-dir"
            )
        try:
            notices = self._check_last_holder(descriptor)
        except BaseException:
            lock.give_back(descriptor, self._lock_path, delete=False)
            raise
        try:
            me = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "job": os.environ.get("SLURM_JOB_ID"),
                "boot": lock.boot_id(),
                "at": time.time(),
            }
            text = json.dumps(me).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
        except BaseException:
            lock.give_back(descriptor, self._lock_path)
            raise
        self._descriptor = descriptor
        return notices

    def _holder(self) -> dict[str, Any] | None:
        return _read_object(self._lock_path)

    def _check_last_holder(self, descriptor: int) -> list[str]:
        """What the file says counts too: the kernel's lock may not reach other hosts, or not exist on this disk.

        Where the last holder lived under this same kernel, its lock is told by the kernel alone: a container that is
        started again has another host name.
        """
        if self._lock_path.stat().st_size == 0:
            return []
        holder = self._holder()
        if holder is None:
            return ["took over an unreadable lock"]
        host, pid, job = holder.get("host", "?"), holder.get("pid"), holder.get("job")
        same_job = job is not None and job == os.environ.get("SLURM_JOB_ID")  # requeued: its last life is over
        boot, ours = holder.get("boot"), lock.boot_id()
        known = boot is not None and ours is not None
        here = host == socket.gethostname()
        elsewhere = host != "?" and not here
        if known and boot == ours and lock.is_locked(descriptor):
            elsewhere = False  # it was ours to take, so whoever had it is gone
        elif known and boot != ours and here:
            # this machine before it was started anew; or one of the same name, that has locked it since
            here, elsewhere = False, _number(holder.get("at")) > lock.booted_at_s() > 0
        if elsewhere and not same_job and not job_has_ended(job):
            raise ConfigError(
                f"run folder {self.path} is locked by pid {pid} on {host} (job {job}); if that run is "
                f"gone, delete {self._lock_path}"
            )
        if here and pid is not None and _process_start(pid) == holder.get("started") is not None:
            raise ConfigError(f"run folder {self.path} is in use by pid {pid} on {host}; wait for it or use --run-dir")
        return [f"took over the lock of pid {pid} on {host}, which is gone"]

    def _check_config(self, config: Config) -> list[str]:
        """Hold config.yaml against ours; where another version wrote it, as far as both know the keys."""
        path = self.path / "config.yaml"
        ours = config_values(config)
        notices: list[str] = []
        if path.exists():
            try:
                theirs = read_yaml(path)
                if not theirs:
                    raise ConfigError(f"{path} is empty")
            except ConfigError as error:
                raise ConfigError(f"{error}; delete the run folder or use another --run-dir") from None
            theirs, missing, unknown = filled_up(theirs)
            for key, value in unknown.items():
                told = f"{path} has {key}={value!r}, which fedfreeze {fedfreeze.__version__} does not know"
                told = f"{told}; {self._writer()} wrote it"
                if key.partition(".")[0] not in RESUME_MAY_DIFFER:
                    raise ConfigError(f"{told}: go on with that one, or use another --run-dir")
                notices.append(f"{told}; left out")
            difference = resume_difference(theirs, ours)
            lacks = {key: value for key, value in missing.items() if key.partition(".")[0] not in RESUME_MAY_DIFFER}
            if difference and difference.partition(" ")[0] in lacks:
                key = difference.partition(" ")[0]
                difference += (
                    f" ({path} lacks it, so it was {lacks[key]!r}; go on with --{key}={json.dumps(lacks[key])})"
                )
            if difference:
                raise ConfigError(
                    f"run folder {self.path} holds another run: {difference}; use another --run-dir or --name"
                )
            if lacks:
                listed = ", ".join(f"{key}={value!r}" for key, value in lacks.items())
                notices.append(f"{path}, by {self._writer()}, lacks keys that are known now; taken for them: {listed}")
        elif self.has_checkpoint():
            raise ConfigError(f"run folder {self.path} has checkpoints but no config.yaml; use another --run-dir")
        return notices

    def _writer(self) -> str:
        """Name what wrote config.yaml, as well as the folder tells it."""
        summary = self.read_summary() or {}
        versions = summary.get("versions")
        version = versions.get("fedfreeze") if isinstance(versions, dict) else None
        version = writer_of(self.path / "config.yaml") or version
        revision = summary.get("git_revision")
        if version is None:
            return "another version of fedfreeze"
        return f"fedfreeze {version}" + (f" (revision {revision})" if revision else "")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises StorageError."""
        try:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise storage_error("write", self.metrics_path, error) from None

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl, which a checkpoint notes."""
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def cut_metrics(self, length: int) -> None:
        """Cut what was written after the checkpoint that is resumed. Raises StorageError."""
        try:
            if self.metrics_path.exists():
                os.truncate(self.metrics_path, min(length, self.metrics_bytes()))
        except OSError as error:
            raise storage_error("cut", self.metrics_path, error) from None

    def asked_to_save(self) -> bool:
        """Return whether someone has put the file `save` here, and take it away."""
        with contextlib.suppress(OSError):
            self._save_path.unlink()
            return True
        return False

    def has_checkpoint(self) -> bool:
        """Return whether there is something to go on from."""
        return any(self.path.glob("checkpoints/round-*"))

    def forget_stop(self) -> bool:
        """Take away the file `stop` that ended the run before; return whether there was one.

        One that is newer than our lock was put there while this start was under way, and is meant for it.
        """
        with contextlib.suppress(OSError):
            if self.stop_path.stat().st_mtime < self._lock_path.stat().st_mtime:
                self.stop_path.unlink()
                return True
        return False

    def read_summary(self) -> dict[str, Any] | None:
        """Return summary.json; None if there is none or it is not whole."""
        return _read_object(self.summary_path)

    def read_data(self) -> dict[str, Any] | None:
        """Return data.json, what the run learns from; None if there is none or it is not whole."""
        return _read_object(self.data_path)

    def write_data(self, data: dict[str, Any]) -> None:
        """Write data.json, whole or not at all. Raises StorageError."""
        _write(self.data_path, _json_text(data))

    def write_partition(self, content: str) -> None:
        """Write partition.csv, whole or not at all. Raises StorageError."""
        _write(self.path / "partition.csv", content)

    def write_model(self, content: bytes) -> None:
        """Write model.safetensors, whole or not at all. Raises StorageError."""
        _write(self.model_path, content)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all. Raises StorageError."""
        _write(self.summary_path, _json_text(summary))


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _json_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _write(path: Path, content: str | bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise storage_error("write", path, error) from None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _process_start(pid: int) -> str | None:
    """Return when a local process started, in clock ticks since boot; None if it is gone. Tells reused pids apart."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
