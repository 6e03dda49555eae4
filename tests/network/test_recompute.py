"""Activations computed anew in the backward pass: the bits of those that are stored, whatever the network."""

import copy

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.ways import WHOLE, way_of
from fedfreeze.methods import METHODS, make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.recompute import recomputed, segments_of, statistics_held
from fedfreeze.network.stage import LocalTrainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (model, method)
        for model in ("resnet8", "vgg11", "vit")
        for method in METHODS
        if model != "vit" or method not in ("heterofl", "fedrolex", "allsmall")  # which scale channels
    ],
)
def test_steps_give_the_bits_of_stored_activations_running_statistics_included(model: str, method: str) -> None:
    images, labels = torch.randn(3, 8, 3, 16, 16), torch.randint(0, 10, (3, 8))
    after = []
    for way in (WHOLE, way_of("recompute"), way_of("recompute2")):
        config = make_config({"model": {"name": model, "width": 8}, "method": {"name": method}})
        made = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
        for index in range(made.num_stages):
            if index:
                made.begin_stage(index)
            for level in range(made.num_levels(index)) if made.counted else [0]:
                stage = made.enter_level(index, level, CPU) if made.counted else made.enter_stage(index, CPU)
                stage.begin_device(labels.unique())
                trainer = LocalTrainer(stage, config.train)
                trainer.go(way)
                losses = [trainer.step(x, y).tolist() for x, y in zip(images, labels, strict=True)]
                stage.eval()
                after.append((losses, stage.flat.values().clone(), stage(images[0]).detach()))
                if not made.counted:
                    made.leave_stage(stage)
    third = len(after) // 3
    for stored, again in zip(2 * after[:third], after[third:], strict=True):
        assert stored[0] == again[0]
        assert torch.equal(stored[1], again[1])
        assert torch.equal(stored[2], again[2])


def test_dropout_draws_the_same_mask_in_the_second_forward_pass() -> None:
    plain = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    gradients = []
    for forward in (plain, lambda x: recomputed(segments_of([plain], within=True), x)):
        torch.manual_seed(0)
        forward(torch.ones(2, 4)).sum().backward()
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
    stored, again = (copy.deepcopy(plain) for _ in range(2))
    for forward in (stored, lambda x: recomputed(segments_of([again], within=True), x)):
        for step in range(2):
            forward(torch.ones(3, 4) * (step + torch.arange(3.0)[:, None])).square().sum().backward()
    for (name, one), other in zip(stored.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(stored.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
