"""Devices that cannot learn and losses that are no number: logged, left out, and never in the weights."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedfreeze
from fedfreeze.errors import DataError
from tests.support.in_process import TINY, Outcome, attempt, image_folder, note, own
from tests.support.launching import metrics, summary, write_config

# Multiplies what passes through it by options.factor where a training batch is brighter than options.over.
POISON = """
class Poison(nn.Module):
    def __init__(self, factor, over):
        super().__init__()
        self.factor, self.over = float(factor), over

    def forward(self, x):
        return torch.where(x.mean() > self.over, self.factor, 1.0) * x if self.training else x

def poisoned(num_classes, in_channels, image_size, factor, over, norm=False):
    network = tiny(num_classes, in_channels, image_size)
    network.relu = nn.Sequential(
        OrderedDict(poison=Poison(factor, over), norm=nn.BatchNorm2d(4) if norm else nn.Identity(), relu=nn.ReLU())
    )
    network.a = nn.Sequential(OrderedDict(poison=Poison(factor, over), conv=network.a))
    return network
"""

NORMED = """
def normed(num_classes, in_channels, image_size):
    network = tiny(num_classes, in_channels, image_size)
    network.relu = nn.BatchNorm2d(4)
    return network
"""


def train(
    folder: Path, case: str, source: str, *, learns: bool = True, **sections: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Run to the end; return how it went and the records of the rounds. `learns`: whether any device completes one."""
    given = own(source, **sections)
    (folder / "mine.py").write_text(TINY + source)
    write_config(folder, **given["sections"])
    outcome = attempt(folder, "run", "small.yaml", "--run-dir", "run")
    assert outcome.code == (0 if learns else 64), outcome.err
    assert outcome.err.count("\n") == (0 if learns else 1)
    rounds = [record for record in metrics(folder / "run") if record["kind"] == "round"]
    assert len(rounds) == given["sections"]["train"]["rounds"]
    assert summary(folder / "run")["status"] == ("finished" if learns else "failed")
    reasons = sorted({reason for record in rounds for reason in record["failed"].values()})
    note(case, "a device", outcome.code, f"left out: {'; '.join(reasons) or 'none'}")
    for record in rounds:
        for device, reason in record["failed"].items():
            lines = [line for line in outcome.out.splitlines() if line.startswith(f"round {record['round']}: device")]
            named = [line for line in lines if line.endswith(f" left out: {reason}")]
            assert device in re.findall(r"\d+", named[0].partition(": ")[2].partition(" left out")[0])
    return outcome, rounds


def assert_finite(run_dir: Path, *, deployed: bool = True) -> None:
    """All weights of the deployed network, where there is one, and of the checkpoints are numbers."""
    files = [*run_dir.glob("model.safetensors"), *run_dir.glob("checkpoints/round-*/weights.safetensors")]
    assert len(files) == 2 + deployed
    for file in [*files, *run_dir.glob("checkpoints/updates/*.safetensors")]:
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all(), f"{file}: {name}"


def reasons_of(rounds: list[dict[str, Any]]) -> set[str]:
    return {reason for record in rounds for reason in record["failed"].values()}


def failed(rounds: list[dict[str, Any]]) -> list[int]:
    return [len(record["failed"]) for record in rounds]


def test_devices_with_one_sample_each(tmp_path: Path) -> None:
    """Eight images over eight devices: batch normalisation cannot learn from one."""
    image_folder(tmp_path)
    given = own(
        NORMED,
        data={"path": "data", "cache_dir": "cache", "partition": "iid"},
        model={"factory": "mine:normed"},
        fleet={"devices": 8},
        train={"rounds": 3, "participants": 8},
    )
    (tmp_path / "mine.py").write_text(TINY + NORMED)
    write_config(tmp_path, **given["sections"])
    outcome = attempt(tmp_path, "run", "small.yaml", "--run-dir", "run")
    assert outcome.code == 64
    assert outcome.err.count("\n") == 1
    assert "none of the 8 devices whose cap holds it can train, as that takes 2 samples" in outcome.err
    assert not (tmp_path / "run").exists()


def test_one_sample_is_enough_without_batch_normalisation(tmp_path: Path) -> None:
    image_folder(tmp_path)
    _, rounds = train(
        tmp_path,
        "devices with one sample, no batch normalisation",
        "",
        data={"path": "data", "cache_dir": "cache", "partition": "dirichlet", "alpha": 0.2},
        method={"output_module": "pool"},
        fleet={"devices": 8},
        train={"rounds": 3, "participants": 8},
    )
    assert reasons_of(rounds) == set()
    rows = csv.DictReader((tmp_path / "run" / "partition.csv").open())
    samples = [int(row["samples"]) for row in rows]
    assert 0 in samples
    assert 1 in samples
    assert [record["selected"] for record in rounds] == [[d for d in range(8) if samples[d]]] * 3
    figures = summary(tmp_path / "run")
    with_samples = 1 - samples.count(0) / 8
    assert (figures["participation"], figures["trainable"], figures["inclusion"]) == (with_samples, with_samples, 1.0)
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize(
    ("factor", "method_sum"), [("nan", "exact"), ("nan", "float32"), ("inf", "exact"), ("1e38", "exact")]
)
def test_a_loss_that_is_no_number_on_some_devices(factor: str, method_sum: str, tmp_path: Path) -> None:
    _, rounds = train(
        tmp_path,
        f"loss x {factor} on some devices ({method_sum} sum)",
        POISON,
        data={"alpha": 0.1},
        method={"sum": method_sum},
        model={"factory": "mine:poisoned", "options": {"factor": factor, "over": 0.02}},
        fleet={"devices": 8},
        train={"participants": 8},
        pace={"policy": "perturbation", "window": 2, "slope_window": 2},
    )
    # in the second stage the poison lies in the frozen block, which never trains
    assert 0 < max(failed(rounds)[:3]) <= max(failed(rounds)) < 8
    diverged = {reason for reason in reasons_of(rounds) if "sample" not in reason}
    assert diverged
    assert all(reason.startswith("diverged: ") for reason in diverged)
    for record in rounds:
        assert math.isfinite(record["train_loss"])
    assert_finite(tmp_path / "run")


def test_running_statistics_of_a_device_that_diverged_are_forgotten(tmp_path: Path) -> None:
    """Batch normalisation takes a NaN into its buffers before any loss is seen."""
    _, rounds = train(
        tmp_path,
        "NaN in the running statistics of some devices",
        POISON,
        data={"alpha": 0.1},
        model={"factory": "mine:poisoned", "options": {"factor": "nan", "over": 0.02, "norm": True}},
        fleet={"devices": 8},
        train={"participants": 8},
    )
    assert 0 < max(failed(rounds)[:3]) <= max(failed(rounds)) < 8
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("how", ["NaN", "learning rate 1e30"])
def test_a_loss_that_is_no_number_on_all_devices(how: str, tmp_path: Path) -> None:
    """The run goes on to its end, with the weights that it began with, and says that nothing was learnt."""
    poison = {"factory": "mine:poisoned", "options": {"factor": "nan", "over": -1e9}}
    outcome, rounds = train(
        tmp_path,
        f"{how} on all devices",
        POISON,
        learns=False,
        data={"partition": "iid"},
        model=poison if how == "NaN" else {},
        train={"learning_rate": 1e30 if how != "NaN" else 0.05},
        pace={"policy": "perturbation", "window": 2, "slope_window": 2},
    )
    assert failed(rounds) == [3] * 6
    assert all(reason.startswith("diverged: ") for reason in reasons_of(rounds))
    assert [record["train_loss"] for record in rounds] == [None] * 6
    assert [record["perturbation"] for record in rounds] == [None] * 6
    assert len({record["accuracy"] for record in rounds}) == 1  # nothing changed
    assert "no device completed any of the 6 rounds" in outcome.err
    assert "(at last: diverged: the training loss is nan)" in outcome.err
    assert summary(tmp_path / "run")["error"] in outcome.err
    assert_finite(tmp_path / "run", deployed=False)


def test_what_nobody_trained_is_not_deployed(tmp_path: Path) -> None:
    """A shipped network under a learning rate that no device survives."""
    train(
        tmp_path,
        "learning rate 1e30, shipped network",
        "",
        learns=False,
        data={"partition": "iid"},
        model={"factory": None, "split": None, "name": "resnet8", "width": 4},
        train={"learning_rate": 1e30, "rounds": 3},
    )
    with pytest.raises(DataError, match="is failed, not finished"):
        fedfreeze.load_model(str(tmp_path / "run"))
