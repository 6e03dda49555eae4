"""ResNets with a CIFAR stem (He et al., 2016), as ordered named children."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from fedfreeze.config.schema import ModelConfig


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Return batch norm, or group norm with at most 8 groups that divide the channels."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = next(count for count in (8, 4, 2, 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def conv3x3(in_channels: int, out_channels: int, stride: int | tuple[int, int] = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int | tuple[int, int], norm: str):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = norm_layer(norm, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = norm_layer(norm, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride not in (1, (1, 1)) or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(norm, out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        # one call a line: without gradients, each input is freed as soon as its output stands
        out = self.conv1(x)
        out = self.norm1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        out += self.shortcut(x)
        return self.relu(out)


def resnet(depths: list[int]) -> Callable[[ModelConfig, int, tuple[int, int, int]], tuple[nn.Sequential, list[str]]]:
    """Return a builder of a ResNet with `depths[i]` residual blocks in its layer i + 1.

    The blocks of the paper's split are stem + layer1, layer2, layer3, ... [ours, after the first author's NeuLite code]
    """

    def build(
        config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[nn.Sequential, list[str]]:
        width = config.width
        children: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv3x3(image_shape[0], width), norm1=norm_layer(config.norm, width), relu1=nn.ReLU(inplace=True)
        )
        channels = width
        for i, depth in enumerate(depths):
            out_channels = width * 2**i
            layer = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(BasicBlock(channels, out_channels, stride, config.norm))
                channels = out_channels
            children[f"layer{i + 1}"] = nn.Sequential(*layer)
        children["pool"] = nn.AdaptiveAvgPool2d(1)
        children["flatten"] = nn.Flatten()
        children["fc"] = nn.Linear(channels, num_classes)
        return nn.Sequential(children), ["conv1"] + [f"layer{i + 1}" for i in range(1, len(depths))]

    return build
