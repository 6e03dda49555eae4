"""Every method under caps from start to end: levels within caps, and what is deployed is what was judged."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fedfreeze
from fedfreeze.config.file import load_config
from fedfreeze.data.batches import evaluation_batch
from fedfreeze.data.store import open_store, prepare
from tests.support.in_process import attempt
from tests.support.launching import metrics, summary, write_config

OURS = ("exclusivefl", "allsmall", "heterofl", "fedrolex", "depthfl", "progfed", "progfed_layerwise")
ROUNDS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny run of each method, in this process."""
    folder = tmp_path_factory.mktemp("methods")
    threads = torch.get_num_threads()
    config = write_config(
        folder,
        fleet={"memory_cap_mib": [0.33, 0.45, 0.6, 0.9]},
        train={"rounds": ROUNDS, "participants": 4, "device": "cpu"},
        eval={"every_rounds": 3},
    )
    found = {}
    for name in OURS:
        options = ("--run-dir", name, f"--method.name={name}", "--method.statistics_samples=512")
        outcome = attempt(folder, "run", str(config), *options)
        assert (outcome.code, outcome.err) == (0, ""), name
        found[name] = folder / name
    torch.set_num_threads(threads)
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if record["kind"] == "round"]


@pytest.mark.parametrize("name", OURS)
def test_load_model_gives_the_accuracy_of_the_summary(runs: dict[str, Path], name: str) -> None:
    network = fedfreeze.load_model(str(runs[name]))
    data = open_store(prepare(load_config(str(runs[name] / "config.yaml")).data))
    images, labels = evaluation_batch(data, data.test, 0, len(data.test), torch.device("cpu"))
    with torch.no_grad():
        correct = int((network(images).argmax(1) == labels).sum())
    told = summary(runs[name])
    assert correct == round(told["final_accuracy"] * len(labels))
    assert told["final_accuracy"] > 0.1
    assert told["rounds"] == ROUNDS


@pytest.mark.parametrize("name", OURS)
def test_no_device_runs_out(runs: dict[str, Path], name: str) -> None:
    completed = 0
    for record in rounds_of(runs[name]):
        assert record["failed"] == {} or all("memory" not in reason for reason in record["failed"].values())
        for device, peak in record["peak_memory_mib"].items():
            assert 0 < peak <= record["cap_mib"][device]
            completed += 1
    assert completed > ROUNDS


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "depthfl"])
def test_devices_train_the_level_of_their_cap(runs: dict[str, Path], name: str) -> None:
    level_of_cap: dict[float, set[int]] = {}
    for record in rounds_of(runs[name]):
        for device, level in record["level"].items():
            level_of_cap.setdefault(record["cap_mib"][device], set()).add(level)
    assert all(len(levels) == 1 for levels in level_of_cap.values())
    ascending = [min(levels) for _, levels in sorted(level_of_cap.items())]
    assert ascending == sorted(ascending)
    assert len(set(ascending)) > 1


@pytest.mark.parametrize("name", ["progfed", "progfed_layerwise"])
def test_stages_get_equal_rounds(runs: dict[str, Path], name: str) -> None:
    stages = [record for record in metrics(runs[name]) if record["kind"] == "stage"]
    assert [record["rounds"] for record in stages] == [2, 2, 2]
    assert {record["reason"] for record in stages} == {"fixed"}


def test_static_statistics_are_deployed(runs: dict[str, Path]) -> None:
    for name in ("heterofl", "fedrolex"):
        state = fedfreeze.load_model(str(runs[name])).state_dict()
        variances = [tensor for key, tensor in state.items() if key.endswith("running_var")]
        assert variances
        assert all(not torch.equal(tensor, torch.ones_like(tensor)) for tensor in variances)
