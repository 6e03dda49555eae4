"""Activations that are computed anew in the backward pass instead of stored (Chen et al., 2016): the same bits."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedfreeze.network.chain import leaves_in_order
from fedfreeze.network.state import KeptTensors

_BatchNorm = nn.modules.batchnorm._BatchNorm


def segments_of(part: nn.Module) -> list[nn.Sequential]:
    """Return a part of a network as a chain of segments.

    A segment begins at each module with weights (a residual block, an encoder layer, a convolution with the
    normalisation and activation behind it), the finest cut that a chain allows. [ours; the paper's rule is one segment
    for each sqrt(n) of n layers]
    """
    segments: list[list[nn.Module]] = []
    for leaf in leaves_in_order([part]):
        if not segments or any(parameter.dim() > 1 for parameter in leaf.parameters()):
            segments.append([])
        segments[-1].append(leaf)
    return [nn.Sequential(*segment) for segment in segments]


def recomputed(segments: Sequence[nn.Sequential], x: torch.Tensor) -> torch.Tensor:
    """Map what goes into a chain to what comes out; only the input of each segment is stored for the backward pass."""
    for segment in segments:
        x = checkpoint(segment, x, use_reentrant=False, context_fn=partial(_contexts, segment))
    return x


def _contexts(segment: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), statistics_held(segment, _kept_buffers(segment))


def _kept_buffers(segment: nn.Module) -> KeptTensors:
    """Note the buffers of a segment but for those of the usual batch normalisation, which training does not read."""
    return KeptTensors([module for module in segment.modules() if not _is_usual(module)], ("_buffers",))


def _is_usual(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.momentum is not None


@contextmanager
def statistics_held(segment: nn.Module, before: KeptTensors | None = None) -> Iterator[None]:
    """Keep the second forward pass from moving running statistics a second time: the bits are then those of one.

    It begins with the buffers that the first pass began with, and leaves those that the first pass left.
    """
    norms = [module for module in segment.modules() if isinstance(module, _BatchNorm) and _is_usual(module)]
    momenta = [norm.momentum for norm in norms]
    after = _kept_buffers(segment)
    if before is not None:
        before.put_back()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        after.put_back()
