"""FedAvg with activation checkpointing gives the bits of FedAvg."""

import copy

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


class OwnNorm(nn.Module):
    """Normalisation of a user's own: one buffer that is written into, one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.steps = self.steps + 1
        return x * (1 + self.mean.clone())


def test_statistics_of_another_kind_move_once() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(OwnNorm(), nn.BatchNorm1d(4, momentum=None), OwnNorm())
    stored, recomputed = (copy.deepcopy(plain) for _ in range(2))
    for way in (stored, Checkpointed([recomputed])):
        for step in range(2):
            way(torch.ones(3, 4) * (step + torch.arange(3.0)[:, None])).square().sum().backward()
    for (name, one), other in zip(stored.state_dict().items(), recomputed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(stored.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
