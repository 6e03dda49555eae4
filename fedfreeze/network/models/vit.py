"""A small Vision Transformer (Dosovitskiy et al., 2021; mean pooling after Beyer et al., 2022), as ordered children."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.schema import ModelConfig

HEAD_DIMENSION = 32
PATCHES_A_SIDE = 8


class PatchEmbedding(nn.Module):
    """Cuts images into square patches, 8 along the shorter side, and maps each to a token with a learnt position."""

    def __init__(self, image_shape: tuple[int, int, int], dimension: int):
        super().__init__()
        channels, height, width = image_shape
        patch = -(-min(height, width) // PATCHES_A_SIDE)
        self.padding = (0, -width % patch, 0, -height % patch)  # right and bottom, up to whole patches
        tokens = -(-height // patch) * -(-width // patch)
        self.projection = nn.Conv2d(channels, dimension, patch, patch)
        self.position = nn.Parameter(torch.randn(1, tokens, dimension) * 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, tokens, dimension)."""
        patches = self.projection(functional.pad(images, self.padding))
        return patches.flatten(2).transpose(1, 2) + self.position


class EncoderLayer(nn.Module):
    """Pre-norm Transformer encoder layer: self-attention, then a perceptron of four times the dimension."""

    def __init__(self, dimension: int):
        super().__init__()
        self.heads = next(n for n in range(max(1, dimension // HEAD_DIMENSION), 0, -1) if dimension % n == 0)
        self.norm1 = nn.LayerNorm(dimension)
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.projection = nn.Linear(dimension, dimension)
        self.norm2 = nn.LayerNorm(dimension)
        self.expand = nn.Linear(dimension, 4 * dimension)
        self.contract = nn.Linear(4 * dimension, dimension)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, dimension) to the same shape."""
        batch, tokens, dimension = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dimension // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, dimension))
        hidden = self.expand(self.norm2(x))
        hidden = functional.gelu(hidden)
        return x + self.contract(hidden)


class TokenMean(nn.Module):
    """Averages over the tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, dimension) to (batch, dimension)."""
        return x.mean(1)


def vit(
    layers: int, layers_a_block: int
) -> Callable[[ModelConfig, int, tuple[int, int, int]], tuple[nn.Sequential, list[str]]]:
    """Return a builder of a Vision Transformer; blocks are groups of encoder layers, the first with the embedding."""

    def build(
        config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[nn.Sequential, list[str]]:
        children: OrderedDict[str, nn.Module] = OrderedDict(embed=PatchEmbedding(image_shape, config.width))
        for i in range(layers):
            children[f"layer{i + 1}"] = EncoderLayer(config.width)
        children["norm"] = nn.LayerNorm(config.width)
        children["pool"] = TokenMean()
        children["fc"] = nn.Linear(config.width, num_classes)
        later = [f"layer{i + 1}" for i in range(layers_a_block, layers, layers_a_block)]
        return nn.Sequential(children), ["embed", *later]

    return build
