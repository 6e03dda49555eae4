"""Weights & Biases, by rank 0: what metrics.jsonl holds, as charts and tables. What fails here never stops training."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedfreeze.config.file import config_values
from fedfreeze.config.schema import Config, TrackConfig
from fedfreeze.errors import UnavailableError, one_line
from fedfreeze.track.quiet_wandb import (
    bounded,
    check_writable,
    end_services,
    no_terminal,
    quiet_environment,
    quiet_settings,
    tear_down,
)

T = TypeVar("T")

# Longest waits, in seconds: for the server to answer at the start, for uploads at the end, for any other call.
INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0

# What `fedfreeze sync` waits for uploads: nobody but its user waits with it.
PATIENT_FINISH_TIMEOUT_S = 600.0

# wandb cuts a table at 10,000 rows; a longer one is logged in parts, under the same name.
TABLE_ROWS = 10_000

AXES = ("round", "emulated_hours", "wall_hours", "traffic_gb")
PER_DEVICE = ("cap_mib", "peak_memory_mib", "tensor_peak_mib", "failed")
DEVICE_COLUMNS = ("round", "device", *PER_DEVICE)

_LEVELS = {"off": 0, "disabled": 0, "offline": 1, "dryrun": 1, "online": 2, "run": 2, "shared": 2}
_MODES = ("off", "offline", "online")
# What wandb would take from the environment, and the configuration always says.
_NOT_TAKEN = {"WANDB_NAME": "the key name", "WANDB_DIR": "track.dir", "WANDB_RUN_ID": "the id of the run folder"}

_NOT_FACTS = ("kind", "name", "round", "hosts", "slurm_job", "slurm_restart", "wandb_id")


class Tracker:
    """Rank 0's line to Weights & Biases; with `mode` off, and after a failure, it does nothing.

    metrics.jsonl stays the truth: a resumed run is logged anew from it, so that every offline folder is whole.

    A `strict` one raises UnavailableError for what fails, and does not fall back from online to offline: that of
    `fedfreeze sync`, which writes to a `folder` of its own.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        mode: str,
        notice: Callable[[str], None],
        *,
        folder: Path | None = None,
        strict: bool = False,
    ):
        self.config = config
        self.run_dir = run_dir.absolute()
        self.folder = Path(folder or config.track.dir or run_dir).absolute()
        self.mode = mode
        self.notice = notice
        self.strict = strict
        # of a live run the other ranks wait, and give up after the whole
        self.patience_s = math.inf if strict else config.comm.timeout_s / 4
        self.wandb_id: str | None = None
        self.round = 0
        self.wall_s = 0.0
        self.emulated_s = 0.0
        self.traffic_bytes = 0
        self.devices: list[list[Any]] = []
        self.stages: list[dict[str, Any]] = []
        self._first_step = 0
        self._run: Any = None
        self._environment = contextlib.ExitStack()

    def choose_id(self) -> str | None:
        """Return the run's id: the checkpoint's, else the run folder's, else a new one; None if it is not tracked."""
        self.wandb_id = self.wandb_id or known_id(self.run_dir)
        if self.wandb_id is None and self.mode != "off":
            self.wandb_id = secrets.token_hex(5)
        return self.wandb_id

    def start(self, facts: Mapping[str, Any], resumed_round: int) -> None:
        """Begin the run, or go on with it after `resumed_round` (0: from the beginning). To be called once."""
        if self.mode == "off":
            return
        self.choose_id()
        self._environment.enter_context(quiet_environment(self.folder))
        try:
            self._run = self._begin(dict(facts))
            if resumed_round > 0:
                self._replay(resumed_round)
        except Exception as error:
            self._give_up(error)

    def log_round(self, record: Mapping[str, Any]) -> None:
        """Log a round of metrics.jsonl as one row, its devices as rows of the table `devices`."""
        if self._run is None:
            return
        self.round = record["round"]
        self.wall_s += record["wall_s"]
        emulated_s = record.get("emulated_s")  # an older revision had no emulated clock
        self.emulated_s += emulated_s or 0.0
        self.traffic_bytes += record["bytes_up"] + record["bytes_down"]
        row = scalars(record) | {"wall_hours": self.wall_s / 3600, "traffic_gb": self.traffic_bytes / 1e9}
        if emulated_s is not None:
            row["emulated_hours"] = self.emulated_s / 3600
        row["participants/completed"] = len(record["selected"]) - len(record["failed"])
        row["participants/failed"] = len(record["failed"])
        self._log(row | memory_figures(record))
        self.devices += device_rows(record)
        while len(self.devices) >= TABLE_ROWS:
            part, self.devices = self.devices[:TABLE_ROWS], self.devices[TABLE_ROWS:]
            self._log_table("devices", DEVICE_COLUMNS, part)

    def log_stage(self, record: Mapping[str, Any]) -> None:
        """Log the end of a stage in the row of its last round, which must have been logged before."""
        if self._run is None:
            return
        self.stages.append(dict(record))
        self._log({f"stage_end/{name}": value for name, value in scalars(record).items()})

    def finish(self, summary: Mapping[str, Any], stages: Sequence[dict[str, Any]]) -> None:
        """Log the closing tables and the figures of summary.json, and wait until all is written (or uploaded)."""
        figures = public_facts(scalars(summary))
        if "stages" in figures:
            figures["num_stages"] = figures.pop("stages")  # that name is the table's
        self.stages = self.stages or list(stages)  # a checkpoint may have other ideas of the order of columns
        if self.config.track.artifact:
            self._ask(self._log_artifact, CALL_TIMEOUT_S)
        self._end(figures, 0)

    def failed(self, exit_code: int) -> None:
        """Log the tables so far and end the run as failed; a later start with the same state goes on with it."""
        self._end({"exit_code": int(exit_code)}, int(exit_code))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must keep: its id at Weights & Biases. All else is in metrics.jsonl."""
        return {"wandb_id": self.wandb_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict; an empty one is that of a run that was not tracked. To be called before start."""
        self.wandb_id = state.get("wandb_id") or self.wandb_id

    def abandon(self) -> None:
        """Leave everything as it is, at once: what was logged may not be whole."""
        self.mode = "off"
        self._run = None
        end_services()
        tear_down(min(CALL_TIMEOUT_S, 10.0))  # or wandb would try it at exit, and complain
        self._environment.close()

    def _begin(self, facts: dict[str, Any]) -> Any:
        """Return wandb's run: online, else offline."""
        if self.mode == "offline":
            return self._bounded(lambda: self._init("offline", facts), CALL_TIMEOUT_S)
        try:
            run = self._bounded(lambda: self._init("online", facts), 2 * INIT_TIMEOUT_S)
        except Exception as error:
            if self.strict:
                raise
            tear_down(CALL_TIMEOUT_S)  # half a run would hold the id
            run = self._bounded(lambda: self._init("offline", facts), CALL_TIMEOUT_S)
            self.notice(
                f"wandb is not online ({one_line(error)[:160]}); upload later: wandb sync {Path(run.dir).parent}"
            )
        self._first_step = int(run.step)  # what the server has of a resumed run, it keeps
        return run

    def _init(self, mode: str, facts: dict[str, Any]) -> Any:
        check_writable(self.folder)
        wandb: Any = importlib.import_module("wandb")
        with no_terminal():
            run = wandb.init(
                **wandb_names(self.config.track, os.environ),
                name=self.config.name,
                id=self.wandb_id,
                resume="allow" if mode == "online" else None,
                dir=str(self.folder),
                mode=mode,
                config=config_values(self.config) | {"facts": facts},
                settings=quiet_settings(
                    wandb,
                    init_timeout=INIT_TIMEOUT_S,
                    # 0: wandb itself has no limit, and ours tells what did not get through
                    finish_timeout=0.0 if self.strict else FINISH_TIMEOUT_S / 2,
                ),
            )
        for axis in AXES:
            run.define_metric(axis)
        run.define_metric("*", step_metric="round")
        return run

    def _replay(self, resumed_round: int) -> None:
        """Log what metrics.jsonl holds up to the checkpoint; also where the run was not tracked until now."""
        with open(self.run_dir / "metrics.jsonl", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                if record["kind"] == "round" and record["round"] > resumed_round:
                    break
                if record["kind"] == "round":
                    self.log_round(record)
                elif record["kind"] == "stage":
                    self.log_stage(record)

    def _log(self, values: dict[str, Any]) -> None:
        """Add to the row of this round, which is whole when the next one begins."""
        if self.round >= self._first_step:
            self._ask(lambda run: run.log(values, step=self.round), CALL_TIMEOUT_S)

    def _log_table(self, name: str, columns: Sequence[str], rows: list[list[Any]]) -> None:
        def log(run: Any) -> None:
            table = importlib.import_module("wandb").Table(list(columns), rows)
            if self.round >= self._first_step:
                run.log({name: table}, step=self.round)
            else:  # a row of its own would take the step of a round that is yet to come
                run.summary.update({name: table})

        if rows:
            self._ask(log, CALL_TIMEOUT_S)

    def _log_artifact(self, run: Any) -> None:
        """Log the deployed network. Its file is not copied: an upload reads it where it lies."""
        path = self.run_dir / "model.safetensors"
        if not path.is_file():
            self.notice(f"{path} is missing: no artifact is logged")
            return
        artifact = importlib.import_module("wandb").Artifact(f"model-{self.wandb_id}", type="model")
        artifact.add_file(str(path), policy="immutable")
        run.log_artifact(artifact)

    def _end(self, figures: dict[str, Any], exit_code: int) -> None:
        if self._run is not None:
            self._log_table("devices", DEVICE_COLUMNS, self.devices)
            columns = [name for name in (self.stages or [{}])[0] if name != "kind"]
            self._log_table("stages", columns, [[stage.get(name) for name in columns] for stage in self.stages])
            # the row first: its values would replace those of the summary that are called the same
            if self.round >= self._first_step:
                self._ask(lambda run: run.log({}, step=self.round, commit=True), CALL_TIMEOUT_S)
            self._ask(lambda run: run.summary.update(figures), CALL_TIMEOUT_S)
            # ranks end by os._exit: nothing may be left to an exit handler
            limit_s = PATIENT_FINISH_TIMEOUT_S if self.strict else FINISH_TIMEOUT_S
            self._ask(lambda run: run.finish(exit_code=exit_code), limit_s)
        if self._run is not None:
            tear_down(CALL_TIMEOUT_S)
        self._run = None
        self._environment.close()

    def _ask(self, action: Callable[[Any], Any], seconds: float) -> None:
        if self._run is None:
            return
        try:
            self._bounded(lambda: action(self._run), seconds)
        except Exception as error:
            self._give_up(error)

    def _bounded(self, action: Callable[[], T], seconds: float) -> T:
        return bounded(action, min(seconds, self.patience_s))

    def _give_up(self, error: Exception) -> None:
        """Tell of what failed, once, and be quiet from now on."""
        if not self.strict:
            self.notice(
                f"tracking by wandb has ended ({one_line(error)[:160]}); training goes on, metrics.jsonl has it all"
            )
        self.abandon()
        if self.strict:
            raise UnavailableError(f"wandb failed: {one_line(error)[:160]}") from None


def make_tracker(config: Config, run_dir: Path, notice: Callable[[str], None]) -> Tracker:
    """Return the tracker that `track` and WANDB_MODE ask for. Raises UnavailableError where wandb is not installed."""
    mode = track_mode(config.track.wandb, os.environ)
    if mode != "off" and not wandb_installed():
        raise UnavailableError(
            f"track.wandb is {config.track.wandb}, but wandb is not installed; pip install 'wandb>=0.20', or use "
            "track.wandb=off"
        )
    for name, key in _NOT_TAKEN.items():
        if mode != "off" and os.environ.get(name):
            notice(f"{name} is set and does not count: {key} does (docs/tracking.md)")
    return Tracker(config, run_dir, mode, notice)


def wandb_names(track: TrackConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return project, entity, group and tags of a run: of each the configuration's, else the variable's, else ours."""
    tags = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",")]
    return {
        "project": track.project or environment.get("WANDB_PROJECT") or "fedfreeze",
        "entity": track.entity or environment.get("WANDB_ENTITY") or None,
        "group": track.group or environment.get("WANDB_RUN_GROUP") or None,
        "tags": list(track.tags) or [tag for tag in tags if tag],
    }


def wandb_installed() -> bool:
    """Tell whether wandb can be imported, without importing it."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None  # no origin: a mere folder of that name


def known_id(run_dir: Path) -> str | None:
    """Return the id that an earlier start or a sync has given to the run at Weights & Biases; None if none has."""
    for path, key in ((run_dir / "summary.json", "wandb_id"), (run_dir / "wandb" / "synced.json", "id")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and is_id(found.get(key)):
                return str(found[key])
    return None


def is_id(value: object) -> bool:
    """Tell whether a run at Weights & Biases can have this id."""
    return isinstance(value, str) and re.fullmatch("[A-Za-z0-9_-]{1,64}", value) is not None


def public_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line `run_start` says and Weights & Biases gets: no host names, nothing that it has otherwise."""
    return {name: value for name, value in record.items() if name not in _NOT_FACTS}


def track_mode(wanted: str, environment: Mapping[str, str]) -> str:
    """Return off, offline or online: what the configuration wants, or the quieter one that WANDB_MODE says."""
    return _MODES[min(_LEVELS[wanted], _LEVELS.get(environment.get("WANDB_MODE", "online").lower(), 2))]


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts of a record, less its kind; what is null is left out."""
    return {name: value for name, value in record.items() if isinstance(value, int | float | str) and name != "kind"}


def device_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row a selected device: round, device, then PER_DEVICE; None where the record has nothing."""
    return [
        [record["round"], device, *(record.get(name, {}).get(str(device)) for name in PER_DEVICE)]
        for device in record["selected"]
    ]


def memory_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the round's memory in figures: highest and mean peak in MiB, and the largest share of a cap."""
    peaks = record["peak_memory_mib"]
    if not peaks:
        return {}
    figures = {"memory/peak_mib_max": max(peaks.values()), "memory/peak_mib_mean": sum(peaks.values()) / len(peaks)}
    caps = record["cap_mib"]
    shares = [peak / caps[device] for device, peak in peaks.items() if caps[device]]
    return figures | ({"memory/cap_share_max": max(shares)} if shares else {})
