"""Architectures: a registry of names to builders; each builder returns ordered children and where blocks begin."""

from collections.abc import Callable

from torch import nn

from fedfreeze.config import ModelConfig
from fedfreeze.models.resnet import resnet

# (config, num_classes, in_channels) -> the network as ordered named children, and the children at which blocks begin
Builder = Callable[[ModelConfig, int, int], tuple[nn.Sequential, list[str]]]

MODELS: dict[str, Builder] = {
    "resnet8": resnet([1, 1, 1]),
    "resnet10": resnet([1, 1, 1, 1]),
    "resnet18": resnet([2, 2, 2, 2]),
    "resnet34": resnet([3, 4, 6, 3]),
}
