"""The selector interface: a plain object that chooses devices, is told what they did, and can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.messages import DeviceReport


@dataclass(frozen=True)
class Situation:
    """What the server knows of all devices before a round; arrays are indexed by device."""

    round: int
    """Round of the run, from 1."""
    stage: int
    stage_round: int
    """Round of the stage, from 1."""
    samples: np.ndarray
    """Training samples of each device."""
    seconds: np.ndarray
    """Emulated seconds that a round of this stage takes each device: download, training, upload."""


@dataclass(frozen=True)
class Probes:
    """What devices tell of themselves at the global model, before the round; rows are in the order of `devices`.

    It costs emulated time and bytes: each sends a signature up after one forward pass over its data.
    """

    devices: np.ndarray
    """Device numbers, ascending: those asked that answered."""
    loss: np.ndarray
    """Mean loss over all of a device's samples."""
    squared_loss: np.ndarray
    """Mean of the squared loss of a sample."""
    signatures: np.ndarray
    """(devices, numbers): the gradient of the last layer, averaged over the device's samples; float32. Without columns
    where the selector asks for losses alone (`signature_size` 0)."""


@dataclass(frozen=True)
class ProbeRequest:
    """What a selector wants to know before it chooses."""

    devices: list[int] = field(default_factory=list)
    signature_size: int = 0
    """Numbers of each signature at most; a larger gradient is sketched. 0: losses alone."""


class Selector(ABC):
    """Chooses the devices of a round among those whose cap holds the stage.

    Before each round the coordinator calls `prepare`, then, where the class says `probing`, `wanted` and `learn`, then
    `select`; after it `observe`. Everything it draws comes from generators keyed by (seed, purpose, round).
    """

    probing = False
    """Whether it may ask devices for losses and signatures before a round."""

    def __init__(self, config: Config):
        self.config = config
        self.situation: Situation

    def prepare(self, situation: Situation) -> None:
        """Take what the server knows before a round."""
        self.situation = situation

    def wanted(self, candidates: Sequence[int], count: int) -> ProbeRequest | None:
        """Return which of the candidates to ask, and for what; None: nothing is asked in this round."""
        return None

    def learn(self, probes: Probes) -> None:
        """Take the answers; devices that failed are not in them."""
        return

    @abstractmethod
    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """Return `count` of the candidates (all of them where there are fewer), in any order."""

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Learn from a round; a selector without memory ignores it."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict; a selector without memory has nothing to load."""
        return
