"""Segments in stretches: where they are cut, what each takes, gives and writes into."""

import random

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.network.models.resnet import BasicBlock
from fedfreeze.network.models.vit import EncoderLayer
from fedfreeze.network.stretches import Plan, plan_of


def labels(plan: Plan) -> list[list[str]]:
    return [[step.label for step in stretch.steps] for stretch in plan.stretches]


def test_a_residual_block_is_cut_at_its_layers() -> None:
    plan = plan_of([BasicBlock(4, 8, 2, "batch")], (5, 4, 8, 8), within=True)
    assert labels(plan) == [
        ["0.conv1", "0.norm1", "0.relu"],
        ["0.conv2", "0.norm2"],
        ["0.shortcut.0", "0.shortcut.1", "add", "0.relu"],
    ]
    first, second, third = plan.stretches
    assert (first.takes, len(first.gives)) == ((0,), 1)
    assert second.takes == first.gives
    assert set(third.takes) == {0, *second.gives}
    assert third.gives == (plan.outgoing,)
    assert [stretch.relu is not None for stretch in plan.stretches] == [True, False, True]
    assert third.writes == set(second.gives)  # out += shortcut
    assert not first.writes | second.writes


def test_an_encoder_layer_is_cut_at_its_layers() -> None:
    plan = plan_of([EncoderLayer(32)], (5, 7, 32), within=True)
    assert [stretch[0] for stretch in labels(plan)] == ["0.norm1", "0.qkv", "0.projection", "0.expand", "0.contract"]
    assert not any(stretch.writes for stretch in plan.stretches)


def test_without_within_all_is_one_stretch() -> None:
    plan = plan_of(
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4, 1, "batch")], (5, 3, 8, 8), False
    )
    assert labels(plan) == [["0", "1", "2", "3"]]


class Tied(nn.Module):
    """The first and the last of three layers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alone = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alone(self.outer(functional.relu(self.inner(self.outer(x)))))


def test_what_shares_a_weight_stays_together() -> None:
    plan = plan_of([Tied()], (5, 4), within=True)
    assert labels(plan) == [["0.outer", "0.inner", "relu", "0.outer"], ["0.alone"]]


class InPlace(nn.Module):
    """Begins with an activation in the memory of what comes in, and asks for a value if it is told to."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.asks = asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.asks and x.sum().item() > 1e9:
            return x
        x = functional.silu(x, inplace=True)
        return self.other(self.one(x)) + x


def test_writing_into_what_comes_in_is_noted() -> None:
    plan = plan_of([InPlace()], (5, 4), within=True)
    assert [sorted(stretch.writes) for stretch in plan.stretches] == [[0], [], []]


def test_what_cannot_be_known_is_one_stretch_that_may_write() -> None:
    plan = plan_of([InPlace(asks=True)], (5, 4), within=True)
    assert [sorted(stretch.writes) for stretch in plan.stretches] == [[0]]
    plan = plan_of([InPlace(asks=True)], (5, 4), within=False)
    assert [sorted(stretch.writes) for stretch in plan.stretches] == [[0]]


def test_gradients_go_where_something_trains() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    first.requires_grad_(False)
    plan = plan_of([first, second], (5, 4), within=True)
    assert plan.trained(False) == {2}
    assert plan.trained(True) == {0, 1, 2}


class Rows(nn.Module):
    """A number that goes by the size of the batch, but not in proportion, and one that is drawn."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = random.random() if self.draws else min(x.size(0), 6)
        return self.other(self.one(x) * scale)


def test_a_plan_holds_for_one_size_of_the_batch() -> None:
    for size, scale in ((2, 2), (4, 4), (9, 6)):
        plan = plan_of([Rows(draws=False)], (size, 4), within=True)
        assert labels(plan) == [["0.one", "mul"], ["0.other"]]
        assert plan.stretches[0].steps[1].args[1] == scale


def test_numbers_that_are_drawn_are_not_taken_for_fixed_ones() -> None:
    assert labels(plan_of([Rows(draws=True)], (5, 4), within=True)) == [["0"]]
