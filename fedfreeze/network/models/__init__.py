"""Architectures: a registry of names to builders; each builder returns ordered children and where blocks begin."""

from collections.abc import Callable

from torch import nn

from fedfreeze.config.schema import ModelConfig
from fedfreeze.network.models.resnet import resnet
from fedfreeze.network.models.vgg import vgg
from fedfreeze.network.models.vit import vit

# (config, num_classes, image_shape) -> the network as ordered named children, and where its usual blocks begin
Builder = Callable[[ModelConfig, int, tuple[int, int, int]], tuple[nn.Sequential, list[str]]]

MODELS: dict[str, Builder] = {
    "resnet8": resnet([1, 1, 1]),
    "resnet10": resnet([1, 1, 1, 1]),
    "resnet18": resnet([2, 2, 2, 2]),
    "resnet34": resnet([3, 4, 6, 3]),
    "vgg11": vgg([1, 1, 2, 2, 2]),
    "vgg16": vgg([2, 2, 3, 3, 3]),
    "vit": vit(layers=8, layers_a_block=2),
}
