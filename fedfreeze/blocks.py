"""The network cut into consecutive blocks, and the output modules that imitate the missing ones."""

import itertools
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from fedfreeze.config import MethodConfig, ModelConfig
from fedfreeze.models import MODELS
from fedfreeze.models.resnet import BasicBlock, conv3x3, norm_layer
from fedfreeze.seeds import global_seed

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class BlockedNetwork:
    """A network and its cut: `blocks` and `head` share the modules of `network`; applied in order they are it."""

    network: nn.Sequential
    blocks: tuple[nn.Sequential, ...]
    head: nn.Sequential
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """What each block puts out for one image."""
    num_classes: int


def build_network(config: ModelConfig, image_shape: Shape, num_classes: int, seed: int) -> BlockedNetwork:
    """Build and cut the configured network; its initial weights follow from the seed alone."""
    with global_seed(seed, "network"):
        network, split = MODELS[config.name](config, num_classes, image_shape[0])
    return cut_network(network, split, image_shape, num_classes)


def cut_network(network: nn.Sequential, split: list[str], image_shape: Shape, num_classes: int) -> BlockedNetwork:
    """Cut an ordered network at the children named in `split`; the trailing pooling and classifier are the head."""
    children = list(network.named_children())
    head_start = _head_start(children)
    starts = [i for i, (name, _) in enumerate(children) if name in split] + [head_start]
    blocks, names = [], []
    for begin, end in itertools.pairwise(starts):
        blocks.append(nn.Sequential(OrderedDict(children[begin:end])))
        named = [name for name, child in children[begin:end] if any(True for _ in child.parameters())]
        names.append(named[0] if len(named) == 1 else f"{named[0]}..{named[-1]}")
    shapes = []
    network.eval()  # a probe must not move running statistics
    with torch.no_grad():
        x = torch.zeros(1, *image_shape)
        for block in blocks:
            x = block(x)
            shapes.append((x.shape[1], x.shape[2], x.shape[3]))
    network.train()
    return BlockedNetwork(
        network,
        tuple(blocks),
        nn.Sequential(OrderedDict(children[head_start:])),
        tuple(names),
        tuple(shapes),
        num_classes,
    )


def _head_start(children: list[tuple[str, nn.Module]]) -> int:
    """The head is the last Linear and what stands directly before it without parameters and not as an activation."""
    start = max(i for i, (_, child) in enumerate(children) if isinstance(child, nn.Linear))
    while start > 0 and isinstance(children[start - 1][1], (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)):
        start -= 1
    return start


class OutputModules(nn.Module):
    """What stands in for the blocks that are not there yet, for every stage. [paper: convolutions; kinds are ours]

    The surrogate of a missing block has its stride and channel change. The kinds: `conv` one bare 3x3 convolution,
    `conv_norm` with normalisation and activation, `block` a whole residual block, `pool` nothing (pooling and a linear
    layer, what the paper argues against). The last stage's output module is the network's own head.
    """

    def __init__(self, blocked: BlockedNetwork, method: MethodConfig, norm: str, seed: int):
        super().__init__()
        self.carry = method.carry
        self.seed = seed
        self.last_stage = len(blocked.blocks) - 1
        self.head = blocked.head
        self.surrogates = nn.ModuleList()
        self.pool_heads = nn.ModuleList()
        with global_seed(seed, "output modules"):
            if method.output_module == "pool":
                for shape in blocked.shapes[:-1]:
                    linear = nn.Linear(shape[0], blocked.num_classes)
                    self.pool_heads.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))
            else:
                for before, after in zip(blocked.shapes[:-1], blocked.shapes[1:], strict=True):
                    self.surrogates.append(_surrogate(method.output_module, before, after, norm))

    def for_stage(self, stage: int) -> nn.Sequential:
        """Return the output module of a stage: surrogates of the later blocks, then pooling and classifier."""
        if stage == self.last_stage:
            return nn.Sequential(self.head)
        if len(self.pool_heads):
            return nn.Sequential(self.pool_heads[stage])
        return nn.Sequential(*self.surrogates[stage:], self.head)

    def begin_stage(self, stage: int) -> None:
        """Start the stage's output module anew unless parts are carried over from the stage before."""
        if stage == 0 or self.carry:
            return
        with global_seed(self.seed, "output modules", stage):
            for module in self.for_stage(stage).modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()


def _surrogate(kind: str, before: Shape, after: Shape, norm: str) -> nn.Module:
    stride = (max(1, round(before[1] / after[1])), max(1, round(before[2] / after[2])))
    if kind == "block":
        return BasicBlock(before[0], after[0], stride, norm)
    convolution = conv3x3(before[0], after[0], stride)
    if kind == "conv":
        return convolution
    return nn.Sequential(convolution, norm_layer(norm, after[0]), nn.ReLU(inplace=True))
