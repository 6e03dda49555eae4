"""Proposes where to cut the network, so that a wanted share of a fleet's devices can join every stage. [ours]"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs, fake_tensors, measure_costs, step_memory
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet
from fedfreeze.methods import SmartFreeze, make_method
from fedfreeze.network.blocks import Outline, build_outline
from fedfreeze.network.probing import ImageShape

_CORRECTIONS = 8  # how often the estimate of a cut is corrected by its exact measure before the best seen is taken


@dataclass(frozen=True)
class Proposal:
    """A cut and what it costs."""

    split: tuple[str, ...]
    """Names of the modules at which blocks begin, as `model.split` takes them."""
    costs: Costs
    eligible: int
    """Devices that can join every stage."""

    @property
    def peak_bytes(self) -> int:
        """The most that any stage needs."""
        return max(cost.memory_bytes for cost in self.costs.stages)


def with_split(config: Config, split: Sequence[str]) -> Config:
    """Return the configuration with another cut."""
    return replace(config, model=replace(config.model, split=list(split)))


def propose(
    config: Config, image_shape: ImageShape, num_classes: int, fleet: Fleet, share: float
) -> Iterator[Proposal]:
    """Yield, for one block, two, three, ..., the cut with the smallest peak; end where a share of the devices can join.

    Cuts that do not lower the peak are left out, so each proposal needs less than the one before. If no cut lets the
    share join, the last one yielded has the smallest peak there is. Raises ConfigError for a method without stages.
    """
    with fake_tensors():
        outline = build_outline(config.model, image_shape, num_classes, config.seed)
        if not isinstance(make_method(with_split(config, outline.places[:1]), outline.cut([])), SmartFreeze):
            raise ConfigError(f"--cut: cuts are sought for the stages of smartfreeze, not of {config.method.name}")
    search = _Search(config, outline, image_shape, num_classes, fleet)
    lowest: int | None = None
    for blocks in range(1, len(outline.places) + 1):
        proposal = search.best(blocks, lowest)
        if proposal is None:
            continue
        lowest = proposal.peak_bytes
        yield proposal
        if proposal.eligible >= math.ceil(share * len(fleet)):
            return


def proposal_of(config: Config, split: Sequence[str], image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure one cut in full."""
    return cut_as_it_is(with_split(config, split), image_shape, classes, fleet)


def cut_as_it_is(config: Config, image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure the cut that a configuration has; its `split` is empty where that is the usual one."""
    costs = measure_costs(config, image_shape, classes)
    peak = max(cost.memory_bytes for cost in costs.stages)
    return Proposal(tuple(config.model.split or ()), costs, len(fleet.eligible(peak)))


class _Search:
    """The smallest peak for a number of blocks, over all cuts.

    What a stage needs depends on its block and, by the output module, on the cuts behind it. So a block is first
    measured with all that follows as one missing block, the best cut by these estimates is measured exactly, and what
    was estimated too low is corrected, until the best by estimates is the best measured.
    """

    def __init__(self, config: Config, outline: Outline, image_shape: ImageShape, num_classes: int, fleet: Fleet):
        self.config = config
        self.outline = outline
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.fleet = fleet
        self.places = outline.places
        self.needs: dict[tuple[int, int], int] = {}

    def best(self, blocks: int, lowest: int | None) -> Proposal | None:
        """Return the cut into `blocks` blocks with the smallest peak; None if it is not under `lowest`."""
        found: Proposal | None = None
        for _ in range(_CORRECTIONS):
            bound = found.peak_bytes if found else lowest
            cut = self._best_by_estimates(blocks, bound)
            if cut is None:
                break
            split = [self.places[i] for i in cut]
            proposal = proposal_of(self.config, split, self.image_shape, self.num_classes, self.fleet)
            if bound is None or proposal.peak_bytes < bound:
                found = proposal
            ends = [*cut[1:], len(self.places)]
            exact = [cost.memory_bytes for cost in proposal.costs.stages]
            if max(exact) <= max(self.needs[edge] for edge in zip(cut, ends, strict=True)):
                break
            for edge, needed in zip(zip(cut, ends, strict=True), exact, strict=True):
                self.needs[edge] = max(self.needs[edge], needed)
        return found

    def _best_by_estimates(self, blocks: int, bound: int | None) -> list[int] | None:
        """Return the places at which blocks begin, by dynamic programming over the last block's begin."""
        last = len(self.places)
        # best[j]: the smallest peak of a cut of everything before place j, and that cut
        best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
        for block in range(blocks):
            nearer: dict[int, tuple[int, list[int]]] = {}
            for begin, (peak, cut) in sorted(best.items()):
                ends = range(begin + 1, last + 1) if block < blocks - 1 else [last]
                for end, needed in self._blocks_from(begin, ends, bound):
                    together = max(peak, needed)
                    if end not in nearer or together < nearer[end][0]:
                        nearer[end] = (together, [*cut, begin])
            best = nearer
        return best[last][1] if last in best else None

    def _blocks_from(self, begin: int, ends: Sequence[int], bound: int | None) -> Iterator[tuple[int, int]]:
        """Yield the ends of blocks that need less than the bound, and what they need."""
        for end in ends:
            needed = self.needs.get((begin, end))
            if needed is None:
                needed = self.needs[begin, end] = self._estimate(begin, end)
            if bound is not None and needed >= bound:
                if end < len(self.places):
                    return  # a longer block needs more
                continue
            yield end, needed

    def _estimate(self, begin: int, end: int) -> int:
        """Return what the stage of one block needs, the rest taken as one frozen and one missing block."""
        split = [self.places[i] for i in (begin, end) if 0 < i < len(self.places)]
        with fake_tensors():
            blocked = self.outline.cut(split)
            config = with_split(self.config, split or self.places[:1])
            method = SmartFreeze(config, blocked)
            stage = method.enter_stage(0 if begin == 0 else 1, torch.device("cpu"))
            needed = step_memory(stage, self.config.train, self.image_shape)
            method.leave_stage(stage)
        return needed
