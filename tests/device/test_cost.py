"""The cost model: predicted on fake tensors or by a step, equal to what training takes."""

import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import fedfreeze.device.cost as cost_model
from fedfreeze.config.file import make_config
from fedfreeze.config.ways import WHOLE, Way, way_of
from fedfreeze.device.cap import count_peak
from fedfreeze.device.cost import Costs, WayCost, fit_method, measure_costs
from fedfreeze.methods import full_model_stage, make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage

CPU = torch.device("cpu")


def measured_peak(
    stage: Stage, config: object, batch_size: int, image_shape: tuple[int, int, int], way: Way = WHOLE
) -> int:
    """Peak of the second real step, so that nothing of a first time is in it."""
    trainer = LocalTrainer(stage, config.train)  # type: ignore[attr-defined]
    trainer.go(way)
    images, labels = torch.randn(batch_size, *image_shape), torch.randint(0, 10, (batch_size,))
    trainer.step(images, labels)
    return count_peak(lambda: trainer.step(images, labels), [*trainer.held_tensors(), images, labels])


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", "conv_norm"),
        pytest.param("batch", "conv", marks=pytest.mark.slow),
        ("batch", "block"),
        pytest.param("batch", "pool", marks=pytest.mark.slow),
        ("group", "conv_norm"),
        pytest.param("group", "conv", marks=pytest.mark.slow),
        pytest.param("group", "block", marks=pytest.mark.slow),
        pytest.param("group", "pool", marks=pytest.mark.slow),
    ],
)
def test_prediction_equals_measurement(kind: str, norm: str) -> None:
    shape = (3, 16, 16)
    config = make_config(
        {
            "model": {"name": "resnet10", "width": 8, "norm": norm},
            "method": {"output_module": kind},
            "train": {"batch_size": 8},
        }
    )
    costs = measure_costs(config, shape, 10, values=False)
    assert measure_costs(config, shape, 10, values=True) == costs
    method = make_method(config, build_network(config.model, shape, 10, 0))
    for index, cost in enumerate(costs.stages):
        stage = method.enter_stage(index, CPU)
        assert measured_peak(stage, config, 8, shape) == cost.memory_bytes
        assert cost.trained_elements == len(stage.flat)
        method.leave_stage(stage)
    full = full_model_stage(build_network(config.model, shape, 10, 0), CPU)
    assert measured_peak(full, config, 8, shape) == costs.full.memory_bytes


@pytest.mark.parametrize(
    ("method_name", "model", "fit"),
    [
        ("smartfreeze", "vgg11", "auto, micro(3)"),
        ("fedavg", "vit", "recompute"),
        pytest.param("smartfreeze", "vit", "auto, micro(2)", marks=pytest.mark.slow),
        pytest.param("fedavg", "vgg11", "recompute", marks=pytest.mark.slow),
    ],
)
def test_prediction_equals_measurement_for_other_architectures(model: str, method_name: str, fit: str) -> None:
    shape = (3, 16, 16)
    train = {"batch_size": 8, "fit": fit}
    values = {"model": {"name": model, "width": 8}, "method": {"name": method_name}, "train": train}
    config = make_config(values)
    costs = measure_costs(config, shape, 10, values=False)
    assert measure_costs(config, shape, 10, values=True) == costs
    method = make_method(config, build_network(config.model, shape, 10, 0))
    for index, cost in enumerate(costs.stages):
        stage = method.enter_stage(index, CPU)
        for each in cost.ways:
            assert measured_peak(stage, config, 8, shape, each.way) == each.memory_bytes
        method.leave_stage(stage)


@pytest.mark.parametrize(("model", "width"), [("resnet8", 16), ("vgg11", 8), ("vit", 8)])
def test_devices_that_store_features_need_less_and_what_they_need_is_predicted(model: str, width: int) -> None:
    shape = (3, 16, 16)
    values = {"model": {"name": model, "width": width}, "train": {"batch_size": 8}}
    config = make_config(values | {"train": {"batch_size": 8, "prefix": "stored"}})
    stored, plain = (measure_costs(each, shape, 10, values=False) for each in (config, make_config(values)))
    assert measure_costs(config, shape, 10, values=True) == stored
    assert stored.full == plain.full
    method = make_method(config, build_network(config.model, shape, 10, 0))
    for index, (ours, theirs) in enumerate(zip(stored.stages, plain.stages, strict=True)):
        assert ours.step_flops == theirs.step_flops  # the clock leaves out what is not done
        assert (ours.memory_bytes < theirs.memory_bytes) == (index > 0)
        stage = method.enter_stage(index, CPU)
        expected = stage.frozen_forward(torch.zeros(1, *shape)).numel() * 4 if index else 0
        assert ours.feature_bytes == theirs.feature_bytes == expected
        method.leave_stage(stage)


def test_small_networks_are_run_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    fake_tensors = cost_model.fake_tensors

    def noted() -> AbstractContextManager[None]:
        followed.append(True)
        return fake_tensors()

    monkeypatch.setattr(cost_model, "fake_tensors", noted)
    values: dict[str, Any] = {"method": {"name": "fedavg"}, "train": {"batch_size": 8}}
    for model, batch_size in (("resnet8", 8), ("resnet8", 100_000), ("vgg11", 8)):
        followed.clear()
        config = make_config(
            values | {"model": {"name": model, "width": 4}, "train": {"batch_size": batch_size}}
            if model == "resnet8"
            else values | {"model": {"name": model, "width": 128}}
        )
        measure_costs(config, (1, 8, 8), 10)
        assert bool(followed) == ((model, batch_size) != ("resnet8", 8)), (model, batch_size)


def test_a_small_start_does_not_load_torchs_compiler() -> None:
    """It takes longer than all else that a start imports, and memory on every rank."""
    program = """
import sys
import torch
from fedfreeze.config.file import make_config
from fedfreeze.device.cost import Costs, WayCost, fit_method, measure_costs
measure_costs(make_config({"model": {"width": 4}, "train": {"batch_size": 4}}), (1, 8, 8), 10)
sys.exit("torch._dynamo is loaded" if "torch._dynamo" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_flops_of_a_transformer_against_a_hand_count() -> None:
    values = {"model": {"name": "vit", "width": 64}, "method": {"name": "fedavg"}, "train": {"batch_size": 2}}
    counted = measure_costs(make_config(values), (3, 32, 32), 10).stages[0].step_flops
    tokens, dimension = 2 * 64, 64
    linear = 2 * 12 * dimension**2 * tokens * 8  # query, key, value, projection and a perceptron of four times
    attention = 2 * 2 * 64 * dimension * tokens * 8  # the backward pass computes the scores again: 2.5 times
    embedding = 2 * 3 * 4 * 4 * dimension * tokens  # images need no gradient
    assert counted == 3 * linear + 3.5 * attention + 2 * embedding + 3 * 2 * dimension * 10 * 2


def test_each_way_needs_less_memory_and_more_work_than_the_one_before() -> None:
    train = {"batch_size": 32, "fit": "auto, micro(4), recompute+micro(4)", "prefix_chunk": 8}
    values = {"model": {"name": "resnet18", "width": 8}, "train": train}
    for index, cost in enumerate(measure_costs(make_config(values), (3, 16, 16), 10).stages):
        whole, recompute, within, again, micro, both = cost.ways
        # what saves nothing in a stage (of the last, the end is stored) may hold a few numbers more
        for way, next_way in pairwise((whole, recompute, within, again)):
            assert next_way.memory_bytes < 1.005 * way.memory_bytes
        if index < 3:  # of the last stage weights and momentum are most
            assert within.memory_bytes < 0.95 * recompute.memory_bytes < 0.86 * whole.memory_bytes
        assert whole.step_flops < recompute.step_flops < within.step_flops <= again.step_flops
        assert again.step_flops - within.step_flops == (cost.frozen_flops if index else 0)
        assert both.memory_bytes < 1.005 * micro.memory_bytes < whole.memory_bytes
        assert micro.step_flops == pytest.approx(whole.step_flops, rel=0.01)
        assert (cost.memory_bytes, cost.step_flops) == (whole.memory_bytes, whole.step_flops)
        assert cost.least_bytes == min(both.memory_bytes, micro.memory_bytes)


def test_a_device_takes_the_first_way_that_its_cap_holds() -> None:
    train = {"batch_size": 32, "fit": "whole, recompute, micro(4)"}
    values = {"model": {"name": "resnet10", "width": 16}, "method": {"name": "fedavg"}, "train": train}
    cost = measure_costs(make_config(values), (3, 32, 32), 10).stages[0]
    sizes = [way.memory_bytes for way in cost.ways]
    assert sizes[0] > 1.2 * sizes[1] > 1.5 * sizes[2]
    assert 1.2 < cost.ways[1].step_flops / cost.ways[0].step_flops < 1.34
    assert [cost.way_for(cap) for cap in (None, *sizes, *(size - 1 for size in sizes))] == [0, 0, 1, 2, 1, 2, 2]


@pytest.mark.parametrize("batch_size", [8, 32])
def test_streaming_the_frozen_blocks_holds_one_module_of_them_at_a_time(batch_size: int) -> None:
    train = {"batch_size": batch_size, "fit": "auto"}
    values = {"model": {"name": "resnet10", "width": 32}, "train": train}
    held = measure_costs(make_config(values), (3, 8, 8), 10).stages
    streamed = measure_costs(make_config({**values, "train": {**train, "prefix": "streamed"}}), (3, 8, 8), 10).stages
    for index, (one, other) in enumerate(zip(held, streamed, strict=True)):
        for way, read in zip(one.ways, other.ways, strict=True):
            assert read.step_flops == way.step_flops
            assert (way.memory_bytes > read.memory_bytes) is (index > 0)
            assert way.memory_bytes - read.memory_bytes <= one.frozen_elements * 4 + 512 * 60


def test_flops_and_elements_against_a_hand_count() -> None:
    config = make_config({"model": {"name": "resnet8", "width": 4}, "train": {"batch_size": 2}})
    costs = measure_costs(config, (1, 8, 8), 10)
    # stage 3 freezes conv1, layer1 and layer2; two FLOPs a multiply-add, 8x8 then 4x4 images, batch 2
    layer1 = 2 * (4 * 4 * 9) * 64
    layer2 = (4 * 8 * 9 + 8 * 8 * 9 + 4 * 8) * 16
    assert costs.stages[2].frozen_flops == 2 * 2 * (4 * 9 * 64 + layer1 + layer2)
    # layer3: three convolutions and three batch norms (two parameters, two statistics a channel), then the classifier
    convolutions = 8 * 16 * 9 + 16 * 16 * 9 + 8 * 16
    assert costs.stages[2].watched_parameters == convolutions + 3 * 2 * 16
    assert costs.stages[2].trained_elements == convolutions + 3 * 4 * 16 + 16 * 10 + 10
    assert costs.stages[2].bytes_up == 4 * costs.stages[2].trained_elements
    assert [cost.frozen_flops for cost in costs.stages[:1]] == [0]


@pytest.mark.parametrize("batch_size", [pytest.param(32, marks=pytest.mark.slow), 128])
def test_a_full_model_costs_more_than_any_stage(batch_size: int) -> None:
    config = make_config({"model": {"name": "resnet18", "width": 64}, "train": {"batch_size": batch_size}})
    costs = measure_costs(config, (3, 32, 32), 10)
    assert all(cost.memory_bytes < costs.full.memory_bytes for cost in costs.stages)
    assert all(cost.step_flops < costs.full.step_flops for cost in costs.stages)


def test_fedavg_has_one_stage_the_full_model() -> None:
    config = make_config({"method": {"name": "fedavg"}, "model": {"width": 4}})
    costs = measure_costs(config, (1, 8, 8), 10)
    assert len(costs.stages) == 1
    assert costs.stages[0].memory_bytes == costs.full.memory_bytes


@pytest.mark.parametrize(
    ("model", "method_name"),
    [
        ("resnet10", "smartfreeze"),
        pytest.param("vgg11", "fedavg", marks=pytest.mark.slow),
        ("vit", "fedavg"),
        pytest.param("resnet10", "fedavg", marks=pytest.mark.slow),
        pytest.param("vgg11", "smartfreeze", marks=pytest.mark.slow),
        pytest.param("vit", "smartfreeze", marks=pytest.mark.slow),
    ],
)
def test_count_agrees_with_torchs_own_memory_tracker(model: str, method_name: str) -> None:
    """An independent count of the same step: torch's MemTracker, within 2 %. (It cannot follow a frozen prefix.)"""
    from torch.distributed._tools.mem_tracker import MemTracker

    shape = (3, 32, 32)
    config = make_config(
        {
            "model": {"name": model, "width": 16},
            "method": {"name": method_name},
            "train": {"batch_size": 16, "momentum": 0.0},
        }
    )
    stage = make_method(config, build_network(config.model, shape, 10, 0)).enter_stage(0, CPU)
    predicted = measure_costs(config, shape, 10).stages[0].memory_bytes
    trainer = LocalTrainer(stage, config.train)
    images, labels = torch.randn(16, *shape), torch.randint(0, 10, (16,))
    tracker = MemTracker()
    tracker.track_external(stage, images, labels)
    with tracker:
        trainer.step(images, labels)
    tracked = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    assert predicted == pytest.approx(tracked, rel=0.02)


@pytest.mark.parametrize(
    ("model", "width", "fit"),
    [("resnet8", 8, "auto"), pytest.param("vit", 8, "auto, micro(3)", marks=pytest.mark.slow)],
)
def test_reserved_bytes_come_beside_the_others_and_are_the_same_on_fake_tensors(
    model: str, width: int, fit: str
) -> None:
    shape = (3, 16, 16)
    values = {"model": {"name": model, "width": width}, "train": {"batch_size": 8, "fit": fit}}
    plain = measure_costs(make_config(values), shape, 10)
    predicted = [measure_costs(make_config(values), shape, 10, values=each, reserved=True) for each in (True, False)]
    assert predicted[0] == predicted[1]
    found = predicted[0]
    for ours, theirs in zip((*found.stages, found.full), (*plain.stages, plain.full), strict=True):
        assert all(way.reserved_bytes is None for way in theirs.ways)
        bare = tuple(replace(way, reserved_bytes=None) for way in ours.ways)
        assert replace(ours, ways=bare) == theirs
        assert all(way.memory_bytes <= (way.reserved_bytes or 0) for way in ours.ways)
        assert ours.least_bytes == theirs.least_bytes  # tensors decide, unless the configuration says else


def test_by_segments_a_cap_must_hold_what_is_reserved() -> None:
    ways = (WayCost(WHOLE, 9, 1, 40, True), WayCost(way_of("recompute"), 5, 1, 30, True))
    cost = replace(measure_costs(make_config({"model": {"width": 4}}), (1, 8, 8), 10).stages[0], ways=ways)
    assert (cost.memory_bytes, cost.least_bytes) == (40, 30)
    assert [cost.way_for(cap) for cap in (None, 40, 39, 30, 29)] == [0, 0, 1, 1, 1]
    costs = Costs(((cost, replace(cost, ways=(replace(ways[0], reserved_bytes=50),))),), cost)
    assert costs.needed_bytes == (30,)
    assert [costs.level_of(0, cap) for cap in (None, 50, 49, 30, 20)] == [1, 1, 0, 0, 0]


def test_methods_that_fit_the_caps_fit_what_is_reserved() -> None:
    """The smallest cap holds the width that is chosen, by whichever is counted."""
    widths = {}
    for accounting in ("tensor_bytes", "cuda_segments"):
        values = {"model": {"width": 16}, "method": {"name": "allsmall"}, "fleet": {"accounting": accounting}}
        config = make_config(values | {"train": {"batch_size": 32}})
        caps = [6 * 2**20]
        fitted = fit_method(config, (3, 16, 16), 10, caps)
        assert measure_costs(config, (3, 16, 16), 10, fitted).needed_bytes[0] <= caps[0]
        widths[accounting] = fitted["width"]
    assert widths["cuda_segments"] < widths["tensor_bytes"]
