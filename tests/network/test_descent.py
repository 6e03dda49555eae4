"""SGD that lets go of gradients: torch's own steps, however many passes, and no gradient held for longer."""

import pytest
import torch
from torch import nn

from fedfreeze.config.schema import TrainConfig
from fedfreeze.network import descent
from fedfreeze.network.descent import Descent, used_once
from fedfreeze.network.flat import FlatPart

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("large", [1, 1000, 10**9])
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, momentum: float, passes: int, large: int) -> None:
    monkeypatch.setattr(descent, "LARGE_ELEMENTS", large)
    ours, theirs = network(), network()
    config = TrainConfig(momentum=momentum, weight_decay=0.1)
    sgd = Descent([ours], FlatPart(ours, nn.Sequential(), CPU), config)
    sgd.begin(0.1)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, weight_decay=0.1, fused=True)
    for step in range(4):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        theirs(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, part in enumerate(x.split(6 // passes)):
            loss = ours(part).square().mean() / passes
            with sgd.one_pass(first=number == 0, last=number == passes - 1):
                loss.backward()
        assert all(parameter.grad is None for parameter in ours.parameters())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if passes == 1:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other)


def test_between_passes_no_gradient_is_held_where_there_is_momentum() -> None:
    for momentum, held in ((0.9, 0), (0.0, 6)):
        ours = network()
        sgd = Descent([ours], FlatPart(ours, nn.Sequential(), CPU), TrainConfig(momentum=momentum))
        with sgd.one_pass(first=True, last=False):
            ours(torch.ones(2, 6)).sum().backward()
        assert sum(parameter.grad is not None for parameter in ours.parameters()) == held


def test_a_step_that_breaks_off_leaves_nothing() -> None:
    ours = network()
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    sgd = Descent([ours], FlatPart(ours, nn.Sequential(), CPU), TrainConfig())
    with sgd.one_pass(first=True, last=False):
        ours(torch.ones(2, 6)).sum().backward()
    sgd.begin(0.1)
    with sgd.one_pass(first=True, last=True):
        pass
    for one, other in zip(ours.parameters(), before, strict=True):
        assert torch.equal(one, other)


def test_only_weights_that_one_layer_of_torch_holds_go_at_once() -> None:
    class Own(nn.Linear):
        pass

    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2, bias=False)
    tied.weight = nn.Parameter(torch.zeros(2, 2))
    also = nn.Linear(2, 2, bias=False)
    also.weight = tied.weight
    alone = nn.Linear(2, 2)
    part = nn.Sequential(shared, nn.Sequential(shared), Own(2, 2), tied, also, alone)
    assert [id(parameter) for parameter in used_once([part])] == [id(alone.weight), id(alone.bias)]
    assert used_once([part, nn.Sequential(alone)]) == []
