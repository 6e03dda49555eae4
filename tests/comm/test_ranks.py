"""The same experiment on 1, 2, 3 and 4 ranks, by --nproc and torchrun: one result, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedfreeze
from fedfreeze.config.file import load_config
from fedfreeze.data.batches import evaluation_batch
from fedfreeze.data.store import open_store, prepare
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from tests.support.launching import command, metrics, run, sha256, summary, without_wall_time, write_config

LAUNCHES = {
    "nproc 2": {"ranks": 2},
    "nproc 3": {"ranks": 3},
    "nproc 4": {"ranks": 4},
    "torchrun 2": {"ranks": 2, "by": "torchrun"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_run: tuple[Path, Path]) -> dict[str, Path]:
    """One launch of each kind; all the tests below read what they left."""
    folder = tmp_path_factory.mktemp("ranks")
    config, one_rank = small_run
    found = {"one rank": one_rank}
    for name, how in LAUNCHES.items():
        run_dir = folder / name.replace(" ", "-")
        result = run(command(config, run_dir, **how))  # type: ignore[arg-type]
        assert result.returncode == 0, f"{name}: {result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        found[name] = run_dir
    return found


@pytest.fixture(scope="module")
def one(runs: dict[str, Path]) -> Path:
    return runs["one rank"]


def rounds(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if record["kind"] == "round"]


@pytest.mark.parametrize("name", list(LAUNCHES))
def test_one_sha256_and_the_same_metrics(runs: dict[str, Path], one: Path, name: str) -> None:
    assert sha256(runs[name]) == sha256(one)
    assert without_wall_time(metrics(runs[name])) == without_wall_time(metrics(one))


def test_summary_says_how_it_ran(runs: dict[str, Path]) -> None:
    found = {name: [summary(path)[key] for key in ("launcher", "world_size", "backend")] for name, path in runs.items()}
    assert found == {
        "one rank": ["none", 1, "none"],
        "nproc 2": ["nproc", 2, "gloo"],
        "nproc 3": ["nproc", 3, "gloo"],
        "nproc 4": ["nproc", 4, "gloo"],
        "torchrun 2": ["torchrun", 2, "gloo"],
    }


def test_every_block_was_frozen_by_the_controller(one: Path) -> None:
    stages = [record for record in metrics(one) if record["kind"] == "stage"]
    assert [stage["reason"] for stage in stages] == ["converged"] * 3
    assert summary(one)["all_frozen"] is True
    assert sum(stage["rounds"] for stage in stages) == len(rounds(one)) == summary(one)["rounds"] < 16


def test_no_device_exceeds_its_cap_and_the_small_ones_take_part(one: Path) -> None:
    small_took_part = False
    for record in rounds(one):
        for device, peak in record["peak_memory_mib"].items():
            assert 0 < peak <= record["cap_mib"][device]
            small_took_part |= record["cap_mib"][device] < summary(one)["full_memory_mib"]
    assert small_took_part
    assert summary(one)["trained_below_full_memory"] > 0
    assert summary(one)["inclusion"] == 1.0
    assert len({stage["eligible"] for stage in metrics(one) if stage["kind"] == "stage"}) > 1


def test_all_reduce_carries_active_block_and_output_module_exactly(one: Path) -> None:
    config = load_config(str(one / "config.yaml"))
    blocked = build_network(config.model, (1, 8, 8), 10, config.seed)
    method = make_method(config, blocked)
    expected = []
    for stage in range(3):
        modules = [blocked.blocks[stage], method.output_modules.behind(stage)]  # type: ignore[attr-defined]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
        expected.append(sum(t.numel() for t in tensors))
    assert len(set(expected)) == 3
    for record in rounds(one):
        assert record["elements_reduced"] == expected[record["stage"]]
        completed = len(record["selected"]) - len(record["failed"])
        assert record["bytes_up"] == 4 * completed * expected[record["stage"]]


def test_load_model_gives_the_accuracy_of_the_summary(one: Path) -> None:
    network = fedfreeze.load_model(str(one))
    data = open_store(prepare(load_config(str(one / "config.yaml")).data))
    images, labels = evaluation_batch(data, data.test, np.arange(len(data.test)), torch.device("cpu"))
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(summary(one)["final_accuracy"], abs=1e-6)
    assert network.normalisation["mean"] == pytest.approx(list(data.mean))


def test_frozen_blocks_in_the_deployed_network_are_those_of_their_stage_end(one: Path, tmp_path: Path) -> None:
    """A run that stops at the end of stage 1 has the first block that the whole run deploys, byte for byte."""
    first_stage = next(record for record in metrics(one) if record["kind"] == "stage")["rounds"]
    config = write_config(tmp_path, train={"rounds": first_stage})
    assert run(command(config, tmp_path / "short")).returncode == 0
    short = fedfreeze.load_model(str(tmp_path / "short"))
    whole = fedfreeze.load_model(str(one))
    block = dict(short[0].named_children())  # type: ignore[index]
    assert set(block) == {"conv1", "norm1", "relu1", "layer1_0"}
    for name, module in block.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[f"{name.replace('_', '.')}.{key}"]), f"{name}.{key}"


def test_a_finished_run_says_so_and_changes_nothing(one: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in one.iterdir() if path.is_file()}
    again = run(command(one / "config.yaml", one, ranks=2))
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in one.iterdir() if path.is_file()} == before


def test_log_has_one_line_a_round(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 3}, pace={"policy": "fixed"})
    result = run(command(config, tmp_path / "run", ranks=2))
    lines = [line for line in result.stdout.splitlines() if line.startswith("round ") and " loss " in line]
    assert [line.split()[1] for line in lines] == ["1", "2", "3"]
    assert "\r" not in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu_the_allocator_holds_each_device_to_its_cap(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        model={"width": 64},
        fleet={"memory_cap_mib": [30, 60, 120, 240]},
        train={"device": "cuda", "rounds": 6, "batch_size": 64},
        pace={"policy": "fixed"},
    )
    assert run(command(config, tmp_path / "run", ranks=2)).returncode == 0
    assert summary(tmp_path / "run")["cap_enforcement"] == "cuda_memory_fraction"
    assert summary(tmp_path / "run")["backend"] == "gloo" if torch.cuda.device_count() < 2 else "nccl"
    for record in rounds(tmp_path / "run"):
        for device, peak in record["peak_memory_mib"].items():
            assert record["tensor_peak_mib"][device] <= peak <= record["cap_mib"][device]
