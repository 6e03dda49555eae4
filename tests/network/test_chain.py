"""Where a network can be cut: Sequentials are unfolded, other forwards are followed."""

import pytest
import torch
from torch import nn

from fedfreeze.errors import ConfigError
from fedfreeze.network.chain import chain_of
from tests.support.checks import assert_one_line
from tests.support.networks import Functional, Reused, Shortcut

SHAPE = (3, 8, 8)
IMAGES = torch.randn(4, *SHAPE)


def names(network: nn.Module) -> list[str | None]:
    return [link.name for link in chain_of(network, SHAPE)]


@pytest.mark.parametrize("network", [Functional(), Shortcut(), Reused()], ids=lambda n: type(n).__name__)
def test_the_chain_computes_what_the_network_does_with_its_very_weights(network: nn.Module) -> None:
    network.train()
    links = chain_of(network, SHAPE)
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
    for link in chain_of(network, SHAPE):
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


class Whole(nn.Module):
    """A convolution and a classifier; each class below does one thing between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.between(self.conv(x)).mean((2, 3)))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Branching(Whole):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class TakingOut(Whole):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.max())


class ThroughNumpy(Whole):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(x.detach().numpy())


class RootOfBatch(Whole):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(len(x) ** 2, 1, 1, 1)[: len(x)] if len(x) > 2 else x


class Cast(Whole):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.mT


class Assigning(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(4, 1, 1))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        self.middle = 0.9 * self.middle + 0.1 * x.detach().mean((0, 2, 3)).view(-1, 1, 1)
        return x - self.middle


class TwoOutputs(Whole):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, super().forward(x)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Branching(), r"it branches on values, or takes them out of a tensor, at test_chain.py:"),
        (TakingOut(), r"takes them out of a tensor, at test_chain.py:"),
        (ThroughNumpy(), r"takes them out of a tensor, at test_chain.py:"),
        (RootOfBatch(), r"depends on the size of the batch"),
        (Cast(), r"torch.autocast at test_chain.py:"),
        (Assigning(), r"it assigns its buffer middle anew; write self.middle.copy_"),
        (TwoOutputs(), r"it returns a tuple, not one tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_that_cannot_be_cut_is_one_line(network: nn.Module, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chain_of(network, SHAPE)
    assert_one_line(caught.value, says, type(network).__name__, "method.name=fedavg")
