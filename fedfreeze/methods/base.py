"""The method interface: what a device trains, how updates merge, what is deployed."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from fedfreeze.aggregate import UpdateSum, device_weight
from fedfreeze.blocks import BlockedNetwork
from fedfreeze.config import Config
from fedfreeze.stage import Stage


class Method(ABC):
    """A federated method. The round knows nothing of it but the answers to three questions.

    1. What does a device train? `enter_stage`: a Stage (its cost follows from it, see cost.py), and `part_index`: which
       of the stage's elements a device of a given cap trains.
    2. How do updates merge? `empty_sum`, `merge`.
    3. What is deployed? `deployed`.
    """

    paced = True
    """Whether the pace controller ends its stages; a method without freezing trains for all of `train.rounds`."""
    num_stages: int
    stage_names: tuple[str, ...]

    def __init__(self, config: Config, blocked: BlockedNetwork):
        self.config = config
        self.blocked = blocked

    @abstractmethod
    def begin_stage(self, index: int) -> None:
        """Prepare a stage that begins (not one that is resumed): re-initialise what does not carry over."""

    @abstractmethod
    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """Return the stage's network on `device`, its trainable part as views of one flat buffer."""

    def leave_stage(self, stage: Stage) -> None:
        """Freeze what the stage trained: its values stay in the network, on the host, in storage of their own."""
        stage.leave()

    def part_index(self, stage: Stage, cap_bytes: int | None) -> torch.Tensor | None:
        """Return the positions, in the flat buffer, that a device of this cap trains; None: all of them."""
        return None

    counted = False
    """Whether devices train different parts, so that each element needs the weight it received."""

    def empty_sum(self, stage: Stage, bits: int) -> UpdateSum:
        """Return the sum to which this rank's devices add."""
        exact = self.config.method.sum == "exact"
        return UpdateSum(len(stage.flat), bits, exact=exact, counted=self.counted)

    def weight(self, samples: int) -> int:
        """Return a device's weight in the average."""
        return device_weight(self.config.method.weights, samples)

    def merge(self, values: torch.Tensor, update_sum: UpdateSum, weight_sum: int) -> torch.Tensor:
        """Return the next global values of the stage's flat buffer. [paper: FedAvg over what is trained]"""
        return values + update_sum.mean(weight_sum)

    @abstractmethod
    def deployed(self, stage: int) -> nn.Module:
        """Return the network that is deployed when training ended in `stage`."""

    @abstractmethod
    def state_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint must hold, by name."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the method's state, by name."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self.state_modules().items()
            for name, tensor in module.state_dict().items()
        }
