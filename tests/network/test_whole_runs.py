"""Whole runs of networks that cannot be cut, share weights or take raw pixels: trained, kept, loaded again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedfreeze import load_model
from tests.support.in_process import TINY_RUN, Outcome, attempt
from tests.support.launching import metrics, summary, write_config

NETWORKS = """
import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(functional.relu(self.conv2(functional.relu(self.conv1(x)))).mean((2, 3)))

class Branching(Net):
    def forward(self, x):
        return super().forward(x * 2 if x.mean() > 0 else x)

class Shared(Net):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.features = nn.Sequential(self.conv1, nn.ReLU(), self.conv2, nn.ReLU())

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))

class RawPixels(Net):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv1(x * 25500.0)))
        return self.fc(functional.relu(self.conv2(x)).mean((2, 3)))

class NoClassifier(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3)
        self.conv2 = nn.Conv2d(4, classes, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu()).mean((2, 3))

def build(num_classes, in_channels, image_size, kind):
    return globals()[kind](in_channels, num_classes)
"""


def train(folder: Path, kind: str, method: str, *options: str) -> Outcome:
    (folder / "nets.py").write_text(NETWORKS)
    model = {"factory": "nets:build", "split": ["conv1", "conv2"], "options": {"kind": kind}}
    write_config(folder, **(TINY_RUN | {"model": model, "method": {"name": method}}))
    return attempt(folder, "run", "small.yaml", "--run-dir", "run", *options)


@pytest.mark.parametrize("kind", ["Branching", "NoClassifier"])
def test_what_cannot_be_cut_is_trained_whole_and_refused_by_methods_that_cut(kind: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, kind, "smartfreeze")
    assert outcome.code == 64, outcome.err
    assert outcome.err.count("\n") == 1
    outcome = train(tmp_path, kind, "fedavg")
    assert outcome.code == 0, outcome.err
    assert summary(tmp_path / "run")["participation"] > 0


@pytest.mark.parametrize("method", ["smartfreeze", "fedavg"])
def test_a_shared_module_is_stored_once_and_loaded_whole(method: str, tmp_path: Path, monkeypatch) -> None:
    assert train(tmp_path, "Shared", method).code == 0
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert sorted(stored) == [f"{name}.{kind}" for name in ("conv1", "conv2", "fc") for kind in ("bias", "weight")]
    monkeypatch.chdir(tmp_path)
    network = load_model("run")
    assert network.features[0].weight is network.conv1.weight
    assert torch.equal(network.features[2].weight, stored["conv2.weight"])


@pytest.mark.parametrize("sum_kind", ["exact", "float32"])
def test_raw_pixels_under_batch_normalisation_train(sum_kind: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, "RawPixels", "fedavg", f"--method.sum={sum_kind}")
    assert outcome.code == 0, outcome.err
    assert not any(record["failed"] for record in metrics(tmp_path / "run") if record["kind"] == "round")
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert float(stored["norm.running_var"].max()) > 1e5
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["participation"] > 0
