"""ProgFed: what trains in each stage, what stays frozen, and that a stage goes on from a checkpoint's values."""

import hashlib

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.methods import Method, make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def method_of(name: str, model: str = "resnet8") -> Method:
    config = make_config({"model": {"name": model, "width": 4}, "method": {"name": name, "output_module": "block"}})
    return make_method(config, build_network(config.model, SHAPE, 10, 0))


def fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(stage: Stage, steps: int = 2) -> None:
    """Train as a device does, and leave what it got as the global values."""
    generator = torch.Generator().manual_seed(stage.index)
    trainer = LocalTrainer(stage, make_config({}).train)
    trainer.begin(stage.flat.buffer.clone(), 0.1)
    for _ in range(steps):
        images = torch.randn(8, *SHAPE, generator=generator)
        trainer.step(images, torch.randint(0, 10, (8,), generator=generator))
    stage.flat.load(stage.flat.buffer.clone())


@pytest.mark.parametrize("name", ["progfed", "progfed_layerwise"])
def test_a_stage_is_the_blocks_so_far_and_pooling_and_a_linear_layer(name: str) -> None:
    method = method_of(name)
    blocks = method.blocked.blocks
    assert not method.paced
    assert method.num_stages == 3
    for index in range(3):
        method.begin_stage(index)
        stage = method.enter_stage(index, CPU)
        frozen = index if name == "progfed_layerwise" else 0
        assert list(stage.frozen) == list(blocks[:frozen])
        trained = {id(p) for p in stage.parameters() if p.requires_grad}
        head = stage.output_module
        expected = [*blocks[frozen : index + 1], head]
        assert trained == {id(p) for module in expected for p in module.parameters()}
        assert sum(p.numel() for p in head.parameters()) == 10 * (4 * 2**index + 1)
        assert (head[0] is method.blocked.head) == (index == 2)
        stage.eval()
        images = torch.randn(4, *SHAPE)
        deployed = method.deployed(index).eval()
        assert torch.equal(deployed(images), stage(images))
        method.leave_stage(stage)
    assert method.deployed(2) is method.blocked.network


def test_stages_are_named_by_what_trains() -> None:
    assert method_of("progfed").stage_names == ("conv1..layer1", "conv1..layer2", "conv1..layer3")
    assert method_of("progfed", "vgg11").stage_names[2] == "group1..group3"
    assert method_of("progfed_layerwise").stage_names == ("conv1..layer1", "layer2", "layer3")


def test_growing_trains_all_blocks_and_layerwise_never_a_frozen_byte() -> None:
    for name in ("progfed", "progfed_layerwise"):
        method = method_of(name)
        blocks = method.blocked.blocks
        for index in range(3):
            method.begin_stage(index)
            before = [fingerprint(block) for block in blocks]
            stage = method.enter_stage(index, CPU)
            assert [fingerprint(block) for block in blocks] == before
            train(stage)
            method.leave_stage(stage)
            changed = [fingerprint(block) != old for block, old in zip(blocks, before, strict=True)]
            first = index if name == "progfed_layerwise" else 0
            assert changed == [first <= i <= index for i in range(3)]


@pytest.mark.parametrize("name", ["progfed", "progfed_layerwise"])
def test_a_resumed_stage_is_the_one_that_was_left(name: str) -> None:
    """A checkpoint within stage 2 holds the blocks, the head of the stage and its statistics."""
    method = method_of(name)
    for index in range(2):
        method.begin_stage(index)
        stage = method.enter_stage(index, CPU)
        train(stage)
        if index == 0:
            method.leave_stage(stage)
    saved = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    again = method_of(name)
    for key, tensor in again.state_dict().items():
        tensor.copy_(saved[key])
    resumed = again.enter_stage(1, CPU)
    assert torch.equal(resumed.flat.buffer, stage.flat.buffer)
    train(stage)
    train(resumed)
    method.leave_stage(stage)
    again.leave_stage(resumed)
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
