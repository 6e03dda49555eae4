"""Searches all cuts of a network for the cheapest that lets a share of a fleet join every stage. [ours]"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from fedfreeze.plan.step_costs import Caps, StageSteps, StepCost

_CORRECTIONS = 12  # how often the estimate of a cut is corrected by its exact measure before the best seen is taken
_SUFFIXES = 20_000  # how many last parts of cuts are looked at for one estimate


@dataclass(frozen=True)
class Cut:
    """A cut, and what a training step takes the devices of a fleet."""

    split: tuple[str, ...]
    """Names of the modules at which blocks begin, as `model.split` takes them."""
    blocks: int
    """How many blocks it makes."""
    stages: tuple[tuple[StepCost, ...], ...]
    """Of each stage a step by each way of `train.fit`."""
    takers: tuple[tuple[int, ...], ...]
    """Of each stage how many devices go each way."""
    step_flops: float
    """The operations of a step: the mean over the stages of the mean over the devices that can join the stage."""
    peak_bytes: int
    """The most that any stage needs by the way of least memory."""
    eligible: int
    """Devices that can join every stage."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """By what the proposal is chosen, the smallest: operations, then blocks, then peak."""
        return (self.step_flops, self.blocks, self.peak_bytes)


def cut_of(split: Sequence[str], blocks: int, stages: Sequence[Sequence[StepCost]], caps: Caps) -> Cut:
    """Return a cut with what its stages come to."""
    peak = max(min(step.memory_bytes for step in steps) for steps in stages)
    return Cut(
        split=tuple(split),
        blocks=blocks,
        stages=tuple(map(tuple, stages)),
        takers=tuple(caps.takers(steps) for steps in stages),
        step_flops=sum(map(caps.mean_flops, stages)) / len(stages),
        peak_bytes=peak,
        eligible=caps.eligible(peak),
    )


@dataclass(frozen=True)
class _Sum:
    """What some stages come to, and the places at which the blocks begin of which they are."""

    flops: float
    """The sum over the stages of the mean over the devices."""
    peak_bytes: int
    places: tuple[int, ...] = ()


_Order = Callable[[_Sum], tuple[float, float]]
_Steps = Callable[[int, int], tuple[StepCost, ...]]


class CutSearch:
    """The best cut for a number of blocks, over all cuts.

    What a stage needs depends on the blocks that it trains, its span, and by the output module on the cuts behind them.
    So a span is measured with all that follows as one missing block; the operations of further missing blocks add up
    (StageSteps.further_flops). The best cut by these estimates is found by dynamic programming over where the last
    blocks begin, and measured exactly; the best is sought again with what was measured, until it is the best measured.
    Spans are measured as they come up: one that was not takes at least what its smallest parts take each, and is taken
    to fit. That longer spans need more memory, and further missing blocks no less, is not proven for all networks;
    tests hold the outcome against all cuts.
    """

    def __init__(self, steps: StageSteps, caps: Caps, window: int, wanted: int):
        """`window`: how many blocks train together; `wanted`: how many devices must be able to join every stage."""
        self.steps = steps
        self.caps = caps
        self.window = window
        self.wanted = wanted
        self.last = len(steps.places)
        self._spans: dict[tuple[int, int], tuple[StepCost, ...]] = {}
        self._exact: dict[tuple[int, tuple[int, ...]], tuple[StepCost, ...]] = {}
        """What was measured of stages with several blocks behind; with one at most the estimate is exact."""

    def cheapest(self, blocks: int, below: float) -> Cut | None:
        """Return of the cuts that the wanted devices can join the one of fewest operations, then of lowest peak.

        None if there is none, or none that could be under `below` operations.
        """
        limit = self.caps.limit_bytes(self.wanted)
        found: Cut | None = None
        for _ in range(_CORRECTIONS):
            best = self._cheapest_by_estimates(blocks, limit, found, below)
            if best is None:
                break
            cut = self._measured(best.places)
            if cut.eligible >= self.wanted and (found is None or cut.rank < found.rank):
                found = cut
            if not self._correct(best.places, cut):
                break
        return found

    def lowest_peak(self, blocks: int, below: float) -> Cut | None:
        """Return the cut with the smallest peak, then of fewest operations; None if it is not under `below` bytes."""
        found: Cut | None = None
        for _ in range(_CORRECTIONS):
            bound = found.peak_bytes if found else below
            best = self._best(blocks, bound - 1, _by_peak, self._span)
            if best is None:
                break
            cut = self._measured(best.places)
            if cut.peak_bytes < bound:
                found = cut
            if not self._correct(best.places, cut):
                break
        return found

    def _cheapest_by_estimates(self, blocks: int, limit: float, found: Cut | None, below: float) -> _Sum | None:
        """Return the cheapest cut, of which all spans have been measured; None if it is no cheaper than those known."""
        stages = blocks - self.window + 1
        while True:
            best = self._best(blocks, limit, _by_flops, self._span_or_less)
            if best is None or best.flops / stages >= below:
                return None
            if found is not None and (best.flops / stages, best.peak_bytes) >= (found.step_flops, found.peak_bytes):
                return None
            missing = [span for span in self._spans_of(best.places) if span not in self._spans]
            if not missing:
                return best
            for span in missing:
                self._span(*span)

    def _best(self, blocks: int, limit: float, order: _Order, steps_of: _Steps) -> _Sum | None:
        """Return the first by `order` of the cuts of which no stage needs more than `limit` bytes.

        Best-first search from the last blocks to the first: then the blocks behind a stage are known, and with them
        what was measured of it. What is to come takes at least what dynamic programming has found by estimates.
        """
        first = self._first_parts(blocks, limit, order, steps_of)
        number = count()  # the first found goes first
        heap = [
            (order(part), next(number), blocks - self.window + 1, places, _Sum(0.0, 0))
            for places, part in sorted(first[blocks].items())
        ]
        heapq.heapify(heap)
        for _ in range(_SUFFIXES):
            if not heap:
                return None
            _, _, stage, places, known = heapq.heappop(heap)
            if stage == 0:
                return _Sum(known.flops, known.peak_bytes, places)
            tail = places[self.window - 1 :]  # behind the stage before these
            further = self._further(tail)
            for state, part in sorted(first[stage + self.window - 2].items()):
                if state[1:] != places[: self.window - 1] or state[0] >= places[0]:
                    continue
                exact = self._exact.get((state[0], tail))
                steps = exact or steps_of(state[0], tail[0])
                if _least(steps) > limit:
                    continue
                flops = self.caps.mean_flops(steps) + (0 if exact else further)
                longer = _Sum(known.flops + flops, max(known.peak_bytes, _least(steps)))
                rest = (stage - 1) * self._further((state[-1], *tail)) if stage > 1 else 0
                least = _Sum(longer.flops + part.flops + rest, max(longer.peak_bytes, part.peak_bytes))
                heapq.heappush(heap, (order(least), next(number), stage - 1, (state[0], *places), longer))
        return None

    def _first_parts(
        self, blocks: int, limit: float, order: _Order, steps_of: _Steps
    ) -> list[dict[tuple[int, ...], _Sum]]:
        """Return for each number of blocks, by where the newest begin, the least that their stages come to."""
        best: list[dict[tuple[int, ...], _Sum]] = [{(0,): _Sum(0.0, 0)}]
        for begun in range(1, blocks + 1):
            nearer: dict[tuple[int, ...], _Sum] = {}
            for newest, part in sorted(best[-1].items()):
                ends = range(newest[-1] + 1, self.last) if begun < blocks else [self.last]
                for end, flops, needed in self._stages_to(newest, ends, limit, steps_of):
                    # the block that ends here was missing in the stages that end before it
                    further = max(0, begun - self.window)
                    if further:
                        flops += further * self.steps.further_flops(newest[-1], end)
                    longer = _Sum(part.flops + flops, max(part.peak_bytes, needed))
                    state = (*newest, end)[-self.window :]
                    if state not in nearer or order(longer) < order(nearer[state]):
                        nearer[state] = longer
            best.append(nearer)
        return best

    def _stages_to(
        self, newest: Sequence[int], ends: Sequence[int], limit: float, steps_of: _Steps
    ) -> Iterator[tuple[int, float, int]]:
        """Yield the ends of the stage that begins with the first of the newest blocks, its operations and its bytes.

        Where the blocks are still too few for a stage: all ends and nothing.
        """
        if len(newest) < self.window:
            yield from ((end, 0.0, 0) for end in ends)
            return
        for end in ends:
            steps = steps_of(newest[0], end)
            if _least(steps) <= limit:
                yield end, self.caps.mean_flops(steps), _least(steps)
            elif end < self.last:
                return  # a longer one needs more

    def _further(self, tail: Sequence[int]) -> int:
        """Return the operations of a stage's output module beside those of one missing block."""
        return sum(self.steps.further_flops(*block) for block in pairwise(tail))

    def _span(self, begin: int, end: int) -> tuple[StepCost, ...]:
        """Return what a step of a span takes, all that follows taken as one missing block."""
        if (begin, end) not in self._spans:
            self._spans[begin, end] = self.steps.of(begin, [end])
        return self._spans[begin, end]

    def _span_or_less(self, begin: int, end: int) -> tuple[StepCost, ...]:
        """Return the same of a span that was measured; of another what it takes at least, in no memory."""
        if (begin, end) in self._spans or end == begin + 1:
            return self._span(begin, end)
        # each part by itself passes no gradient on, and trains as much
        parts = sum(
            min(step.flops for step in self._span(place, place + 1))
            - self.steps.frozen_flops(place)
            - self.steps.output_flops(place + 1)
            for place in range(begin, end)
        )
        return (StepCost(0, self.steps.frozen_flops(begin) + parts + self.steps.output_flops(end)),)

    def _spans_of(self, cut: Sequence[int]) -> list[tuple[int, int]]:
        """Return the span of each stage; the last blocks begin none."""
        return list(zip(cut, cut[self.window :], strict=False))

    def _measured(self, cut: Sequence[int]) -> Cut:
        """Measure each stage of a cut exactly."""
        tails = [cut[place:] for place in range(self.window, len(cut))]
        stages = [self.steps.of(begin, tail) for begin, tail in zip(cut, tails, strict=False)]
        split = [self.steps.places[i] for i in cut[:-1]]
        return cut_of(split, len(split), stages, self.caps)

    def _correct(self, places: Sequence[int], cut: Cut) -> bool:
        """Note what was measured, and return whether it differs from what was known."""
        corrected = False
        for stage, ((begin, end), exact) in enumerate(zip(self._spans_of(places), cut.stages, strict=True)):
            tail = tuple(places[stage + self.window :])
            further = self._further(tail)
            estimate = tuple(StepCost(step.memory_bytes, step.flops + further) for step in self._span(begin, end))
            if (begin, tail) not in self._exact and exact != estimate:
                self._exact[begin, tail] = exact
                corrected = True
        return corrected


def _least(steps: Sequence[StepCost]) -> int:
    return min(step.memory_bytes for step in steps)


def _by_flops(part: _Sum) -> tuple[float, float]:
    return (part.flops, part.peak_bytes)


def _by_peak(part: _Sum) -> tuple[float, float]:
    return (part.peak_bytes, part.flops)
