"""Where a network can be cut: Sequentials are unfolded, other forwards are followed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedfreeze.errors import ConfigError
from fedfreeze.network.chain import chain_of
from tests.support.checks import assert_one_line
from tests.support.networks import Functional, Reused, Shortcut

IMAGES = torch.randn(4, 3, 8, 8)


def names(network: nn.Module) -> list[str | None]:
    return [link.name for link in chain_of(network)]


@pytest.mark.parametrize("network", [Functional(), Shortcut(), Reused()], ids=lambda n: type(n).__name__)
def test_the_chain_computes_what_the_network_does_with_its_very_weights(network: nn.Module) -> None:
    network.train()
    links = chain_of(network)
    assert network.training
    x = IMAGES
    for link in links:
        x = link.module(x)
    expected = network(IMAGES)
    assert torch.equal(x, expected)
    gradients = torch.autograd.grad(x.sum(), list(network.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), list(network.parameters())), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    held = {id(p) for link in links for p in link.module.parameters()}
    assert held == {id(p) for p in network.parameters()}


def test_operations_between_modules_are_links_without_a_name() -> None:
    named = ["conv1", None, "layer.0", "layer.1.0", "layer.1.1", None, None, "fc"]
    assert names(Functional()) == named


def test_what_a_shortcut_spans_is_one_link_that_begins_at_its_first_module() -> None:
    assert names(Shortcut()) == ["stem", "inner1", "last", None, "fc"]


def test_no_cut_lies_between_two_uses_of_one_module() -> None:
    assert names(Reused()) == ["a", "c", None, "fc"]


def test_a_module_twice_in_a_sequential_runs_twice() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    x = IMAGES
    for link in chain_of(network):
        x = link.module(x)
    assert torch.equal(x, network(IMAGES))


def test_a_sequential_with_a_forward_or_hook_of_its_own_is_not_unfolded() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Sequential(nn.ReLU())
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    network = nn.Sequential(Doubled(nn.Conv2d(3, 3, 1)), hooked, nn.Sequential(nn.ReLU(), nn.Sequential()))
    assert names(network) == ["0", "1", "2.0"]


class Branching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(self.fc(x), 0.5, self.training)


class TwoInputs(Dropping):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.fc(x + y)


class TwoOutputs(Dropping):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, self.fc(x)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Branching(3, 2), "cannot be followed"),
        (Dropping(), "depends on self.training"),
        (TwoInputs(), "must take the images alone"),
        (TwoOutputs(), "return one tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_that_cannot_be_cut_is_one_line(network: nn.Module, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chain_of(network)
    assert_one_line(caught.value, says, type(network).__name__)
