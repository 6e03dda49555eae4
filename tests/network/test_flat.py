"""The flat buffer where tensors begin at places that a GPU's kernels can read; nothing else may depend on that."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedfreeze.cli import main
from fedfreeze.network import flat as flat_module
from fedfreeze.network.flat import FlatPart
from tests.support.launching import metrics, sha256

CPU = torch.device("cpu")


class Parts(nn.Module):
    """Parameters and buffers of some sizes."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        for number, size in enumerate(sizes):
            self.register_parameter(f"weight{number}", nn.Parameter(torch.rand(size)))
            self.register_buffer(f"statistic{number}", torch.rand(size + 1))


def test_kernels_of_a_gpu_can_read_every_tensor() -> None:
    assert flat_module.aligned_elements(CPU) == 1  # what a run on CPUs sends and stores has no gaps
    assert flat_module.aligned_elements(torch.device("cuda", 1)) == 4
    flat = FlatPart(Parts([3, 4, 5]).to("meta"), Parts([10, 1]).to("meta"), torch.device("meta"))
    assert [slot.begin for slot in flat.slots] == [0, 4, 8, 16, 28, 32, 36, 44, 52, 64]
    assert (flat.active_parameters, flat.parameters, len(flat)) == (16, 32, 68)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_gaps_are_zero_and_nobodys(active: list[int], output: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_module, "aligned_elements", lambda device: 4)
        modules = Parts(active), Parts(output)
        before = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
        flat = FlatPart(*modules, CPU)
        after = [tensor for module in modules for tensor in module.state_dict().values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert all(slot.begin % 4 == 0 for slot in flat.slots)
        taken = torch.zeros(len(flat), dtype=torch.bool)
        for slot in flat.slots:
            assert not taken[slot.begin : slot.end].any()
            taken[slot.begin : slot.end] = True
        assert not flat.buffer[~taken].any()
        assert flat.parameters_of(modules[0]) == flat.active_parameters
        assert flat.parameters % 4 == len(flat) % 4 == 0
        assert torch.equal(
            flat.without_gaps(flat.buffer[: flat.parameters]), flat.buffer[taken][: sum(active + output)]
        )


@pytest.mark.parametrize("method", ["smartfreeze", "heterofl", "depthfl", "fedavg"])
def test_a_run_gives_the_same_network_with_gaps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str) -> Path:
        folder = tmp_path / name
        options = ["--model.width=6", f"--method.name={method}", "--train.rounds=3", "--pace.policy=fixed"]
        options += [
            "--fleet.devices=8",
            "--train.participants=4",
            "--track.wandb=off",
            "--method.statistics_samples=64",
        ]
        options += ["--fleet.memory_cap_mib=[0.3,0.5,2]", "--eval.every_rounds=1", f"--data.cache_dir={tmp_path}/cache"]
        assert main(["run", "digits", *options, "--run-dir", str(folder)]) == 0
        return folder

    usual = run("usual")
    monkeypatch.setattr(flat_module, "aligned_elements", lambda device: 4)
    gaps = run("gaps")
    assert sha256(usual) == sha256(gaps)
    for one, other in zip(metrics(usual), metrics(gaps), strict=True):
        for key in ("train_loss", "accuracy", "selected", "failed", "perturbation"):
            assert one.get(key) == other.get(key)
