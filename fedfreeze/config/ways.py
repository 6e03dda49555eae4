"""Ways to take a training step (`train.fit`): with activations stored or computed anew, in one pass or in several."""

import re
from dataclasses import dataclass
from math import ceil

AUTO = ("whole", "recompute")
"""What `auto` stands for: ways that give the same bits, the fastest first."""

_MICRO = re.compile(r"micro\(([1-9][0-9]{0,5})\)")


@dataclass(frozen=True)
class Way:
    """How a device takes its steps."""

    name: str
    recomputes: bool = False
    """Whether it computes the activations of what trains a second time in the backward pass, and stores few."""
    passes: int = 1
    """In how many passes it takes a batch, whose gradients add up: `micro(k)`."""

    def sizes(self, samples: int, batch_size: int) -> list[int]:
        """Return the samples of each pass over a batch; a smaller batch than `batch_size` has fewer passes."""
        count = ceil(samples / ceil(batch_size / self.passes))
        return [(samples + place) // count for place in range(count)]


WHOLE = Way("whole")


def way_of(name: str) -> Way:
    """Return a way by its name. Raises ValueError."""
    if name == "whole":
        return WHOLE
    if name == "recompute":
        return Way(name, recomputes=True)
    found = _MICRO.fullmatch(name)
    if found is None:
        raise ValueError(name)
    return Way(name, passes=int(found[1]))


def ways_of(fit: str) -> tuple[Way, ...]:
    """Return what `train.fit` lists, in its order. Raises ValueError for a word that names no way, or comes again."""
    names = [each for part in fit.split(",") for each in (AUTO if part.strip() == "auto" else (part.strip(),))]
    if len(set(names)) < len(names):
        raise ValueError(next(name for name in names if names.count(name) > 1))
    return tuple(way_of(name) for name in names)
