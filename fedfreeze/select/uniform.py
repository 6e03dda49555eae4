"""Uniform selection among the devices whose cap holds the stage."""

from collections.abc import Sequence

from fedfreeze.seeds import numpy_generator
from fedfreeze.select.base import Selector


class Uniform(Selector):
    """At random, each candidate with the same chance, without replacement."""

    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """See Selector."""
        generator = numpy_generator(self.config.seed, "select", round_number)
        chosen = generator.choice(len(candidates), size=min(count, len(candidates)), replace=False)
        return sorted(candidates[i] for i in chosen)
