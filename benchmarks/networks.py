"""Networks of a user's own for the benchmarks."""

from torch import nn


def small_cnn(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Two 5x5 convolutions with pooling and two linear layers, the network of many a first federated experiment."""
    height, width = (size // 4 for size in image_size)
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * height * width, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
