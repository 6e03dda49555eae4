"""FedAvg with activation checkpointing gives the bits of FedAvg."""

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.methods import make_method
from fedfreeze.methods.fedavg_checkpointing import Checkpointed, statistics_held
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer


@pytest.mark.parametrize("model", ["resnet8", "vgg11", "vit"])
def test_steps_give_the_bits_of_fedavg_running_statistics_included(model: str) -> None:
    images, labels = torch.randn(3, 8, 3, 16, 16), torch.randint(0, 10, (3, 8))
    after = []
    for name in ("fedavg", "fedavg_checkpointing"):
        config = make_config({"model": {"name": model, "width": 8}, "method": {"name": name}})
        method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
        stage = method.enter_stage(0, torch.device("cpu"))
        trainer = LocalTrainer(stage, config.train)
        losses = [trainer.step(x, y).tolist() for x, y in zip(images, labels, strict=True)]
        stage.eval()
        after.append((losses, stage.flat.buffer.clone(), stage(images[0])))
    assert after[0][0] == after[1][0]
    assert torch.equal(after[0][1], after[1][1])
    assert torch.equal(after[0][2], after[1][2])


def test_dropout_draws_the_same_mask_in_the_second_forward_pass() -> None:
    plain = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    gradients = []
    for network in (plain, Checkpointed([plain])):
        torch.manual_seed(0)
        network(torch.ones(2, 4)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in plain.parameters() if parameter.grad is not None])
        plain.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_momentum_comes_back_after_an_error() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.25)

    def fail() -> None:
        assert norm.momentum == 0.0
        raise RuntimeError

    with pytest.raises(RuntimeError), statistics_held(norm):
        fail()
    assert norm.momentum == 0.25
