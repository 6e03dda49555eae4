"""The selector interface: a plain object that chooses devices, is told what they did, and can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fedfreeze.config import Config
from fedfreeze.reports import DeviceReport


class Selector(ABC):
    """Chooses the devices of a round among those whose cap holds the stage."""

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """Return `count` of the candidates (all of them where there are fewer), in any order."""

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Learn from a round; a selector without memory ignores it."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict; a selector without memory has nothing to load."""
        return
