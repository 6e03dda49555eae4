"""Runs on CPUs whose caps are held by reserved segments: who joins, that none fails, peaks as predicted."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.cli import main
from tests.support.launching import (
    command,
    kill_tree,
    metrics,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
    write_config,
)

DEVICES, BATCH = 12, 32
# two batches and a half for each: those of which `plan` speaks
SECTIONS: dict[str, Any] = {
    "data": {
        "name": "synthetic",
        "synthetic_shape": [3, 16, 16],
        "synthetic_samples": DEVICES * BATCH * 5 // 2,
        "partition": "iid",
    },
    "model": {"width": 16},
    "train": {"rounds": 6, "participants": 5, "batch_size": BATCH},
    "pace": {"policy": "fixed"},
    "cache": {"features": True, "budget_mib": 4},
}
HOLDS, BETWEEN = 6.0, 5.0
"""MiB: what the front stage reserves, and less, where its tensors still have room."""


def config_of(folder: Path, **changes: Any) -> Path:
    fleet = {"devices": DEVICES, "memory_cap_mib": [HOLDS, BETWEEN], "accounting": "cuda_segments"}
    return write_config(folder, **(SECTIONS | {"fleet": fleet} | changes))


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(folder) if record["kind"] == "round"]


@pytest.fixture(scope="module")
def of_segments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    assert main(["run", str(config_of(folder)), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_plan_shows_tensors_and_segments_and_who_joins_by_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, train=SECTIONS["train"] | {"fit": "auto, micro(4)"})
    eligible = {}
    for accounting in ("cuda_segments", "tensor_bytes"):
        option = f"--fleet.accounting={accounting}"
        assert main(["plan", str(config), "--json", option]) == 0
        rows = json.loads(capsys.readouterr().out)["stages"]
        key = "reserved_mib" if accounting == "cuda_segments" else "memory_mib"
        for row in rows:
            assert row["memory_mib"] < row["reserved_mib"]
            assert row["reserved_mib"] % 2 == 0
            assert row["eligible"] == 6 * sum(cap >= row[key] for cap in (HOLDS, BETWEEN))
        eligible[accounting] = [row["eligible"] for row in rows]
        assert main(["plan", str(config), option]) == 0
        table = capsys.readouterr().out
        assert all(len(line) <= 100 for line in table.splitlines())
        assert "reserved: MiB that a GPU's" in table
        assert ("by which they join" in table) == (accounting == "cuda_segments")
    assert sum(eligible["cuda_segments"]) < sum(eligible["tensor_bytes"])
    assert main(["plan", str(config), "--json", "--train.prefix=stored", "--fleet.accounting=tensor_bytes"]) == 0
    assert all(row["reserved_mib"] is None for row in json.loads(capsys.readouterr().out)["stages"][:-1])


def test_devices_between_tensors_and_segments_do_not_join_and_none_fails(of_segments: Path) -> None:
    told, rounds = summary(of_segments), rounds_of(of_segments)
    assert told["cap_enforcement"] == "cuda_segments"
    assert all(record["failed"] == {} for record in rounds)
    caps = {device: cap for record in rounds for device, cap in record["cap_mib"].items()}
    assert {cap for record in rounds if record["stage"] == 0 for cap in record["cap_mib"].values()} == {HOLDS}
    assert set(caps.values()) == {HOLDS, BETWEEN}  # of the later stages both have room


def test_measured_peaks_are_those_that_were_predicted(of_segments: Path) -> None:
    stages = [record for record in metrics(of_segments) if record["kind"] == "stage"]
    assert [stage["memory_mib"] for stage in stages] == [6.0, 4.0, 4.0]
    for record in rounds_of(of_segments):
        peaks, tensors = record["peak_memory_mib"], record["tensor_peak_mib"]
        assert set(peaks.values()) == {stages[record["stage"]]["memory_mib"]}
        assert all(tensors[device] < peak <= record["cap_mib"][device] for device, peak in peaks.items())


def test_what_is_kept_of_frozen_blocks_changes_no_peak(of_segments: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, cache={"features": False})
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    for ours, theirs in zip(rounds_of(of_segments), rounds_of(tmp_path / "run"), strict=True):
        for key in ("selected", "peak_memory_mib", "tensor_peak_mib"):
            assert ours[key] == theirs[key]


def test_two_ranks_killed_and_resumed_have_the_same_books(of_segments: Path, tmp_path: Path) -> None:
    two = command(config_of(tmp_path), tmp_path / "two", ranks=2)
    process = start(two)
    assert wait_for_round(process, tmp_path / "two", 3)
    kill_tree(process)
    assert run(two).returncode == 0
    assert sha256(tmp_path / "two") == sha256(of_segments)
    for ours, theirs in zip(rounds_of(tmp_path / "two"), rounds_of(of_segments), strict=True):
        for key in ("selected", "failed", "peak_memory_mib", "tensor_peak_mib", "cap_mib", "train_loss"):
            assert ours[key] == theirs[key]


def test_a_device_that_is_chosen_in_spite_of_its_cap_fails_as_on_a_gpu_in_the_same_words(tmp_path: Path) -> None:
    """On one rank and on two, so counted by one or by the other."""
    said = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        options = ["--select.memory=false", "--select.memory_correction=false", "--train.rounds=3"]
        assert run(command(config_of(tmp_path), run_dir, *options, ranks=ranks)).returncode == 0
        said.append([record["failed"] for record in rounds_of(run_dir)])
    assert said[0] == said[1]
    first = said[0][0]
    assert first
    assert all(text.startswith("memory cap: an allocation of") for text in first.values())
    assert all(text.endswith("the cap is 5.00 MiB") for text in first.values())


def test_levels_and_ways_go_by_segments_and_devices_are_asked_under_them(tmp_path: Path) -> None:
    fleet = {"devices": DEVICES, "memory_cap_mib": [8.0, 6.0, 4.0], "accounting": "cuda_segments"}
    changes = {"fleet": fleet, "method": {"name": "heterofl"}, "select": {"name": "power_of_choice"}}
    config = config_of(tmp_path, **changes, train=SECTIONS["train"] | {"fit": "auto"})
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    seen = set()
    for record in rounds_of(tmp_path / "run"):
        assert record["failed"] == {}
        for device, peak in record["peak_memory_mib"].items():
            cap = record["cap_mib"][device]
            seen.add((cap, record["level"][device], record["way"][device]))
            assert peak <= cap
    assert seen == {(8.0, 4, "whole"), (6.0, 4, "recompute"), (4.0, 4, "recompute2")}
