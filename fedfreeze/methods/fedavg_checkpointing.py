"""FedAvg with activation checkpointing (Chen et al., 2016): memory is saved by computing activations a second time."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedfreeze.config.schema import Config
from fedfreeze.methods.fedavg import FedAvg
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.stage import Stage, leaves_in_order
from fedfreeze.network.state import KeptTensors

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Checkpointed(nn.Module):
    """A chain of modules of which only the input of each segment is stored for the backward pass.

    A segment begins at each module with weights (a residual block, an encoder layer, a convolution with the
    normalisation and activation behind it), the finest cut that a chain allows. [ours; the paper's rule is one segment
    for each sqrt(n) of n layers]
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._segments = [nn.Sequential(*segment) for segment in _segments(list(leaves_in_order(blocks)))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to what the last block puts out."""
        if not torch.is_grad_enabled():
            for segment in self._segments:
                x = segment(x)
            return x
        for segment in self._segments:
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
    """Keep the second forward pass from moving running statistics a second time: the bits are then those of FedAvg.

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


def _segments(leaves: list[nn.Module]) -> list[list[nn.Module]]:
    segments: list[list[nn.Module]] = []
    for leaf in leaves:
        if not segments or any(parameter.dim() > 1 for parameter in leaf.parameters()):
            segments.append([])
        segments[-1].append(leaf)
    return segments


class FedAvgCheckpointing(FedAvg):
    """The whole model at once, with activations computed anew in the backward pass instead of stored."""

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        blocked.check_cut()

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        return Stage(0, [], Checkpointed(self.blocked.blocks), self.blocked.head, device)
