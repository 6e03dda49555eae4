"""Networks of users' own, recomputed at each level: the bits of stored activations, whatever they are made of."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import way_of
from fedfreeze.network.recompute import recomputed, segments_of, stored_from
from fedfreeze.network.stage import LocalTrainer, Stage


class ThreeBranches(nn.Module):
    """What comes in is used three times, and joined in two ways."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.middle = nn.Conv2d(channels, channels, 1)
        self.right = nn.Conv2d(2 * channels, channels, 1, groups=2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.left(x)
        both = torch.cat([left, x], 1)
        return self.relu(self.right(both) + self.middle(x) * left.sigmoid() + x)


class PreActivation(nn.Module):
    """A residual block that normalises first, and writes into what comes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(x, inplace=True)
        out = self.conv1(functional.relu(self.norm1(x)))
        out = functional.dropout(self.norm2(out), 0.3, self.training).relu_()
        return self.conv2(out) + x


class Gate(nn.Module):
    """Squeeze and excitation, with a number that depends on the size of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(x.size(0), -1, 1, 1) / x.size(0)


class Attention(nn.Module):
    """A Transformer's layer of torch's own parts, with dropout."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dimension, 2, dropout=0.2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dimension), nn.LayerNorm(dimension)
        self.mlp = nn.Sequential(nn.Linear(dimension, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, dimension))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), self.norm1(x), self.norm1(x), need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Branching(nn.Module):
    """Asks for a value, which cannot be followed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(features, features), nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.hardswish(x, inplace=True)
        return self.one(x) if x.sum().item() > 0 else self.other(x) + x


class Scaled(nn.Module):
    """A parameter of its own in a function, twice, and a layer used twice."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features) / features)
        self.linear = nn.Linear(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(self.linear(x), self.weight).tanh()
        return self.linear(functional.linear(hidden, self.weight)) + x


class ToTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


NETWORKS = {
    "branches": lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), ThreeBranches(8), ThreeBranches(8)],
    "pre-activation": lambda: [nn.Conv2d(3, 8, 3, padding=1), PreActivation(8), PreActivation(8), nn.Dropout2d(0.2)],
    "begins in place": lambda: [PreActivation(3), nn.MaxPool2d(2), PreActivation(3)],
    "gates": lambda: [nn.Conv2d(3, 8, 3, padding=1), Gate(8), nn.BatchNorm2d(8), nn.ReLU(), ThreeBranches(8), Gate(8)],
    "attention": lambda: [nn.Conv2d(3, 16, 4, 4), ToTokens(), Attention(16), Attention(16), nn.LayerNorm(16)],
    "branches on values": lambda: [nn.Flatten(), nn.Linear(192, 12), Branching(12), nn.Linear(12, 12), Branching(12)],
    "shared weights": lambda: [nn.Flatten(), nn.Linear(192, 12), Scaled(12), nn.ReLU(inplace=True), Scaled(12)],
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_are_those_of_stored_activations(name: str, laid: torch.memory_format, within: bool) -> None:
    torch.manual_seed(0)
    stored = nn.Sequential(*NETWORKS[name](), nn.Flatten(), nn.LazyLinear(5))
    stored(torch.randn(2, 3, 8, 8))
    if any(parameter.dim() == 4 for parameter in stored.parameters()):
        stored = stored.to(memory_format=laid)
    again = copy.deepcopy(stored)
    segments = segments_of([again], within=within)
    for step in range(2):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).contiguous(memory_format=laid)
        found = []
        for forward in (stored, lambda images: recomputed(segments, images, stored_from=stored_from(segments))):
            torch.manual_seed(step)
            images = x.clone(memory_format=torch.preserve_format).requires_grad_(step == 1)
            out = forward(images * 1.0 if step == 1 else images)
            out.square().sum().backward()
            found.append((out.detach(), images.grad, torch.rand(1)))
        for one, other in zip(*found, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    for (key, one), other in zip(stored.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        assert one.grad is None or torch.equal(one.grad, other.grad), key
    for (key, one), other in zip(stored.state_dict().items(), again.state_dict().values(), strict=True):
        if "num_batches_tracked" not in key:  # which each device puts back
            assert torch.equal(one, other), key


@pytest.mark.parametrize("level", ["recompute", "recompute2", "recompute3"])
def test_frozen_blocks_that_draw_and_write_into_the_images_run_twice_alike(level: str) -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(0.5) + torch.rand_like(x)

    after = []
    for way in ("whole", level):
        torch.manual_seed(0)
        frozen = nn.Sequential(Noise(), PreActivation(3))
        active = nn.Sequential(PreActivation(3), nn.Conv2d(3, 4, 3, padding=1), ThreeBranches(4))
        stage = Stage(1, [frozen], active, nn.Sequential(nn.Flatten(), nn.Linear(256, 4)), torch.device("cpu"))
        trainer = LocalTrainer(stage, TrainConfig(prefix_chunk=3))
        trainer.go(way_of(way))
        for step in range(2):
            torch.manual_seed(step)
            trainer.step(torch.randn(7, 3, 8, 8), torch.arange(7) % 4)
        after.append(stage.flat.values().clone())
    assert torch.equal(*after)
