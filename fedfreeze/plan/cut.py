"""Proposes where to cut the network, so that a wanted share of a fleet's devices can join every stage. [ours]"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs, fake_tensors, least_needed, measure_costs
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
    blocks: int
    """How many blocks it makes."""

    @property
    def peak_bytes(self) -> int:
        """The most that any stage needs."""
        return max(cost.least_bytes for cost in self.costs.stages)


def with_split(config: Config, split: Sequence[str]) -> Config:
    """Return the configuration with another cut."""
    return replace(config, model=replace(config.model, split=list(split)))


def propose(
    config: Config, image_shape: ImageShape, num_classes: int, fleet: Fleet, share: float
) -> Iterator[Proposal]:
    """Yield, for as many blocks as train together, one more, ..., the cut with the smallest peak.

    It ends where a share of the devices can join. Cuts that do not lower the peak are left out, so each proposal needs
    less than the one before. If no cut lets the share join, the last one yielded has the smallest peak there is. Raises
    ConfigError for a method without stages, or a network with fewer places for a cut than blocks that train together.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_tensors(mode):
        outline = build_outline(config.model, image_shape, num_classes, config.seed)
        alone = with_split(one_block_a_stage(config), outline.places[:1])
        if not isinstance(make_method(alone, outline.cut([])), SmartFreeze):
            raise ConfigError(f"--cut: cuts are sought for the stages of smartfreeze, not of {config.method.name}")
    if len(outline.places) < config.method.window:
        raise ConfigError(
            f"method.window: {config.method.window} blocks cannot train together in {config.model.label}, in which "
            f"blocks can begin at {len(outline.places)} places"
        )
    search = _Search(config, outline, image_shape, num_classes, fleet, mode)
    lowest: int | None = None
    for blocks in range(config.method.window, len(outline.places) + 1):
        proposal = search.best(blocks, lowest)
        if proposal is None:
            continue
        lowest = proposal.peak_bytes
        yield proposal
        if proposal.eligible >= math.ceil(share * len(fleet)):
            return


def one_block_a_stage(config: Config) -> Config:
    """Return the configuration without a window: a stage of several blocks needs what one of all of them does."""
    return replace(config, method=replace(config.method, window=1))


def proposal_of(config: Config, split: Sequence[str], image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure one cut in full."""
    return cut_as_it_is(with_split(config, split), image_shape, classes, fleet)


def cut_as_it_is(config: Config, image_shape: ImageShape, classes: int, fleet: Fleet) -> Proposal:
    """Measure the cut that a configuration has; its `split` is empty where that is the usual one."""
    costs = measure_costs(config, image_shape, classes)
    peak = max(cost.least_bytes for cost in costs.stages)
    blocks = len(costs.stages) + config.method.window - 1
    return Proposal(tuple(config.model.split or ()), costs, len(fleet.eligible(peak)), blocks)


class _Search:
    """The smallest peak for a number of blocks, over all cuts.

    What a stage needs depends on the blocks that it trains and, by the output module, on the cuts behind them. So such
    a span of blocks is first measured with all that follows as one missing block, the best cut by these estimates is
    measured exactly, and what was estimated too low is corrected, until the best by estimates is the best measured.
    """

    def __init__(
        self,
        config: Config,
        outline: Outline,
        image_shape: ImageShape,
        num_classes: int,
        fleet: Fleet,
        mode: FakeTensorMode,
    ):
        """`mode`: that in which the outline was made."""
        self.mode = mode
        self.config = config
        self.outline = outline
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.fleet = fleet
        self.places = outline.places
        self.window = config.method.window
        self.needs: dict[tuple[int, int], int] = {}
        """What a stage needs by its span: the places at which what it trains begins and ends."""

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
            ends = [*cut, len(self.places)]
            spans = list(zip(cut, ends[self.window :], strict=False))  # the last blocks begin no stage
            exact = [cost.least_bytes for cost in proposal.costs.stages]
            if max(exact) <= max(self.needs[span] for span in spans):
                break
            for span, needed in zip(spans, exact, strict=True):
                self.needs[span] = max(self.needs[span], needed)
        return found

    def _best_by_estimates(self, blocks: int, bound: int | None) -> list[int] | None:
        """Return the places at which blocks begin, by dynamic programming over where the last ones begin."""
        last = len(self.places)
        # best[..., i, j]: the smallest peak of a cut whose newest blocks begin at ..., i, j, and that cut; they are as
        # many as the next stage trains
        best: dict[tuple[int, ...], tuple[int, list[int]]] = {(0,): (0, [0])}
        for begun in range(1, blocks + 1):
            nearer: dict[tuple[int, ...], tuple[int, list[int]]] = {}
            for newest, (peak, cut) in sorted(best.items()):
                places = range(newest[-1] + 1, last) if begun < blocks else [last]
                for place, needed in self._stages_to(newest, places, bound):
                    together = max(peak, needed)
                    state = (*newest, place)[-self.window :]
                    if state not in nearer or together < nearer[state][0]:
                        nearer[state] = (together, [*cut, place])
            best = nearer
        ends = [(peak, cut[:-1]) for state, (peak, cut) in sorted(best.items()) if state[-1] == last]
        return min(ends, key=lambda end: end[0])[1] if ends else None

    def _stages_to(self, newest: Sequence[int], ends: Sequence[int], bound: int | None) -> Iterator[tuple[int, int]]:
        """Yield the ends of the stage that begins with the first of the newest blocks, and what it needs, less than
        the bound; where the blocks are still too few for a stage, all ends and nothing."""
        if len(newest) < self.window:
            yield from ((end, 0) for end in ends)
            return
        for end in ends:
            span = (newest[0], end)
            if span not in self.needs:
                self.needs[span] = self._estimate(*span)
            if bound is not None and self.needs[span] >= bound:
                if end < len(self.places):
                    return  # a longer one needs more
                continue
            yield end, self.needs[span]

    def _estimate(self, begin: int, end: int) -> int:
        """Return what the stage of one span needs, the rest taken as one frozen and one missing block."""
        split = [self.places[i] for i in (begin, end) if 0 < i < len(self.places)]
        with fake_tensors(self.mode):
            blocked = self.outline.cut(split)
            config = with_split(one_block_a_stage(self.config), split or self.places[:1])
            method = SmartFreeze(config, blocked)
            stage = method.enter_stage(0 if begin == 0 else 1, torch.device("cpu"))
            needed = least_needed(stage, self.config, self.image_shape)
            method.leave_stage(stage)
        return needed
