"""Keeps the books of a run: the records of metrics.jsonl and summary.json."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import fedfreeze
from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.ranks import Ranks
from fedfreeze.config.schema import Config
from fedfreeze.data.store import Data
from fedfreeze.device.cap import enforcer_name
from fedfreeze.errors import ExitCode, FedfreezeError, PreemptedError, one_line
from fedfreeze.run.parts import RoundParts
from fedfreeze.run.round import RoundResult
from fedfreeze.server.coordinator import Coordinator, train_loss
from fedfreeze.storage.run_folder import RunFolder
from fedfreeze.track.live import Tracker, make_tracker, public_facts
from fedfreeze.units import MIB


class History:
    """Rank 0's books. What a resumed run must go on counting is in its state_dict."""

    def __init__(self, config: Config, folder: RunFolder, launch: Launch, ranks: Ranks):
        self.config = config
        self.folder = folder
        self.facts: dict[str, Any] = {
            "method": config.method.name,
            "selector": config.select.name,
            "model": config.model.factory or config.model.name,
            "dataset": config.data.path or config.data.name,
            "world_size": ranks.world_size,
            "hosts": sorted(set(ranks.rank_hosts)),
            "launcher": launch.launcher,
            "transport": config.comm.transport,
            "backend": ranks.backend,
            "device": device_name(ranks.device),
            "cap_enforcement": enforcer_name(ranks.device, config.fleet.accounting) if config.fleet.enforce else "none",
            "seed": config.seed,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": os.environ.get("SLURM_RESTART_COUNT"),
            "git_revision": git_revision(),
            "versions": versions(),
        }
        self.code: dict[str, str] = {}
        self.code_changes: list[dict[str, Any]] = []
        self.accuracy: float | None = None
        self.best_accuracy: float | None = None
        self.stages: list[dict[str, Any]] = []
        self.stage_peak_bytes = 0
        self.wall_before_s = 0.0
        self.begun = False
        self.summary: dict[str, Any] = {}
        self.started = time.monotonic()
        self.tracker = Tracker(config, folder.path, "off", print)

    @property
    def wall_s(self) -> float:
        """Seconds of all the parts of the run that stand."""
        return self.wall_before_s + time.monotonic() - self.started

    def track(self, notice: Callable[[str], None]) -> None:
        """Have the run tracked as `track` says. Raises UnavailableError where wandb is asked for and missing."""
        self.tracker = make_tracker(self.config, self.folder.path, notice)

    def note_code(self, code: dict[str, str]) -> None:
        """Note the digests of the user's own code, by module, before a checkpoint is loaded."""
        self.code = code

    def _code_changed(self, before: dict[str, str], round_number: int) -> None:
        parts = [
            name if name in before and name in self.code else f"{name} ({'new' if name in self.code else 'gone'})"
            for name in sorted(before.keys() | self.code.keys())
            if before.get(name) != self.code.get(name)
        ]
        if parts:
            self.code_changes.append({"round": round_number, "modules": parts, "before": before})

    def run_start(self, coordinator: Coordinator) -> None:
        """Note that a run starts or goes on."""
        self.begun = True
        self.facts["wandb_id"] = self.tracker.choose_id()
        self.facts |= {"own_code": self.code, "code_changes": self.code_changes}
        self.folder.append_metrics(
            {
                "kind": "run_start",
                "name": self.config.name,
                "round": coordinator.round,
                **self.facts,
            }
        )
        self.folder.write_summary(self._summary(coordinator, "running", None))
        self.tracker.start(public_facts(self.facts), coordinator.round)

    def round_end(
        self, coordinator: Coordinator, result: RoundResult, wall_s: float, parts: RoundParts
    ) -> dict[str, Any]:
        """Note a round and return its record."""
        plan, verdict = result.plan, result.verdict
        if result.accuracy is not None:
            self.accuracy = result.accuracy
            self.best_accuracy = max(self.best_accuracy or 0.0, result.accuracy)
        completed = [report for report in result.reports if report.failed is None]
        self.stage_peak_bytes = max([self.stage_peak_bytes, *(report.peak_bytes for report in completed)])
        chosen = {a.device: a.cap_bytes for a in plan.assignments} | {a.device: a.cap_bytes for a in plan.left_out}
        caps = {str(device): cap for device, cap in sorted(chosen.items())}
        clock = coordinator.clock
        record: dict[str, Any] = {
            "kind": "round",
            "round": plan.round,
            "stage": plan.stage,
            "stage_round": plan.stage_round,
            "selected": sorted(chosen),
            "late": [device.device for device in plan.left_out],
            "failed": {str(report.device): report.failed for report in result.reports if report.failed is not None},
            "train_loss": train_loss(result.reports),
            "accuracy": result.accuracy,
            "accuracy_sampled": result.accuracy_sampled,
            "sparse": verdict.sparse,
            "perturbation": verdict.perturbation,
            "slope": verdict.slope,
            "peak_memory_mib": {str(report.device): report.peak_bytes / MIB for report in completed},
            "tensor_peak_mib": {str(report.device): report.tensor_peak_bytes / MIB for report in completed},
            "cap_mib": {device: None if cap is None else cap / MIB for device, cap in caps.items()},
            "elements_reduced": result.elements_reduced,
            "level": {str(a.device): a.level for a in plan.assignments},
            "way": {str(a.device): a.way for a in plan.assignments},
            "probed": clock.probed,
            "participation": len(coordinator.trained) / len(coordinator.fleet),
            "bytes_up": clock.bytes_up,
            "bytes_down": clock.bytes_down,
            "flops": clock.flops,
            "emulated_s": clock.emulated_s,
            "probe_s": clock.probe_s,
            "wall_s": wall_s,
            "imbalance": imbalance(result.train_s),
            "parts_s": rounded(parts.wall_s),
            "parts_processor_s": rounded(parts.processor_s),
        }
        self.folder.append_metrics(record)
        self.tracker.log_round(record)
        return record

    def stage_end(self, coordinator: Coordinator, reason: str) -> dict[str, Any]:
        """Note a stage and return its record."""
        cost, full = coordinator.costs.stages[coordinator.stage], coordinator.costs.full
        record = {
            "kind": "stage",
            "stage": coordinator.stage,
            "blocks": cost.name,
            "reason": reason,
            "rounds": coordinator.stage_round,
            "memory_mib": cost.memory_bytes / MIB,
            "peak_memory_mib": self.stage_peak_bytes / MIB,
            "full_memory_mib": full.memory_bytes / MIB,
            "eligible": len(coordinator.eligible[coordinator.stage]),
            "device_rounds": coordinator.stage_device_rounds,
            "accuracy": self.accuracy,
        }
        self.stages.append(record)
        self.stage_peak_bytes = 0
        self.folder.append_metrics(record)
        self.tracker.log_stage(record)
        return record

    def finish(self, coordinator: Coordinator, data: Data, stage: int, fitted: dict[str, Any]) -> dict[str, Any]:
        """Note the end and return the summary."""
        summary = self._summary(coordinator, "finished", ExitCode.DONE) | {
            "deployed_stage": stage,
            "image_shape": list(data.image_shape),
            "num_classes": data.num_classes,
            "class_names": None if data.class_names is None else list(data.class_names),
            "normalisation": {"mean": list(data.mean), "std": list(data.std)},
            "fitted": fitted,
        }
        self.folder.append_metrics({"kind": "run_end", **{k: v for k, v in summary.items() if k != "versions"}})
        self.folder.write_summary(summary)
        self.summary = summary
        return summary

    def nothing_learned(self, coordinator: Coordinator) -> None:
        """Have summary.json hold the figures of a run in which no device completed a round; `failed` adds the rest."""
        self.folder.write_summary(self._summary(coordinator, "running", None))

    def tracked_to_the_end(self) -> None:
        """Close the tracking of a run that is done; it may wait for an upload."""
        self.tracker.finish(self.summary, self.stages)

    def failed(self, error: BaseException) -> None:
        """Note that the run broke off; what cannot be written then must not hide the error itself."""
        code = error.exit_code if isinstance(error, FedfreezeError) else ExitCode.INTERNAL
        status = "failed"
        if isinstance(error, KeyboardInterrupt):
            code, status = ExitCode.INTERRUPTED, "preempted"
        elif isinstance(error, PreemptedError):
            status = "preempted"
        self.tracker.failed(code)
        summary = self.folder.read_summary() or {}
        if summary.get("status") == "finished":
            return  # what failed came after the end
        summary |= {"status": status, "exit_code": int(code), "error": one_line(error), "wall_s": self.wall_s}
        try:
            self.folder.write_summary(summary)
        except FedfreezeError:
            return

    def _summary(self, coordinator: Coordinator, status: str, code: ExitCode | None) -> dict[str, Any]:
        fleet, full = coordinator.fleet, coordinator.costs.full
        full_mib = full.memory_bytes / MIB
        peak_mib = coordinator.peak_bytes / MIB
        mean_mib = coordinator.peak_sum_bytes / max(1, coordinator.device_rounds) / MIB
        measured = coordinator.device_rounds > 0
        could = {device for devices in coordinator.eligible for device in devices}
        hold_full = set(fleet.eligible(full.memory_bytes))
        # a block that nobody trained is not frozen, whatever ended its stage; an earlier version did not say
        trained = [record for record in self.stages if record.get("device_rounds") != 0]
        frozen = sum(record["reason"] != "round_limit" for record in trained)
        return {
            "status": status,
            "exit_code": None if code is None else int(code),
            **self.facts,
            "rounds": coordinator.round,
            "stages": len(coordinator.costs.stages),
            "all_frozen": coordinator.paced and frozen == len(coordinator.costs.stages),
            "stage_reasons": [record["reason"] for record in self.stages],
            "final_accuracy": self.accuracy,
            "best_accuracy": self.best_accuracy,
            "full_memory_mib": full_mib,
            "peak_memory_mib": peak_mib if measured else None,
            "mean_memory_mib": mean_mib if measured else None,
            "memory_cut_peak": 1 - peak_mib / full_mib if measured else None,
            "memory_cut_mean": 1 - mean_mib / full_mib if measured else None,
            "small_batch_share": coordinator.small_batch_rounds / max(1, coordinator.device_rounds),
            "participation": len(coordinator.trained) / len(fleet),
            "inclusion": len(could) / len(fleet),
            "trainable": len(coordinator.trainable) / len(fleet),
            "trained_below_full_memory": len(coordinator.trained - hold_full),
            "emulated_s": coordinator.clock.now_s,
            "wall_s": self.wall_s,
            "bytes_total": coordinator.clock.bytes_total,
            "flops_total": coordinator.clock.flops_total,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must go on counting."""
        names = ("accuracy", "best_accuracy", "stages", "stage_peak_bytes", "wall_s")
        code = {"code": self.code, "code_changes": self.code_changes}
        return {name: getattr(self, name) for name in names} | code | {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any], round_number: int) -> None:
        """Go on from a state_dict of the end of a round."""
        self.code_changes = list(state.get("code_changes", []))
        if "code" in state:  # an older version did not note it
            self._code_changed(state["code"], round_number)
        for name in ("accuracy", "best_accuracy", "stages", "stage_peak_bytes"):
            setattr(self, name, state[name])
        self.wall_before_s = state["wall_s"]
        self.tracker.load_state_dict(state["tracker"])
        self.started = time.monotonic()


def imbalance(train_s: Sequence[float]) -> float:
    """Return the busiest rank's seconds over the mean of all: 1 where none waits for another."""
    mean = sum(train_s) / len(train_s)
    return round(max(train_s) / mean, 3) if mean else 1.0


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds of the parts of a round, to microseconds."""
    return {part: round(taken, 6) for part, taken in seconds.items()}


def device_name(device: torch.device) -> str:
    """Return what computes, as a person would call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "fedfreeze": fedfreeze.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-network": importlib.metadata.version("scikit-network"),  # communities; importing it takes a while
    }


@functools.cache
def git_revision() -> str | None:
    """Return the revision of fedfreeze's own checkout (`+dirty`: changed); None if it is no checkout.

    Asked once a process: what is loaded does not change with the checkout.
    """
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=10,
        )
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if tracked.returncode == 0 else None
