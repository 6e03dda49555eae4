"""A network and an image folder that the package does not know: all stages under caps, frozen bytes, ranks, resume."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.support.launching import (
    command,
    kill_tree,
    metrics,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
    without_wall_time,
)

NETWORK = '''
"""A network of the user's own: a stem, two stages under shortcuts, functional glue, and a bare parameter."""
import torch
from torch import nn
from torch.nn import functional


class Mix(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return functional.leaky_relu(self.norm(self.conv(x)), 0.1)


class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        self.stem = Mix(in_channels, width)
        self.middle = nn.Sequential(Mix(width, width), nn.Dropout(0.1), Mix(width, width))
        self.narrow = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.ones(2 * width, 1, 1))
        self.last = Mix(2 * width, 2 * width)
        self.classify = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.middle(x)
        x = functional.relu(self.narrow(x) * self.scale)
        x = self.last(x)
        return self.classify(x.mean((2, 3)))


def build(*, num_classes, in_channels, image_size, width=6):
    assert image_size == (14, 11)
    return Net(num_classes, in_channels, width)
'''
CLASSES = ["apple", "bread", "cheese"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module `shop.models`, an image folder, and a configuration."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "shop").mkdir()
    (folder / "shop" / "models.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    for split, count in (("Train", 40), ("valid", 12)):
        for number, name in enumerate(CLASSES):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (14, 11, 3), dtype=np.uint8)
                pixels[2 + 3 * number : 5 + 3 * number, :, number] += 110
                Image.fromarray(pixels).save(place / f"{i}.png")
    values = {
        "name": "own",
        "data": {"path": "pictures", "partition": "dirichlet", "alpha": 5.0, "cache_dir": str(folder / "cache")},
        "model": {
            "factory": "shop.models:build",
            "split": ["stem", "narrow", "last"],
            "options": {"width": 6},
        },
        # the full model needs 0.38 MiB, so that a third of the devices could not hold it
        "fleet": {"devices": 9, "memory_cap_mib": [0.31, 0.5, 0.6]},
        "train": {"rounds": 9, "participants": 5, "local_epochs": 4, "batch_size": 8},
        "pace": {"policy": "fixed"},
        "checkpoint": {"keep": 100},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def finished(project: Path) -> Path:
    """The run folder of one rank, run to the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        done = run(command(Path("own.yaml"), project / "one"))
    assert done.returncode == 0, done.stderr
    return project / "one"


def test_it_trains_through_all_stages_under_caps_and_learns(finished: Path) -> None:
    told = summary(finished)
    assert told["status"] == "finished"
    assert told["stage_reasons"] == ["fixed"] * 3
    assert told["model"] == "shop.models:build"
    assert told["num_classes"] == len(CLASSES)
    assert told["class_names"] == json.loads((finished / "data.json").read_text())["class_names"] == CLASSES
    assert told["final_accuracy"] > 0.8
    assert told["trained_below_full_memory"] > 0
    for record in metrics(finished):
        if record["kind"] == "round":
            assert all(peak <= record["cap_mib"][device] for device, peak in record["peak_memory_mib"].items())


def test_the_bytes_of_a_frozen_block_never_change(finished: Path) -> None:
    final = load_file(finished / "model.safetensors")
    owner = {"stem": 0, "middle": 0, "narrow": 1, "scale": 1, "last": 2, "classify": 2}
    ends = {0: 3, 1: 6}  # the round after which a stage's block is frozen
    frozen, moved = 0, 0
    for folder in sorted((finished / "checkpoints").glob("round-*")):
        tensors = load_file(folder / "weights.safetensors")
        number = int(folder.name.removeprefix("round-"))
        for name, value in final.items():
            stage = owner[name.split(".")[0]]
            same = torch.equal(tensors[f"network.{name}"], value)
            if stage in ends and number >= ends[stage]:
                assert same, f"{name} of block {stage} changed after round {number}"
                frozen += 1
            elif name.endswith("weight") and number < 3 * (stage + 1):
                moved += not same
    assert frozen > 50
    assert moved > 10


def test_two_ranks_and_a_killed_run_give_the_same_bits(
    project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    process = start(command(Path("own.yaml"), project / "two", ranks=2))
    assert wait_for_round(process, project / "two", 4)
    kill_tree(process)
    done = run(command(Path("own.yaml"), project / "two", ranks=2))
    assert done.returncode == 0, done.stderr
    assert "resumed after round" in done.stdout
    assert sha256(project / "two") == sha256(finished)
    assert without_wall_time(metrics(project / "two")) == without_wall_time(metrics(finished))


def test_it_can_be_loaded_from_where_its_factory_is(finished: Path, project: Path) -> None:
    script = (
        "import json, sys, torch, fedfreeze\n"
        "network = fedfreeze.load_model('one')\n"
        "shape = list(network(torch.zeros(2, 3, 14, 11)).shape)\n"
        "print(json.dumps([type(network).__name__, shape, network.class_names]))"
    )
    with contextlib.chdir(project):
        done = run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["Net", [2, 3], CLASSES]
