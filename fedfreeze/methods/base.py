"""The method interface: what a device trains, how updates merge, what is deployed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fedfreeze.config.schema import Config, ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.methods.aggregate import UpdateSum, device_weight
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.flat import named_once
from fedfreeze.network.stage import Stage

# For a network of this configuration: the memory in bytes, at the configured batch, of each level of the only stage.
LevelMemory = Callable[[ModelConfig], list[int]]


def check_split(config: Config, blocked: BlockedNetwork) -> None:
    """Raise ConfigError for a network of the user's own that cannot be cut, or whose blocks are not given."""
    blocked.check_cut()
    if config.model.factory is not None and config.model.split is None:
        raise ConfigError(
            "model.split is needed with model.factory, to know the blocks; they can begin at: "
            f"{', '.join(blocked.places)} (`fedfreeze plan CONFIG --cut` proposes a split)"
        )


class Method(ABC):
    """A federated method. The round knows nothing of it but the answers to three questions.

    1. What does a device train? `enter_stage`: the Stage with the global values; where devices train different parts of
       it (`counted`), `num_levels` sub-models (`enter_level`), of which each device trains the largest that its cap
       holds, and `part_index`, which of the stage's elements that is. Costs follow by running them (cost.py).
    2. How do updates merge? `empty_sum`, `merge`.
    3. What is deployed? `deployed`.
    """

    paced = True
    """Whether the pace controller ends its stages; without it each stage gets an equal share of `train.rounds`."""
    counted = False
    """Whether devices train sub-models, parts of a stage, so that each element needs the weight that it received."""
    num_stages: int
    stage_names: tuple[str, ...]

    def __init__(self, config: Config, blocked: BlockedNetwork):
        self.config = config
        self.blocked = blocked
        self.fitted: dict[str, Any] = {}
        """What `fit` found for the fleet; set after construction."""

    @classmethod
    def fit(cls, config: Config, caps: Sequence[int | None], level_memory: LevelMemory) -> dict[str, Any]:
        """Return, as plain values, what the method makes of the fleet's caps (bytes) before anything is built.

        Raises ConfigError where it cannot train under them.
        """
        return {}

    @classmethod
    def network(cls, model: ModelConfig, fitted: dict[str, Any]) -> ModelConfig:
        """Return the configuration of the network that the method trains, given what `fit` found."""
        return model

    def notices(self) -> list[str]:
        """Return what whoever runs it should know before it trains, a line each."""
        return []

    @abstractmethod
    def begin_stage(self, index: int) -> None:
        """Prepare a stage that begins (not one that is resumed): re-initialise what does not carry over."""

    @abstractmethod
    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """Return the stage's network on `device`, its trainable part as views of one flat buffer."""

    def num_levels(self, index: int) -> int:
        """Return how many sub-models a stage has; only a method that is `counted` has any but the stage itself."""
        return 1

    def level_name(self, index: int, level: int) -> str:
        """Return what tables call a sub-model."""
        return self.stage_names[index]

    def enter_level(self, index: int, level: int, device: torch.device) -> Stage:
        """Return a sub-model of a stage with several, on `device`, with tensors of its own; 0 is the smallest."""
        raise NotImplementedError(f"{type(self).__name__} is counted, so it needs enter_level")

    def part_index(self, stage: Stage, part: Stage, round_number: int, labels: torch.Tensor) -> torch.Tensor:
        """Return the positions, in the stage's flat buffer, of the elements of a sub-model's flat buffer.

        -1 stands for an element that is the device's alone in this round: it starts from its value in the sub-model as
        built and is not sent. `labels`: those that the device has, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} is counted, so it needs part_index")

    def leave_stage(self, stage: Stage) -> None:
        """Freeze what the stage trained: its values stay in the network, on the host, in storage of their own."""
        stage.leave()

    def empty_sum(self, stage: Stage, bits: int) -> UpdateSum:
        """Return the sum to which this rank's devices add."""
        exact = self.config.method.sum == "exact"
        return UpdateSum(
            len(stage.flat), bits, exact=exact, counted=self.counted, statistics_from=stage.flat.parameters
        )

    def weight(self, samples: int) -> int:
        """Return a device's weight in the average."""
        return device_weight(self.config.method.weights, samples)

    def merge(self, values: torch.Tensor, update_sum: UpdateSum, weight_sum: int) -> torch.Tensor:
        """Return the next global values of the stage's flat buffer. [paper: FedAvg over what is trained]"""
        return values + update_sum.mean(weight_sum)

    statistics_samples = 0
    """Training samples that `take_statistics` wants."""

    def take_statistics(self, stage: Stage, batches: Iterable[torch.Tensor]) -> None:
        """Set what the network needs to be judged and no device sends, from normalised training images.

        The server does it before each evaluation, on every rank alike.
        """
        return

    @abstractmethod
    def deployed(self, stage: int) -> nn.Module:
        """Return the network that is deployed when training ended in `stage`."""

    @abstractmethod
    def state_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint must hold, by name."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the method's state, by name; one that has several names by its first."""
        found: dict[str, torch.Tensor] = {}
        for prefix, module in self.state_modules().items():
            found |= {f"{prefix}.{name}": tensor for name, tensor in named_once(module).items()}
        return found
