"""What devices tell before a round: their losses, and the last layer's gradient, under their caps."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.device.cap import CountedCap, DeviceMemory, DeviceOutOfMemoryError
from fedfreeze.device.cost import measure_costs
from fedfreeze.device.probe import LOSSES, Probe, make_sketch
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import Stage, classifier_of

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


def stage_of(index: int = 0, **sections: dict) -> Stage:
    config = make_config({"model": {"width": 4}} | sections)
    return make_method(config, build_network(config.model, SHAPE, 10, 0)).enter_stage(index, CPU)


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, *SHAPE, generator=generator), torch.randint(0, 10, (n,), generator=generator)) for n in sizes
    ]


def ask(stage: Stage, size: int, samples: list, cap_bytes: int | None = None) -> np.ndarray:
    cap = CountedCap()
    probe = Probe(stage, cap, 10, size, seed=0)
    with cap.device(cap_bytes) as memory:
        return probe.ask(memory, ("asked",), samples)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_signature_is_the_gradient_that_autograd_gives(index: int) -> None:
    stage = stage_of(index)
    samples = batches(7, 5)
    row = ask(stage, 10**6, samples)
    images, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
    stage.eval()
    classifier = classifier_of(stage, 10)
    loss = functional.cross_entropy(stage(images), labels)
    weight, bias = torch.autograd.grad(loss, [classifier.weight, classifier.bias])
    expected = torch.cat([weight, bias[:, None]], 1).flatten()
    torch.testing.assert_close(torch.from_numpy(row[LOSSES:]), expected, rtol=1e-4, atol=1e-6)
    each = functional.cross_entropy(stage(images), labels, reduction="none")
    assert row[:LOSSES] == pytest.approx([each.mean().item(), each.square().mean().item()], rel=1e-5)


@pytest.mark.parametrize(("model", "index"), [({"name": "resnet10", "width": 16}, 3), ({"width": 16}, 2)])
def test_who_can_train_can_answer(model: dict, index: int) -> None:
    """A device that stores features, or streams weights, never holds all of a stage at once to answer."""
    for prefix in ("recomputed", "streamed", "stored"):
        config = make_config({"model": model, "train": {"prefix": prefix, "batch_size": 32}})
        cost = measure_costs(config, (3, 32, 32), 10).stages[index]
        stage = make_method(config, build_network(config.model, (3, 32, 32), 10, 0)).enter_stage(index, CPU)
        samples = [(torch.rand(32, 3, 32, 32), torch.arange(32) % 10)]
        cap = CountedCap()
        probe = Probe(stage, cap, 10, 512, 0, prefix)
        with cap.device(cost.memory_bytes) as memory:
            row = probe.ask(memory, ("asked",), samples)
        assert memory.peak_bytes <= cost.memory_bytes
        whole = Probe(stage, CountedCap(), 10, 512, 0).ask(DeviceMemory(None), ("asked",), samples)
        assert np.array_equal(row, whole)


def test_losses_alone_are_two_numbers() -> None:
    assert ask(stage_of(), 0, batches(6)).shape == (LOSSES,)


def test_the_sketch_keeps_angles_and_is_the_same_for_every_device() -> None:
    generator = np.random.default_rng(0)
    vectors = torch.from_numpy(generator.normal(size=(40, 5000)).astype(np.float32))
    vectors[20:] += 3 * vectors[0]
    sketch = make_sketch(5000, 512, seed=3)
    assert sketch is not None
    small = torch.stack([sketch(vector) for vector in vectors])
    assert small.shape == (40, 512)
    exact = torch.corrcoef(vectors)
    kept = functional.normalize(small, dim=1) @ functional.normalize(small, dim=1).T
    assert (exact - kept).abs().max() < 0.25
    assert torch.equal(small[0], make_sketch(5000, 512, seed=3)(vectors[0]))  # type: ignore[misc]
    assert make_sketch(512, 512, seed=3) is None


def test_asking_changes_nothing_of_the_network() -> None:
    stage = stage_of()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    ask(stage, 64, batches(8, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.state_dict().items())
    assert not any(module._forward_pre_hooks for module in stage.modules())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_it_needs_less_than_a_training_step_and_holds_to_the_cap(index: int) -> None:
    config = make_config({"model": {"width": 4}, "train": {"batch_size": 8}})
    need = measure_costs(config, SHAPE, 10).stages[index].memory_bytes
    stage = stage_of(index)
    ask(stage, 512, batches(8, 8), cap_bytes=need)
    with pytest.raises(DeviceOutOfMemoryError):
        ask(stage, 512, batches(8), cap_bytes=need // 8)


def test_forward_flops_are_those_of_the_network() -> None:
    config = make_config({"model": {"width": 4}, "train": {"batch_size": 8}})
    costs = measure_costs(config, SHAPE, 10)
    for cost in costs.stages:
        # forward of all + twice that of what trains, less the input gradient of the first layer
        assert cost.forward_flops < cost.step_flops < 3 * cost.forward_flops
        assert cost.frozen_flops < cost.forward_flops
