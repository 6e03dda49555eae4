"""Output modules: what stands in for the blocks that are not there yet."""

import torch
from torch import nn

from fedfreeze.config.schema import MethodConfig
from fedfreeze.errors import ConfigError
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.memory import lay_channels_last, lay_contiguous, spoils
from fedfreeze.network.models.resnet import BasicBlock, conv3x3, norm_layer
from fedfreeze.network.models.vit import EncoderLayer, TokenMean
from fedfreeze.network.probing import Shape
from fedfreeze.seeds import global_seed


class OutputModules(nn.Module):
    """What stands in for the missing blocks, for every stage. [paper: convolutions; kinds are ours]

    The surrogate of a missing block of convolutions has its stride and channel change. The kinds: `conv` one bare 3x3
    convolution, `conv_norm` with normalisation and activation, `block` a whole residual block, `pool` nothing (pooling
    and a linear layer, what the paper argues against). Of a block of Transformer layers [ours]: `conv` one linear layer
    on each token, `conv_norm` with layer norm, GELU and a shortcut, `block` a whole encoder layer. The last stage's
    output module is the network's own head.
    """

    def __init__(
        self, blocked: BlockedNetwork, method: MethodConfig, norm: str, seed: int, memory_format: str = "auto"
    ):
        super().__init__()
        self.carry = method.carry
        self.seed = seed
        self.last_block = len(blocked.blocks) - 1
        self.head = blocked.head
        self.surrogates = nn.ModuleList()
        self.pool_heads = nn.ModuleList()
        with global_seed(seed, "output modules"):
            if method.output_module == "pool":
                for shape in blocked.shapes[:-1]:
                    self.pool_heads.append(_pool_head(shape, blocked.num_classes))
            else:
                for before, after in zip(blocked.shapes[:-1], blocked.shapes[1:], strict=True):
                    self.surrogates.append(_surrogate(method.output_module, before, after, norm))
        if blocked.channels_last and spoils(self.surrogates):
            if memory_format == "channels_last":
                raise ConfigError(
                    "model.memory_format: with channels_last torch spoils its own memory in output modules of kind "
                    f"{method.output_module}, which have a 1x1 convolution with a stride over few channels; use auto, "
                    "or a larger model.width"
                )
            lay_contiguous(blocked.network)  # what comes out of it would lie channels last, too
        elif blocked.channels_last:
            lay_channels_last(self.surrogates)

    def behind(self, block: int) -> nn.Sequential:
        """Return the output module behind a block: surrogates of the later blocks, then pooling and classifier."""
        if block == self.last_block:
            return nn.Sequential(self.head)
        if len(self.pool_heads):
            return nn.Sequential(self.pool_heads[block])
        return nn.Sequential(*self.surrogates[block:], self.head)

    def begin_behind(self, block: int) -> None:
        """Start the output module behind a block that enters anew, unless parts are carried over from before."""
        if self.carry:
            return
        with global_seed(self.seed, "output modules", block):
            for module in self.behind(block).modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()


def _pool_head(shape: Shape, num_classes: int) -> nn.Sequential:
    """Pooling and a linear layer."""
    if len(shape) == 3:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], num_classes))
    if len(shape) == 2:
        return nn.Sequential(TokenMean(), nn.Linear(shape[1], num_classes))
    return nn.Sequential(nn.Linear(shape[0], num_classes))


def _surrogate(kind: str, before: Shape, after: Shape, norm: str) -> nn.Module:
    """Return what imitates a missing block that maps one shape to another. Raises ConfigError."""
    if len(before) == len(after) == 3:
        return _convolutions(kind, before, after, norm)
    if len(before) == len(after) == 2:
        return _on_tokens(kind, before, after)
    if len(after) == 1:
        return _features(kind, before, after)
    if len(before) == 3 and len(after) == 2:
        return nn.Sequential(*_to_tokens(before, after))
    raise ConfigError(
        f"model.split: no output module imitates a block that maps {before} to {after}; begin the block elsewhere, "
        "or use method.output_module=pool"
    )


def _convolutions(kind: str, before: Shape, after: Shape, norm: str) -> nn.Module:
    stride = (max(1, round(before[1] / after[1])), max(1, round(before[2] / after[2])))
    reached = tuple((size - 1) // step + 1 for size, step in zip(before[1:], stride, strict=True))
    if kind == "block":
        modules: list[nn.Module] = [BasicBlock(before[0], after[0], stride, norm)]
    else:
        modules = [conv3x3(before[0], after[0], stride)]
        if kind == "conv_norm":
            modules += [norm_layer(norm, after[0]), nn.ReLU(inplace=True)]
    if reached != after[1:]:  # a size that no stride gives
        modules.insert(0 if kind == "block" else 1, nn.AdaptiveAvgPool2d(after[1:]))
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


class TokenSurrogate(nn.Module):
    """Layer norm, one linear layer on each token and GELU, with a shortcut where the dimension stays. [ours]"""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, in_features) to (batch, tokens, out_features)."""
        hidden = self.linear(self.norm(x))
        hidden = nn.functional.gelu(hidden)
        return x + hidden if x.shape == hidden.shape else hidden


class TokenPool(nn.Module):
    """Averages neighbouring tokens to a given number of them."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, any number of tokens, features) to (batch, tokens, features)."""
        return nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), self.tokens).transpose(1, 2)


class ToTokens(nn.Module):
    """Turns pixels into tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, height x width, channels)."""
        return x.flatten(2).transpose(1, 2)


def _on_tokens(kind: str, before: Shape, after: Shape) -> nn.Module:
    if kind == "conv":
        modules: list[nn.Module] = [nn.Linear(before[1], after[1])]
    elif kind == "block" and before[1] == after[1]:
        modules = [EncoderLayer(before[1])]
    else:
        modules = [TokenSurrogate(before[1], after[1])]
    if before[0] != after[0]:
        modules.insert(0, TokenPool(after[0]))
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _to_tokens(before: Shape, after: Shape) -> list[nn.Module]:
    """One linear layer on each pixel, and as many tokens as the block makes of them."""
    modules: list[nn.Module] = [ToTokens(), nn.Linear(before[0], after[1])]
    if before[1] * before[2] != after[0]:
        modules.insert(1, TokenPool(after[0]))
    return modules


def _features(kind: str, before: Shape, after: Shape) -> nn.Module:
    """One linear layer, after pooling where there is something to pool."""
    pooling: list[nn.Module] = []
    if len(before) == 3:
        pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif len(before) == 2:
        pooling = [TokenMean()]
    features = before[1] if len(before) == 2 else before[0]
    activation: list[nn.Module] = [] if kind == "conv" else [nn.ReLU(inplace=True)]
    return nn.Sequential(*pooling, nn.Linear(features, after[0]), *activation)
