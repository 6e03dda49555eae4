"""Devices that take their steps by different ways in one round: who joins, and that the network is the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedfreeze.cli import main
from fedfreeze.config.file import load_config
from fedfreeze.device.cost import measure_costs
from fedfreeze.units import MIB
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

DEVICES, ROUNDS = 12, 6
BOTH = "whole, recompute2"
SECTIONS = {
    "data": {"partition": "iid"},
    "model": {"width": 16},
    "train": {"rounds": ROUNDS, "participants": 5, "batch_size": 32},
    "pace": {"policy": "fixed"},
    "cache": {"features": False},
}


def needs(method: str, tmp_path: Path) -> tuple[float, float]:
    """Return MiB for all of a method's stages with activations stored, and with those of each recomputed."""
    config = load_config(str(write_config(tmp_path, **SECTIONS, method={"name": method})), [f"--train.fit={BOTH}"])
    stages = measure_costs(config, (1, 8, 8), 10).stages
    stored, recomputed = (max(stage.ways[way].memory_bytes for stage in stages) / MIB for way in (0, 1))
    assert recomputed < 0.95 * stored
    return stored + 0.01, recomputed + 0.01


def sections(caps: list[float], fit: str, method: str) -> dict[str, dict]:
    train = SECTIONS["train"] | {"fit": fit}
    return SECTIONS | {
        "fleet": {"devices": DEVICES, "memory_cap_mib": caps},
        "train": train,
        "method": {"name": method},
    }


@pytest.mark.parametrize("method", ["smartfreeze", "fedavg"])
def test_ways_that_differ_in_a_round_give_the_network_of_one_way(method: str, tmp_path: Path) -> None:
    stored, recomputed = needs(method, tmp_path)
    folders = {}
    cases = {
        "whole": ([stored], "whole"),
        "mixed": ([stored, recomputed], BOTH),
        "again": ([recomputed], "recompute2"),
    }
    for name, (caps, fit) in cases.items():
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, **sections(caps, fit, method))
        folders[name] = tmp_path / name / "run"
        assert main(["run", str(config), "--run-dir", str(folders[name])]) == 0
    assert len({sha256(folder) for folder in folders.values()}) == 1
    rounds = {name: [r for r in metrics(folder) if r["kind"] == "round"] for name, folder in folders.items()}
    for whole, mixed, again in zip(*rounds.values(), strict=True):
        assert whole["failed"] == mixed["failed"] == again["failed"] == {}
        assert set(whole["way"].values()) == {"whole"}
        assert set(again["way"].values()) == {"recompute2"}
        assert whole["train_loss"] == mixed["train_loss"] == again["train_loss"]
        assert whole["flops"] < again["flops"]
        assert whole["flops"] <= mixed["flops"] <= again["flops"]
        for device, way in mixed["way"].items():
            peaks = (whole if way == "whole" else again)["peak_memory_mib"]
            assert mixed["peak_memory_mib"][device] == peaks[device] <= mixed["cap_mib"][device]
    assert {way for each in rounds["mixed"] for way in each["way"].values()} == {"whole", "recompute2"}


def test_two_ranks_killed_and_resumed_take_the_same_ways(tmp_path: Path) -> None:
    stored, recomputed = needs("smartfreeze", tmp_path)
    config = write_config(tmp_path, **sections([stored, recomputed], BOTH, "smartfreeze"))
    assert run(command(config, tmp_path / "one")).returncode == 0
    two = command(config, tmp_path / "two", ranks=2)
    process = start(two)
    assert wait_for_round(process, tmp_path / "two", 3)
    kill_tree(process)
    assert run(two).returncode == 0
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
    one, other = ([r["way"] for r in metrics(tmp_path / name) if r["kind"] == "round"] for name in ("one", "two"))
    assert one == other
    assert summary(tmp_path / "two")["rounds"] == ROUNDS


def test_by_recomputation_more_devices_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, recomputed = needs("fedavg", tmp_path)
    config = write_config(tmp_path, **sections([stored, recomputed, recomputed], BOTH, "fedavg"))
    assert main(["plan", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [(row["stage"], row["way"], row["eligible"]) for row in rows] == [
        (0, "whole", 4),
        (0, "recompute2", 12),
        (None, "whole", 4),
        (None, "recompute2", 12),
    ]
    assert rows[1]["memory_mib"] < rows[0]["memory_mib"]
    assert rows[1]["step_gflop"] > rows[0]["step_gflop"]
    assert main(["plan", str(config)]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 110 for line in table.splitlines())
    assert "recompute2" in table
    assert f"12 of {DEVICES} devices can join every stage" in table


def test_a_device_that_runs_out_takes_the_next_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the prediction is too low, as on another GPU."""
    _, recomputed = needs("fedavg", tmp_path)
    config = write_config(tmp_path, **sections([recomputed], BOTH, "fedavg"))

    def too_low(*facts, **options):
        costs = measure_costs(*facts, **options)
        (cost,) = costs.stages
        first = replace(cost.ways[0], memory_bytes=cost.ways[1].memory_bytes)
        return replace(costs, levels=((replace(cost, ways=(first, cost.ways[1])),),))

    monkeypatch.setattr("fedfreeze.run.experiment.measure_costs", too_low)
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    seen: set[str] = set()
    for each in (line for line in metrics(tmp_path / "run") if line["kind"] == "round"):
        for device, way in each["way"].items():
            assert way == ("recompute2" if device in seen else "whole")
            assert (device in each["failed"]) is (way == "whole")
            seen.add(device)
    assert len(seen) > 5


OWN = """
import numpy as np
import torch
from torch import nn


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * float(np.random.rand())


def network(num_classes, in_channels, image_size, noise=False):
    layers = [nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.2)]
    if noise:
        layers.append(Noise())
    return nn.Sequential(*layers, nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, num_classes))
"""


@pytest.mark.parametrize(("noise", "code"), [(False, 0), (True, 64)])
def test_what_draws_from_elsewhere_cannot_be_recomputed(
    noise: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawn_elsewhere.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = {"factory": "drawn_elsewhere:network", "options": {"noise": noise}}
    config = write_config(tmp_path, **(sections([50.0], "recompute", "fedavg") | {"model": own}))
    for verb, more in (("plan", []), ("run", ["--run-dir", str(tmp_path / "run")])):
        assert main([verb, str(config), *more]) == code
        said = capfd.readouterr().err
        if noise:
            assert said.count("\n") == 1
            assert "it draws random numbers from elsewhere than torch" in said
