"""Gradients that are handed over: where their memory is used again, and where it must not be."""

import pytest
import torch
from torch.nn import functional

from fedfreeze.network.opened import Opened, through_relu


def test_what_enters_gets_its_gradient_and_what_leaves_is_let_go_of() -> None:
    gradients: dict[int, torch.Tensor] = {}
    opened = Opened(gradients)
    x, weight = torch.randn(3), torch.randn(3, requires_grad=True)
    with torch.enable_grad():
        result = opened.enter(7, x) * weight
    told = [torch.ones(3)]
    opened.leave(result, told)
    opened.backward()
    assert torch.equal(gradients[7], weight.detach())
    assert torch.equal(weight.grad, x)  # type: ignore[arg-type]
    assert not told


def test_gradients_of_several_uses_are_added() -> None:
    opened = Opened({0: torch.full((2,), 10.0)})
    x = torch.ones(2)
    with torch.enable_grad():
        opened.leave(opened.enter(0, x) * 2, [torch.ones(2)])
        opened.leave(opened.enter(0, x) * 3, [torch.ones(2)])
    opened.backward()
    assert opened.gradients[0].tolist() == [15.0, 15.0]


@pytest.mark.parametrize("holder", ["nobody", "a name", "a view", "a graph"])
def test_memory_is_used_again_where_nobody_else_holds_it(holder: str) -> None:
    taken = torch.tensor([-1.0, 2.0, float("nan"), 0.0])
    behind = [torch.arange(1.0, 5.0)]
    memory = behind[0].data_ptr()
    held: object = None
    if holder == "a name":
        held = behind[0]
    elif holder == "a view":
        held = behind[0][1:]
    elif holder == "a graph":
        held = behind[0] * torch.ones(4, requires_grad=True)
    found = through_relu(behind, taken)
    assert found.tolist() == [0.0, 2.0, 3.0, 0.0]
    assert (found.data_ptr() == memory) is (holder == "nobody")
    if isinstance(held, torch.Tensor) and holder != "a graph":
        assert held.tolist() == [1.0, 2.0, 3.0, 4.0][-len(held) :]


def test_a_gradient_that_stands_for_many_elements_is_not_written_into() -> None:
    found = through_relu([torch.ones(1).expand(4)], torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_it_is_the_gradient_of_torch() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    behind = torch.randn(4, 3, 5, 5)
    functional.relu(x).backward(behind)
    assert torch.equal(through_relu([behind.clone()], x), x.grad)  # type: ignore[arg-type]
