"""The trial of stages before a GPU trains them, tried on the CPU: peaks, who is eligible, layers that are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedfreeze.cli import main
from fedfreeze.config.file import make_config
from fedfreeze.device import trial
from fedfreeze.device.cost import measure_costs
from fedfreeze.device.trial import model_on, repeatable, reserved_peaks, with_reserved
from fedfreeze.errors import ConfigError, UnavailableError
from fedfreeze.network.stage import Stage
from fedfreeze.run.experiment import Experiment
from fedfreeze.units import MIB
from tests.support.launching import metrics, write_config

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
NO_KERNEL = (
    "{} does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'. You can "
    "turn off determinism just for this operation"
)


def config_of(**sections: Any):
    return make_config({"model": {"width": 8}, "train": {"batch_size": 8}} | sections)


@pytest.mark.parametrize("method", ["smartfreeze", "fedavg", "depthfl", "fedepth"])
def test_a_devices_peak_is_that_of_its_largest_step(method: str) -> None:
    """On a CPU what is governed is what is predicted, so that the costs stay as they are."""
    config = config_of(method={"name": method}, train={"batch_size": 8, "fit": "auto, micro(2)"})
    costs = measure_costs(config, SHAPE, 10)
    assert with_reserved(config, costs, SHAPE, 10, {}, CPU) == costs


@pytest.mark.parametrize("more", [0, 5 * MIB])
def test_the_larger_of_prediction_and_trial_counts(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(method={"name": "depthfl"})
    costs = measure_costs(config, SHAPE, 10)
    monkeypatch.setattr(trial, "reserved_peaks", lambda *_: [more])
    found = with_reserved(config, costs, SHAPE, 10, {}, CPU)
    pairs = [(costs.full, found.full), *zip(costs.levels[0], found.levels[0], strict=True)]
    assert len(pairs) == 4
    for before, after in pairs:
        (way,) = before.ways
        assert after == replace(before, ways=(replace(way, memory_bytes=max(before.memory_bytes, more)),))


def test_a_run_on_a_gpu_goes_by_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that finds twice the predicted memory: devices whose cap lies between are not chosen."""
    config = write_config(tmp_path, fleet={"memory_cap_mib": [0.6, 1.2]}, train={"rounds": 3}, pace={"policy": "fixed"})
    asked: list[object] = []

    def doubled(_, costs, *facts):
        asked.append(facts[-1])
        levels = [
            tuple(replace(cost, ways=(replace(cost.ways[0], memory_bytes=2 * cost.memory_bytes),)) for cost in each)
            for each in costs.levels
        ]
        return replace(costs, levels=tuple(levels))

    monkeypatch.setattr("fedfreeze.run.experiment.with_reserved", doubled)
    assert main(["run", str(config), "--run-dir", str(tmp_path / "cpu")]) == 0
    assert asked == []  # a CPU's caps are on what is predicted

    class NotCpu:
        """A device that is no CPU, while the coordinator is made."""

        type = "cuda"

    usual = Experiment._make_coordinator
    monkeypatch.setattr(
        Experiment, "_make_coordinator", lambda self, fleet, samples, _: usual(self, fleet, samples, NotCpu)
    )
    assert main(["run", str(config), "--run-dir", str(tmp_path / "gpu")]) == 0
    assert asked == [NotCpu]
    eligible = [
        [record["eligible"] for record in metrics(tmp_path / kind) if record["kind"] == "stage"]
        for kind in ("cpu", "gpu")
    ]
    assert eligible == [[24, 24, 24], [12, 24, 24]]


def test_on_gpus_networks_lie_as_torch_lays_them_unless_told_otherwise() -> None:
    assert model_on(config_of(), {}, CPU).memory_format == "auto"
    assert model_on(config_of(), {}, torch.device("cuda", 0)).memory_format == "contiguous"
    told = config_of(model={"memory_format": "channels_last"})
    assert model_on(told, {}, torch.device("cuda", 0)).memory_format == "channels_last"


class NoKernel(nn.Module):
    """A layer whose forward, or backward, has no deterministic kernel."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "forward":
            raise RuntimeError(NO_KERNEL.format("odd_pool_cuda"))
        return Backward.apply(x, self.where)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where == "backward":
            raise RuntimeError(NO_KERNEL.format("odd_pool_backward_cuda"))
        if ctx.where == "elsewhere":
            raise RuntimeError("something else is wrong")
        return gradient, None


def network_with(where: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU(inplace=True), NoKernel(where)), nn.Flatten())


@pytest.mark.parametrize(("where", "operation"), [("forward", "odd_pool_cuda"), ("backward", "odd_pool_backward_cuda")])
def test_a_layer_whose_bits_would_not_repeat_is_named(where: str, operation: str) -> None:
    network, config = network_with(where), config_of()
    with pytest.raises(ConfigError) as caught, repeatable(network, config):
        network(torch.ones(2, 1, 8, 8)).sum().backward()
    assert f"NoKernel (1.1) has no kernel on GPUs that gives the same bits again ({operation})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not network[0]._forward_hooks
    assert not network[0]._forward_pre_hooks


def test_other_errors_stay_what_they_are() -> None:
    network = network_with("elsewhere")
    with pytest.raises(RuntimeError, match="something else"), repeatable(network, config_of()):
        network(torch.ones(2, 1, 8, 8)).sum().backward()


def test_a_trial_names_the_layer_too_and_leaves_no_hooks() -> None:
    active = nn.Sequential(nn.Conv2d(1, 4, 3), NoKernel("backward"))
    stage = Stage(0, [], active, nn.Sequential(nn.Flatten(), nn.Linear(144, 10)), CPU)
    cap = trial.make_cap(CPU)
    cap.begin_stage()
    with pytest.raises(ConfigError, match=r"NoKernel \(active\.1\)"):
        reserved_peaks(stage, config_of(), trial.black_images(8, SHAPE, 10), cap, CPU)


def test_a_gpu_that_cannot_hold_a_stage_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise UnavailableError("the memory of cuda:0 is not enough")

    config = config_of()
    costs = measure_costs(config, SHAPE, 10)
    monkeypatch.setattr(trial, "reserved_peaks", full)
    with pytest.raises(UnavailableError, match="the memory of cuda:0 is not enough"):
        with_reserved(config, costs, SHAPE, 10, {}, CPU)


def test_each_network_is_laid_as_where_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full model once was not, and was measured with kernels that no device runs."""
    built, build = [], trial.build_network
    monkeypatch.setattr(trial, "model_on", lambda config, *_: replace(config.model, memory_format="contiguous"))
    monkeypatch.setattr(trial, "build_network", lambda model, *facts: built.append(model) or build(model, *facts))
    config = config_of()
    with_reserved(config, measure_costs(config, SHAPE, 10), SHAPE, 10, {}, CPU)
    assert {model.memory_format for model in built} == {"contiguous"}
    assert len(built) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu_more_is_reserved_than_tensors_need() -> None:
    config = make_config({"model": {"name": "resnet18", "width": 64}, "train": {"batch_size": 32}})
    costs = measure_costs(config, (3, 32, 32), 10)
    found = with_reserved(config, costs, (3, 32, 32), 10, {}, torch.device("cuda", 0))
    for before, after in zip(costs.stages, found.stages, strict=True):
        assert before.memory_bytes < after.memory_bytes < 2 * before.memory_bytes + 64 * MIB
        assert after.memory_bytes % (2 * MIB) == 0
