"""Networks as people write them, for the tests of where they can be cut."""

import torch
from torch import nn
from torch.nn import functional


class Functional(nn.Module):
    """Modules with tensor operations in between, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv1(x))
        x = self.layer(x)
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


class Shortcut(nn.Module):
    """Two modules under a shortcut, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.inner1 = nn.Conv2d(4, 4, 3, padding=1)
        self.inner2 = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1) * 2)
        self.last = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, mask: None = None) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.inner2(self.inner1(x)) * self.scale
        return self.fc(self.last(x).mean((2, 3)))


class Reused(nn.Module):
    """A module that runs at two places: no cut can lie between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.c(self.a(self.b(self.a(x)))).mean((2, 3)))
