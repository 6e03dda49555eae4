"""Every method and every selector, end to end under caps: 1 rank = 2 ranks killed and resumed, bit for bit."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedfreeze
from fedfreeze.config.file import load_config
from fedfreeze.data.batches import evaluation_batch
from fedfreeze.data.store import open_store, prepare
from fedfreeze.methods import METHODS, make_method
from fedfreeze.methods.smartfreeze import SmartFreeze
from fedfreeze.network.blocks import build_network
from fedfreeze.select import SELECTORS
from tests.support.checks import ROOT
from tests.support.launching import metrics, run, sha256, summary, without_wall_time, write_config

CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"

# Forms of a method that differ from its defaults.
FORMS = {
    "smartfreeze-paper": ["--method.name=smartfreeze", "--method.start=anew", "--method.window=1"],
    "smartfreeze-window": ["--method.name=smartfreeze", "--method.start=surrogate", "--method.window=2"],
}

# Every method with uniform selection, every selector with smartfreeze, and sub-models with devices that are asked.
SETTINGS = [
    *((method, "uniform") for method in [*METHODS, *FORMS]),
    *(("smartfreeze", selector) for selector in SELECTORS if selector != "uniform"),
    ("heterofl", "smartfreeze"),
    ("depthfl", "smartfreeze"),
    ("fedepth", "smartfreeze"),
]
NAMES = [f"{method} {selector}" for method, selector in SETTINGS]


# Relatives of others, or the same selection twice: killed and resumed on two ranks with --full alone.
RELATIVES = ["exclusivefl uniform", "allsmall uniform", "fedrolex uniform"]
RELATIVES += [
    "progfed uniform",
    "smartfreeze tifl",
    "smartfreeze power_of_choice",
    "heterofl smartfreeze",
    "fedepth smartfreeze",
]

OURS = ("exclusivefl", "allsmall", "heterofl", "fedrolex", "depthfl", "fedepth", "progfed", "progfed_layerwise")
ROUNDS = 6


class Runs:
    """Run folders by setting: one rank undisturbed, and two ranks that were killed and resumed."""

    def __init__(self, folder: Path, config: Path, overrides: list[str], kill_in_round: int, killed: Sequence[str]):
        tasks = []
        for name, (method, selector) in zip(NAMES, SETTINGS, strict=True):
            for ranks in (1, 2) if name in killed else (1,):
                tasks.append(
                    {
                        "config": str(config),
                        "overrides": [
                            *overrides,
                            *FORMS.get(method, [f"--method.name={method}"]),
                            f"--select.name={selector}",
                        ],
                        "run_dir": str(self.path(folder, f"{method} {selector}", ranks)),
                        "ranks": ranks,
                        "kill_in_round": kill_in_round if ranks == 2 else None,
                    }
                )
        (folder / "tasks.json").write_text(json.dumps(tasks))
        arguments = [sys.executable, str(ROOT / "tests" / "support" / "many_runs.py"), str(folder / "tasks.json")]
        found = run(arguments, timeout_s=3000)
        self.stderr = found.stderr
        answers = [json.loads(line)["codes"] for line in found.stdout.splitlines()]
        assert len(answers) == len(tasks), found.stderr[-3000:]
        self.folder = folder
        runs = [(name, ranks) for name in NAMES for ranks in (1, 2) if ranks == 1 or name in killed]
        self.codes = dict(zip(runs, answers, strict=True))

    @staticmethod
    def path(folder: Path, name: str, ranks: int) -> Path:
        return folder / f"{name.replace(' ', '-')}-{ranks}"

    def one(self, name: str) -> Path:
        return self.path(self.folder, name, 1)

    def two(self, name: str) -> Path:
        return self.path(self.folder, name, 2)


def on_digits(folder: Path, killed: Sequence[str]) -> Runs:
    config = write_config(
        folder,
        fleet={
            "devices": 24,
            "memory_cap_mib": [0.36, 0.45, 0.6, 0.9],
            "availability": [1.0, 0.7],
            "availability_period_s": 0.2,
        },
        train={"rounds": ROUNDS, "participants": 4, "over_selection": 1.5},
        pace={"policy": "fixed"},
        eval={"every_rounds": 2},
    )
    return Runs(folder, config, ["--method.statistics_samples=512"], kill_in_round=4, killed=killed)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return on_digits(tmp_path_factory.mktemp("digits"), [name for name in NAMES if name not in RELATIVES])


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return on_digits(tmp_path_factory.mktemp("all_digits"), NAMES)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not CIFAR10.exists():
        pytest.skip("no CIFAR-10 beside the project")
    overrides = [
        f"--data.path={CIFAR10}",
        "--data.image_size=16",
        "--model.name=resnet8",
        "--model.width=4",
        "--fleet.devices=200",
        "--fleet.memory_cap_mib=uniform(1, 2)",
        "--train.rounds=3",
        "--train.participants=3",
        "--train.over_selection=1.5",
        "--pace.policy=fixed",
        "--eval.every_rounds=3",
        "--method.statistics_samples=512",
    ]
    return Runs(tmp_path_factory.mktemp("cifar10"), Path("cifar10"), overrides, kill_in_round=2, killed=NAMES)


def check(runs: Runs, name: str) -> None:
    assert runs.codes[name, 1] == [0], runs.stderr[-3000:]
    killed, resumed = runs.codes[name, 2]
    assert killed == 76
    assert resumed == 0, runs.stderr[-3000:]
    one, two = runs.one(name), runs.two(name)
    assert sha256(one) == sha256(two)
    assert without_wall_time(metrics(one)) == without_wall_time(metrics(two))
    check_books(one)


def check_books(run_dir: Path) -> None:
    rounds: list[dict[str, Any]] = [record for record in metrics(run_dir) if record["kind"] == "round"]
    told = summary(run_dir)
    completed = 0
    for record in rounds:
        assert set(record["selected"]) >= set(record["late"])
        assert len(record["selected"]) <= 6
        for device, peak in record["peak_memory_mib"].items():
            assert 0 < peak <= record["cap_mib"][device]
            completed += 1
        assert record["emulated_s"] > 0
    assert completed > 0
    assert told["emulated_s"] == pytest.approx(sum(record["emulated_s"] for record in rounds))
    assert told["bytes_total"] == sum(record["bytes_up"] + record["bytes_down"] for record in rounds)
    assert 0 < told["participation"] <= told["inclusion"] <= 1
    assert told["participation"] == rounds[-1]["participation"]
    fedfreeze.load_model(run_dir)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RELATIVES])
def test_on_digits(digits: Runs, name: str) -> None:
    check(digits, name)


@pytest.mark.parametrize("name", RELATIVES)
def test_on_digits_on_one_rank(digits: Runs, name: str) -> None:
    assert digits.codes[name, 1] == [0], digits.stderr[-3000:]
    check_books(digits.one(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_on_digits(all_digits: Runs, name: str) -> None:
    check(all_digits, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_cifar10(cifar10: Runs, name: str) -> None:
    check(cifar10, name)


def test_sub_models_of_several_sizes_take_part(digits: Runs) -> None:
    for name in ("heterofl uniform", "fedrolex uniform", "depthfl uniform", "fedepth uniform"):
        rounds = [record for record in metrics(digits.one(name)) if record["kind"] == "round"]
        levels = {level for record in rounds for level in record["level"].values()}
        assert len(levels) > 1, name


def test_those_that_ask_are_charged_for_it(digits: Runs) -> None:
    for name in NAMES:
        rounds = [record for record in metrics(digits.one(name)) if record["kind"] == "round"]
        asked = name.split()[1] in ("smartfreeze", "power_of_choice")
        assert (sum(record["probed"] for record in rounds) > 0) == asked, name
        assert (sum(record["probe_s"] for record in rounds) > 0) == asked, name


# --- what the undisturbed runs left


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if record["kind"] == "round"]


@pytest.mark.parametrize("name", OURS)
def test_load_model_gives_the_accuracy_of_the_summary(digits: Runs, name: str) -> None:
    network = fedfreeze.load_model(str(digits.one(f"{name} uniform")))
    data = open_store(prepare(load_config(str(digits.one(f"{name} uniform") / "config.yaml")).data))
    images, labels = evaluation_batch(data, data.test, np.arange(len(data.test)), torch.device("cpu"))
    with torch.no_grad():
        correct = int((network(images).argmax(1) == labels).sum())
    told = summary(digits.one(f"{name} uniform"))
    assert correct == round(told["final_accuracy"] * len(labels))
    assert told["final_accuracy"] > 0.1
    assert told["rounds"] == ROUNDS


@pytest.mark.parametrize(("form", "window"), [("smartfreeze-paper", 1), ("smartfreeze-window", 2)])
def test_all_reduce_carries_what_trains_and_nothing_else(digits: Runs, form: str, window: int) -> None:
    run_dir = digits.one(f"{form} uniform")
    config = load_config(str(run_dir / "config.yaml"))
    method = make_method(config, build_network(config.model, (1, 8, 8), 10, config.seed))
    assert isinstance(method, SmartFreeze)
    expected = []
    for stage in range(4 - window):
        blocks = method.blocked.blocks[stage : stage + window]
        parts = [*blocks, method.output_modules.behind(stage + window - 1)]
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        expected.append(sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()))
    assert {record["stage"] for record in rounds_of(run_dir)} == set(range(len(expected)))
    for record in rounds_of(run_dir):
        assert record["elements_reduced"] == expected[record["stage"]]
        completed = len(record["selected"]) - len(record["failed"])
        assert record["bytes_up"] == 4 * completed * expected[record["stage"]]


@pytest.mark.parametrize("name", OURS)
def test_no_device_runs_out(digits: Runs, name: str) -> None:
    completed = 0
    for record in rounds_of(digits.one(f"{name} uniform")):
        assert record["failed"] == {} or all("memory" not in reason for reason in record["failed"].values())
        for device, peak in record["peak_memory_mib"].items():
            assert 0 < peak <= record["cap_mib"][device]
            completed += 1
    assert completed > ROUNDS


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "depthfl", "fedepth"])
def test_devices_train_the_level_of_their_cap(digits: Runs, name: str) -> None:
    level_of_cap: dict[float, set[int]] = {}
    for record in rounds_of(digits.one(f"{name} uniform")):
        for device, level in record["level"].items():
            level_of_cap.setdefault(record["cap_mib"][device], set()).add(level)
    assert all(len(levels) == 1 for levels in level_of_cap.values())
    ascending = [min(levels) for _, levels in sorted(level_of_cap.items())]
    assert ascending == sorted(ascending)
    assert len(set(ascending)) > 1


@pytest.mark.parametrize("name", ["progfed", "progfed_layerwise"])
def test_stages_get_equal_rounds(digits: Runs, name: str) -> None:
    stages = [record for record in metrics(digits.one(f"{name} uniform")) if record["kind"] == "stage"]
    assert [record["rounds"] for record in stages] == [2, 2, 2]
    assert {record["reason"] for record in stages} == {"fixed"}


def test_static_statistics_are_deployed(digits: Runs) -> None:
    for name in ("heterofl", "fedrolex"):
        state = fedfreeze.load_model(str(digits.one(f"{name} uniform"))).state_dict()
        variances = [tensor for key, tensor in state.items() if key.endswith("running_var")]
        assert variances
        assert all(not torch.equal(tensor, torch.ones_like(tensor)) for tensor in variances)
