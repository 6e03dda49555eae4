"""`fedfreeze sync`: one continuous run at Weights & Biases for each run folder, however often its job was requeued."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedfreeze.errors import (
    ConfigError,
    ExitCode,
    FedfreezeError,
    UnavailableError,
    one_line,
    storage_error,
)
from fedfreeze.storage import lock
from fedfreeze.storage.files import write_whole
from fedfreeze.track.live import Tracker, public_facts, track_mode, wandb_installed, wandb_names
from fedfreeze.track.metrics import Source, read_source


@dataclass
class Outcome:
    """What became of one run folder; `--json` prints it."""

    run: str
    state: str = "failed"
    """`synced`, `nothing new` or `failed`."""
    id: str | None = None
    mode: str | None = None
    rounds: int | None = None
    folder: str | None = None
    """The offline run that `wandb sync` uploads."""
    exit_code: int = 0
    error: str | None = None
    notices: list[str] = field(default_factory=list)


def sync(
    folders: Sequence[str],
    *,
    offline: bool = False,
    project: str | None = None,
    entity: str | None = None,
    force: bool = False,
    as_json: bool = False,
) -> int:
    """Sync run folders one after the other, tell of each, and return 0 or the exit code of the first that is bad.

    Raises UnavailableError where wandb is not installed, ConfigError where WANDB_MODE forbids what is asked.
    """
    mode = "offline" if offline else "online"
    if not wandb_installed():
        raise UnavailableError("sync needs wandb, which is not installed; pip install 'wandb>=0.20'")
    if track_mode(mode, os.environ) != mode:
        way_out = "unset it" if offline else "unset it, or use --offline"
        raise ConfigError(f"WANDB_MODE is {os.environ['WANDB_MODE']}, which forbids to sync {mode}; {way_out}")
    outcomes = []
    for folder in folders:
        outcomes.append(outcome := Outcome(folder, mode=mode))
        try:
            _sync_run(Path(folder), outcome, project, entity, force)
        except FedfreezeError as error:
            outcome.exit_code, outcome.error = int(error.exit_code), one_line(error)
        _tell(outcome, quiet=as_json)
    if as_json:
        print(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    return next((outcome.exit_code for outcome in outcomes if outcome.exit_code), int(ExitCode.DONE))


def _tell(outcome: Outcome, *, quiet: bool) -> None:
    if outcome.error is not None:
        print(f"fedfreeze: error: {outcome.error}", file=sys.stderr, flush=True)
    if quiet:
        return
    for notice in outcome.notices:
        print(f"notice: {notice}")
    if outcome.error is None:
        rounds = f"{outcome.rounds} round{'s' * (outcome.rounds != 1)}"
        upload = f"; upload: wandb sync {outcome.folder}" if outcome.folder else ""
        state = "nothing new" if outcome.state == "nothing new" else f"{outcome.mode} run written"
        if outcome.mode == "online" and outcome.state == "synced":
            state = "uploaded"
        print(f"{outcome.run}: {state}, id {outcome.id}, {rounds}{upload}", flush=True)


def _sync_run(path: Path, outcome: Outcome, project: str | None, entity: str | None, force: bool) -> None:
    """Sync one run folder. Raises ConfigError, DataError, UnavailableError or StorageError."""
    source = read_source(path, outcome.notices.append, {} if force else _read_note(path))
    outcome.id, outcome.rounds = source.wandb_id, source.metrics.rounds
    track = source.config.track
    track = replace(track, project=project or track.project, entity=entity or track.entity)
    source = replace(source, config=replace(source.config, track=track))
    names = wandb_names(track, os.environ)
    note = {
        "id": source.wandb_id,
        "mode": outcome.mode,
        "project": names["project"],
        "entity": names["entity"],
        "status": source.status,
        "rounds": source.metrics.rounds,
        "bytes": source.metrics.size,
        "sha256": source.metrics.sha256,
    }
    with _alone(path):
        last = _read_note(path)
        if not force and _is_same(path, last, note):
            outcome.state, outcome.folder = "nothing new", _full(path, last.get("folder"))
            return
        folder = _log_all(source, str(outcome.mode), outcome.notices.append)
        try:
            write_whole(_note_path(path), json.dumps(note | {"folder": folder}, indent=2) + "\n")
        except OSError as error:
            raise storage_error("write", _note_path(path), error) from None
        outcome.state, outcome.folder = "synced", _full(path, folder)


def _log_all(source: Source, mode: str, notice: Callable[[str], None]) -> str | None:
    """Log the run as the tracker of a live one does; return the name of the offline folder, None if it is online.

    Raises UnavailableError, StorageError.
    """
    place = source.path / "wandb" / "sync"
    try:
        place.mkdir(parents=True, exist_ok=True)
        # each in a folder of its own: wandb names its by the second, and what is there stands until the new one does
        built = Path(tempfile.mkdtemp(prefix="staged-", dir=place)).absolute()
    except OSError as error:
        raise storage_error("write in", place, error) from None
    kept: tuple[str, ...] = ()
    try:
        tracker = Tracker(source.config, source.path, mode, notice, folder=built, strict=True)
        tracker.load_state_dict({"wandb_id": source.wandb_id})
        try:
            _replay(tracker, source)
        except BaseException:
            tracker.abandon()
            raise
        if mode == "offline":
            kept = _keep(place, built, source.wandb_id)
        return kept[0] if kept else None
    except UnavailableError as error:
        online = "check `wandb login` and the network and try again, or use --offline"
        way_out = online if mode == "online" else "try again"
        raise UnavailableError(f"{source.path}: {one_line(error)}; {way_out}") from None
    finally:
        if kept:
            _remove_all_but(place, kept)
        else:
            shutil.rmtree(built, ignore_errors=True)


def _replay(tracker: Tracker, source: Source) -> None:
    tracker.start(public_facts(source.metrics.starts[-1]), 0)
    for record in source.metrics.records():
        if record["kind"] == "round":
            tracker.log_round(record)
        elif record["kind"] == "stage":
            tracker.log_stage(record)
    end = source.metrics.end
    if end is None:
        tracker.failed(source.exit_code)
    else:
        tracker.finish(end, source.metrics.stages)


def _keep(place: Path, built: Path, wandb_id: str) -> tuple[str, ...]:
    """Move the offline run out of the folder it was written in, and return the names of what must stay.

    The files that its tables refer to, by their whole path, stay where they are.
    """
    try:
        (found,) = (built / "wandb").glob(f"offline-run-*-{wandb_id}")
        if not (found / f"run-{wandb_id}.wandb").stat().st_size:
            raise OSError("nothing was written")
        target = place / found.name
        shutil.rmtree(target, ignore_errors=True)  # of a sync within the same second
        found.rename(target)
        for path in (built / "wandb").iterdir():
            if path.is_symlink():
                path.unlink()
            elif path.name != "data":
                shutil.rmtree(path, ignore_errors=True)
        for path in (target / "logs").glob("*"):
            if path.is_symlink():  # to the logs of wandb's service, which are gone
                path.unlink()
        return (target.name, built.name)
    except ValueError:
        raise UnavailableError("wandb failed: it has written no offline run") from None
    except OSError as error:
        raise storage_error("write", place, error) from None


def _remove_all_but(place: Path, kept: Sequence[str]) -> None:
    """Remove what earlier syncs have left: all of it can be built again from metrics.jsonl."""
    for path in place.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the only sync of a run folder. Raises ConfigError if there is another one, StorageError."""
    file = path / "wandb" / "sync.lock"
    try:
        file.parent.mkdir(exist_ok=True)
        descriptor = lock.take(file, wait=False)
    except OSError as error:
        raise storage_error("use", file, error) from None
    if descriptor is None:
        raise ConfigError(f"{path} is being synced by another process; wait for it")
    try:
        yield
    finally:
        lock.give_back(descriptor, file)


def _note_path(path: Path) -> Path:
    return path / "wandb" / "synced.json"


def _read_note(path: Path) -> dict[str, Any]:
    """Return what the last sync has noted; nothing if there is none, or it is not whole."""
    try:
        note = json.loads(_note_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _is_same(path: Path, last: Mapping[str, Any], note: Mapping[str, Any]) -> bool:
    if any(last.get(key, ...) != value for key, value in note.items()):
        return False
    if note["mode"] == "online":
        return True
    folder = _full(path, last.get("folder"))
    return folder is not None and (Path(folder) / f"run-{note['id']}.wandb").is_file()


def _full(path: Path, folder: object) -> str | None:
    return str(path / "wandb" / "sync" / folder) if isinstance(folder, str) else None
