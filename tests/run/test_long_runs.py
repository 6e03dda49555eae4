"""A round of a long run costs what an early one does: what it writes and keeps does not grow; no clock is read.

How long 20,000 rounds and the commands on 100,000 take: benchmarks/long_runs.py.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import metrics, sha256, without_wall_time
from tests.support.tiny_runs import go, write

LONG: dict[str, Any] = {
    "train": {"rounds": 26, "participants": 2, "batch_size": 512},
    "pace": {"policy": "perturbation", "window": 2, "slope_window": 2, "min_rounds": 10**6},
    "checkpoint": {"keep": 100},
    "eval": {"every_rounds": 50},
}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 26 rounds of one stage, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("long")
    write(folder, **LONG)
    outcome = go(folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder


def test_a_checkpoint_and_a_line_are_as_long_late_as_early(long_run: Path) -> None:
    run = long_run / "run"
    for file in ("state.json", "weights.safetensors"):
        sizes = [(run / "checkpoints" / f"round-{n:06d}" / file).stat().st_size for n in range(1, 26)]
        assert max(sizes[18:]) <= max(sizes[8:14]) + 50, file  # the digits of a number, not numbers
    lines = [len(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "round"' in line]
    assert max(lines[18:]) <= max(lines[8:14]) + 50


def test_a_checkpoint_of_an_earlier_version_goes_on_to_the_same_bits(long_run: Path, tmp_path: Path) -> None:
    """Its pace policy remembered the whole stage, and its coordinator did not count by stage."""
    write(tmp_path, **LONG)
    run = tmp_path / "run"
    stopped = go(tmp_path, "run", "--checkpoint.time_limit_s=1e-9")
    assert stopped.code == 75
    _copy(long_run / "run", run, 20)
    state_file = run / "checkpoints" / "round-000020" / "state.json"
    content = json.loads(json.loads(state_file.read_text())["content"])
    coordinator = content["state"]["coordinator"]
    history = [r["perturbation"] for r in metrics(long_run / "run")[: 20 + 1] if r.get("perturbation") is not None]
    assert len(coordinator["pace"]["history"]) < len(history) == 19
    coordinator["pace"]["history"] = history
    del coordinator["stage_device_rounds"], coordinator["last_failure"]
    text = json.dumps(content, sort_keys=True)
    state_file.write_text(json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    assert go(tmp_path).code == 0
    assert sha256(run) == sha256(long_run / "run")
    assert without_wall_time(metrics(run)) == without_wall_time(metrics(long_run / "run"))


def _copy(source: Path, target: Path, number: int) -> None:
    """Copy a checkpoint, and what metrics.jsonl held then."""
    for path in (f"checkpoints/round-{number:06d}", "checkpoints/updates"):
        shutil.copytree(source / path, target / path, dirs_exist_ok=True)
    shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")
