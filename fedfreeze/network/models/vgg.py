"""VGGs with normalisation (Simonyan and Zisserman, 2015), as ordered named children."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from fedfreeze.config.schema import ModelConfig
from fedfreeze.network.models.resnet import conv3x3, norm_layer


def vgg(depths: list[int]) -> Callable[[ModelConfig, int, tuple[int, int, int]], tuple[nn.Sequential, list[str]]]:
    """Return a builder of a VGG with `depths[i]` convolutions before its pooling i + 1.

    Channels are 1, 2, 4, 8 and 8 times the width. One linear layer classifies, as is usual for small images, instead of
    three of 4096. Pooling rounds up, so that images of less than 32 pixels reach the end. The blocks are the pooling
    groups. [ours, after the first author's NeuLite code]
    """

    def build(
        config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]
    ) -> tuple[nn.Sequential, list[str]]:
        groups: OrderedDict[str, nn.Module] = OrderedDict()
        channels = image_shape[0]
        for i, depth in enumerate(depths):
            out_channels = config.width * min(2**i, 8)
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(depth):
                group[f"conv{j + 1}"] = conv3x3(channels, out_channels)
                group[f"norm{j + 1}"] = norm_layer(config.norm, out_channels)
                group[f"relu{j + 1}"] = nn.ReLU(inplace=True)
                channels = out_channels
            group["pool"] = nn.MaxPool2d(2, ceil_mode=True)
            groups[f"group{i + 1}"] = nn.Sequential(group)
        groups["pool"] = nn.AdaptiveAvgPool2d(1)
        groups["flatten"] = nn.Flatten()
        groups["fc"] = nn.Linear(channels, num_classes)
        return nn.Sequential(groups), [f"group{i + 1}" for i in range(len(depths))]

    return build
