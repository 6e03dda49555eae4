"""The cheapest cut and that of the smallest peak, held against all cuts of a small network."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from fedfreeze.fleet.devices import Fleet
from fedfreeze.plan.cut_search import Cut, CutSearch, cut_of
from fedfreeze.plan.step_costs import Caps, StageSteps, StepCost
from tests.plan.test_step_costs import small, steps_of

# Ways of train.fit, as numbers: whole, recompute, micro(4).
WHOLE, RECOMPUTE, MICRO = 0, 1, 2


class OfWays(StageSteps):
    """The steps of a network by some of the ways that were measured; each stage is measured once for all tests."""

    def __init__(self, steps: StageSteps, ways: Sequence[int]):
        self.__dict__.update(steps.__dict__)
        self.ways = ways

    def of(self, begin: int, tail: Sequence[int]) -> tuple[StepCost, ...]:
        found = super().of(begin, tail)
        return tuple(found[way] for way in self.ways)


@pytest.fixture(scope="module")
def steps() -> StageSteps:
    return steps_of(small(fit="auto, micro(4)"))


def all_cuts(steps: StageSteps, caps: Caps, window: int) -> list[Cut]:
    last = len(steps.places)
    cuts = []
    for blocks in range(window, last + 1):
        for rest in itertools.combinations(range(1, last), blocks - 1):
            places = (0, *rest, last)
            stages = [steps.of(places[i], places[i + window :]) for i in range(blocks - window + 1)]
            cuts.append(cut_of([steps.places[i] for i in places[:-1]], blocks, stages, caps))
    return cuts


def proposed(steps: StageSteps, caps: Caps, window: int, wanted: int) -> Cut | None:
    """Return what `propose` comes to."""
    search, found, below = CutSearch(steps, caps, window, wanted), [], math.inf
    for blocks in range(window, len(steps.places) + 1):
        cut = search.cheapest(blocks, below)
        if cut is not None:
            found.append(cut)
            below = min(below, cut.step_flops)
    return min(found, key=lambda cut: cut.rank, default=None)


def drawn_fleet(steps: StageSteps, draw: random.Random, window: int) -> Fleet:
    """Return devices whose caps lie among what cuts need."""
    peaks = [cut.peak_bytes for cut in all_cuts(steps, Caps(Fleet((1,))), window)]
    return Fleet(tuple(int(draw.uniform(0.9 * min(peaks), 1.2 * max(peaks))) for _ in range(6)))


@pytest.mark.parametrize("ways", [(WHOLE,), (WHOLE, RECOMPUTE), (WHOLE, RECOMPUTE, MICRO), (RECOMPUTE, WHOLE)])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_proposal_is_the_cheapest_of_all_cuts(steps: StageSteps, window: int, ways: tuple[int, ...]) -> None:
    draw = random.Random(window)
    found_for = set()
    for _ in range(40):
        these = OfWays(steps, ways)
        caps, wanted = Caps(drawn_fleet(these, draw, window)), draw.randint(1, 6)
        able = [cut for cut in all_cuts(these, caps, window) if cut.eligible >= wanted]
        found = proposed(these, caps, window, wanted)
        if not able:
            assert found is None
            found_for.add(None)
            continue
        assert found is not None
        best = min(able, key=lambda cut: cut.rank)
        assert found.rank == best.rank
        assert found in able
        found_for.add((found.split, found.takers))
    assert None in found_for
    assert len(found_for) > 3


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_smallest_peak_of_each_number_of_blocks(steps: StageSteps, window: int) -> None:
    caps = Caps(Fleet((1,)))
    for ways in [(WHOLE,), (WHOLE, RECOMPUTE)]:
        these = OfWays(steps, ways)
        cuts = all_cuts(these, caps, window)
        lowest = math.inf
        for blocks in range(window, len(these.places) + 1):
            peak = min(cut.peak_bytes for cut in cuts if cut.blocks == blocks)
            found = CutSearch(these, caps, window, 1).lowest_peak(blocks, lowest)
            if peak < lowest:
                assert found is not None
                assert (found.peak_bytes, found.blocks) == (peak, blocks)
                lowest = peak
            else:
                assert found is None


@pytest.mark.parametrize("recomputing_wins", [True, False])
def test_recomputation_in_fewer_blocks_against_more_blocks_without(steps: StageSteps, recomputing_wins: bool) -> None:
    """There are fleets for which the one is cheaper, and fleets for which the other is."""
    these, draw, seen = OfWays(steps, (WHOLE, RECOMPUTE)), random.Random(0), 0
    for _ in range(300):
        caps = Caps(drawn_fleet(these, draw, 1))
        cuts = sorted(all_cuts(these, caps, 1), key=lambda cut: cut.rank)
        able = [cut for cut in cuts if cut.eligible >= 2]
        recomputed, whole = (
            next((cut for cut in able if any(takers[1] for takers in cut.takers) is each), None)
            for each in (True, False)
        )
        if recomputed is None or whole is None or recomputed.blocks >= whole.blocks:
            continue
        if (recomputed.rank < whole.rank) is recomputing_wins:
            assert proposed(these, caps, 1, 2) == (recomputed if recomputing_wins else whole)
            seen += 1
    assert seen


def test_spans_that_cannot_be_in_the_proposal_are_not_measured() -> None:
    counted = steps_of(small())
    found = proposed(counted, Caps(Fleet((None,))), 1, 1)
    assert found is not None
    last = len(counted.places)
    assert len(counted._steps) < last * (last + 1) // 2
