"""What leads past missing blocks to the head without weights of its own: every second pixel, and zeros for channels."""

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.errors import ConfigError
from fedfreeze.network.probing import Shape


class Skip(nn.Module):
    """Gives what a block puts out the shape that the head takes. [FeDepth, He et al., 2016: option A]

    Pixels are taken with a stride, channels that are too few get zeros on both sides. [ours: where no stride leads to
    the size, pixels at even distances; channels that are too many are left out at the end; tokens likewise]
    """

    def __init__(self, before: Shape, after: Shape):
        """`before`, `after`: shapes for one image. Raises ConfigError for shapes that nothing leads between."""
        super().__init__()
        if len(before) < len(after):
            raise ConfigError(
                f"model.split: no skip connection leads from a block that puts out {_sizes(before)} to a head that "
                f"takes {_sizes(after)}; begin no block there"
            )
        self.before = before
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, *before) to (batch, *after)."""
        if len(self.after) == 1:
            if len(self.before) == 3:
                x = x.mean((2, 3))
            elif len(self.before) == 2:
                x = x.mean(1)
            return _with_channels(x, 1, self.after[0])
        if len(self.after) == 2:
            if len(self.before) == 3:
                x = x.flatten(2).transpose(1, 2)
            return _with_channels(_spaced(x, 1, self.after[0]), 2, self.after[1])
        for dimension in (2, 3):
            x = _spaced(x, dimension, self.after[dimension - 1])
        return _with_channels(x, 1, self.after[0])

    def extra_repr(self) -> str:
        """See torch.nn.Module."""
        return f"{_sizes(self.before)} to {_sizes(self.after)}"


def skip_behind(shape: Shape, last: Shape) -> nn.Sequential:
    """Return what stands between a block that puts out a shape and the head: nothing where the shape is the last's.

    Raises ConfigError for shapes that nothing leads between.
    """
    return nn.Sequential() if shape == last else nn.Sequential(Skip(shape, last))


def _spaced(x: torch.Tensor, dimension: int, wanted: int) -> torch.Tensor:
    """Return so many of the pixels along a dimension, or tokens, at even distances."""
    size = x.shape[dimension]
    if size == wanted:
        return x
    stride = max(1, round(size / wanted))
    if (size - 1) // stride + 1 == wanted:
        chosen = [slice(None)] * x.dim()
        chosen[dimension] = slice(None, None, stride)
        return x[tuple(chosen)]
    return x.index_select(dimension, torch.arange(wanted, device=x.device) * size // wanted)


def _with_channels(x: torch.Tensor, dimension: int, wanted: int) -> torch.Tensor:
    """Return so many channels: zeros on both sides of those that are there, or the first of them."""
    missing = wanted - x.shape[dimension]
    if missing <= 0:
        return x.narrow(dimension, 0, wanted)
    behind = [0, 0] * (x.dim() - 1 - dimension)  # of the dimensions after it
    return functional.pad(x, [*behind, missing // 2, missing - missing // 2])


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape))
