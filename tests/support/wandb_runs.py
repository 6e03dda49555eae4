"""Records of a run as W&B is told them, and what it has made of them, read back with its own tool."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.config.schema import Config, TrackConfig
from fedfreeze.track.live import Tracker, make_tracker

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
KEY = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "this-is-nobodys-business"
NOWHERE = "http://127.0.0.1:9"


def round_record(number: int, stage: int = 0, devices: int = 5, *, capped: bool = True) -> dict[str, Any]:
    """A round as History writes it: device 3 fails, every other round is not evaluated."""
    selected = [(number + offset) % 40 for offset in range(devices)]
    failed = {str(device): "cap hit" for device in selected if device % 7 == 3}
    completed = [device for device in selected if str(device) not in failed]
    return {
        "kind": "round",
        "round": number,
        "stage": stage,
        "stage_round": number,
        "selected": selected,
        "failed": failed,
        "train_loss": 2.3 / number if completed else None,
        "accuracy": None if number % 2 else 0.1 * number,
        "perturbation": None if number < 3 else 1 / number,
        "slope": None if number < 4 else -0.01,
        "peak_memory_mib": {str(device): 0.3 + device / 100 for device in completed},
        "tensor_peak_mib": {str(device): 0.2 + device / 100 for device in completed},
        "cap_mib": {str(device): 0.9 if capped else None for device in selected},
        "elements_reduced": 1234,
        "bytes_up": 10**9 + number,
        "bytes_down": 2 * 10**9,
        "emulated_s": None,
        "wall_s": 0.25 * number,
    }


def stage_record(stage: int, accuracy: float | None = None) -> dict[str, Any]:
    return {
        "kind": "stage",
        "stage": stage,
        "blocks": f"block {stage}",
        "reason": "frozen",
        "rounds": 3,
        "memory_mib": 0.5,
        "peak_memory_mib": 0.45,
        "full_memory_mib": 0.9,
        "eligible": 12,
        "accuracy": accuracy,
    }


SUMMARY = {"status": "finished", "exit_code": 0, "stages": 2, "rounds": 6, "final_accuracy": 0.6, "wall_s": 99.0}
ROUNDS = [round_record(number, stage=(number - 1) // 3, capped=number < 5) for number in range(1, 7)]
STAGES = [stage_record(0), stage_record(1, 0.6)]


def tracker(run_dir: Path, notices: list[str], mode: str = "offline", **options: Any) -> Tracker:
    run_dir.mkdir(exist_ok=True)
    config = Config(name="small", track=TrackConfig(wandb=mode, **options))  # type: ignore[arg-type]
    return make_tracker(config, run_dir, notices.append)


def log(tracked: Tracker, run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Log as the experiment does: first to metrics.jsonl, then to the tracker."""
    for record in records:
        with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        (tracked.log_stage if record["kind"] == "stage" else tracked.log_round)(record)


def offline_folder(run_dir: Path) -> Path:
    return max(run_dir.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_ctime_ns)


def inspect(folder: Path, *options: str) -> str:
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of all the parts of a table."""
    files = sorted(folder.glob(f"files/media/table/{name}_*.json"), key=lambda file: int(file.name.split("_")[1]))
    parts = [json.loads(file.read_text()) for file in files]
    return [dict(zip(part["columns"], row, strict=True)) for part in parts for row in part["data"]]


def services(pid: int | str = "self") -> list[int]:
    """The processes of wandb that a process has started and that still run."""
    text = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    return [child for child in map(int, text.split()) if runs(child) and "wandb-core" in command_line(child)]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_in_no_file(folder: Path, *secrets: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], file


def assert_rounds_are_whole(rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    assert [row["round"] for row in rows] == [record["round"] for record in records]
    for row, record in zip(rows, records, strict=True):
        for name, value in record.items():
            if name != "kind" and not isinstance(value, list | dict):
                assert row.get(name) == value, name


def assert_devices_are_whole(rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    assert [(row["round"], row["device"]) for row in rows] == [(r["round"], d) for r in records for d in r["selected"]]
    for row in rows:
        record = next(record for record in records if record["round"] == row["round"])
        for name in ("cap_mib", "peak_memory_mib", "tensor_peak_mib", "failed"):
            assert row[name] == record[name].get(str(row["device"])), name
