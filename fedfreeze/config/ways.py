"""Ways to take a training step (`train.fit`): with activations stored or computed anew, in one pass or in several."""

import re
from dataclasses import dataclass
from math import ceil

AUTO = ("whole", "recompute", "recompute2", "recompute3")
"""What `auto` stands for: ways that give the same bits, the fastest first."""

_LEVELS = {"recompute": 1, "recompute2": 2, "recompute3": 3}
_MICRO = re.compile(rf"(?:({'|'.join(_LEVELS)})\+)?micro\(([1-9][0-9]{{0,5}})\)")


@dataclass(frozen=True)
class Way:
    """How a device takes its steps."""

    name: str
    recompute_level: int = 0
    """What of the activations it computes anew in the backward pass: 0 nothing; 1 all but what goes into each module of
    the chain; 2 of these again all but what goes into each of their layers, once more; 3 what the frozen
    blocks put out, too."""
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
    if name in _LEVELS:
        return Way(name, _LEVELS[name])
    found = _MICRO.fullmatch(name)
    if found is None:
        raise ValueError(name)
    return Way(name, 0 if found[1] is None else _LEVELS[found[1]], int(found[2]))


def ways_of(fit: str) -> tuple[Way, ...]:
    """Return what `train.fit` lists, in its order. Raises ValueError for a word that names no way, or comes again."""
    names = [each for part in fit.split(",") for each in (AUTO if part.strip() == "auto" else (part.strip(),))]
    if len(set(names)) < len(names):
        raise ValueError(next(name for name in names if names.count(name) > 1))
    return tuple(way_of(name) for name in names)
