"""TiFL's selector against values worked by hand: tiers, credits, probabilities."""

from collections import Counter

import numpy as np
import pytest

from fedfreeze.config.file import make_config
from fedfreeze.messages import DeviceReport
from fedfreeze.select import Situation, make_selector
from fedfreeze.select.tifl import TiFL, tier_probabilities

SECONDS = [9.0, 1.0, 5.0, 2.0, 8.0, 6.0, 1.5, 5.0, 7.0]
TIERS = [[1, 3, 6], [2, 5, 7], [0, 4, 8]]  # by seconds: 1 1.5 2 | 5 5 6 | 7 8 9


def make(participants: int = 2, *, rounds: int = 30, seed: int = 0, **select) -> TiFL:
    train = {"participants": participants, "rounds": rounds}
    options = {"name": "tifl", "tiers": 3, **select}
    selector = make_selector(make_config({"seed": seed, "select": options, "train": train}))
    assert isinstance(selector, TiFL)
    return selector


def at(round_number: int, seconds=SECONDS, *, stage: int = 0, stage_round: int | None = None) -> Situation:
    samples = np.full(len(seconds), 10)
    return Situation(round_number, stage, stage_round or round_number, samples, np.asarray(seconds, dtype=np.float64))


def choose(selector: TiFL, round_number: int = 1, candidates=range(9), count: int = 2, **options) -> list[int]:
    selector.prepare(at(round_number, **options))
    return selector.select(round_number, list(candidates), count)


def members(selector: TiFL) -> list[list[int]]:
    return [sorted(d for d, tier in selector.tier.items() if tier == t) for t in range(len(selector.probabilities))]


def told(device: int, loss: float, samples: int = 10) -> DeviceReport:
    return DeviceReport(device, samples, loss=loss, squared_loss=loss**2)


def test_tiers_are_of_equal_size_by_seconds():
    selector = make()
    choose(selector)
    assert members(selector) == TIERS
    assert selector.starts == [5.0, 7.0]
    assert selector.probabilities == pytest.approx([1 / 3] * 3)


def test_fewer_devices_than_tiers_make_fewer_tiers():
    selector = make(tiers=7)
    assert choose(selector, candidates=[0, 1], count=5) == [0, 1]
    assert members(selector) == [[1], [0]]


def test_participants_come_from_one_tier_each_as_often():
    selector = make(rounds=300, tier_rounds=1000)
    drawn: Counter[int] = Counter()
    for round_number in range(1, 301):
        chosen = choose(selector, round_number)
        tiers = {tier for tier, devices in enumerate(TIERS) if set(chosen) & set(devices)}
        assert len(chosen) == 2
        assert tiers == {selector.drawn}
        drawn.update(tiers)
    assert all(number == pytest.approx(100, abs=33) for number in drawn.values())  # sd 8.2


def test_a_tier_with_too_few_is_filled_from_its_neighbours():
    for seed in range(12):
        selector = make(seed=seed)
        choose(selector)
        chosen = set(choose(selector, 2, candidates=[1, 3, 2, 0, 4], count=4))
        first = {0: {1, 3, 2}, 1: {2, 1, 3}, 2: {0, 4, 2}}[selector.drawn]
        assert first < chosen, "the tier, and the nearest, the faster first"
    assert choose(make(), count=20) == list(range(9))


def test_who_comes_later_joins_the_tier_of_its_duration():
    selector = make()
    choose(selector, candidates=[1, 3, 2, 5, 0, 4])
    assert members(selector) == [[1, 3], [2, 5], [0, 4]]
    assert selector.starts == [5.0, 8.0]
    choose(selector, 2)
    assert members(selector) == [[1, 3, 6], [2, 5, 7, 8], [0, 4]]


def test_tiers_are_made_anew_when_a_stage_starts():
    selector = make()
    choose(selector)
    selector.observe([told(1, 1.0)])
    slower = [10 - s for s in SECONDS]
    choose(selector, 2, seconds=slower)
    assert members(selector) == TIERS, "within a stage they stay"
    left = sum(selector.credits)
    choose(selector, 3, seconds=slower, stage=1, stage_round=1)
    assert members(selector) == TIERS[::-1]
    assert selector.losses == [None] * 3
    assert sum(selector.credits) == left - 1, "credits are of the whole run"


def test_each_round_costs_its_tier_a_credit():
    selector = make(tier_credits=4, tier_rounds=1000)
    drawn: Counter[int] = Counter()
    for round_number in range(1, 13):
        choose(selector, round_number)
        drawn[selector.drawn] += 1
    assert drawn == {0: 4, 1: 4, 2: 4}
    assert selector.credits == [0, 0, 0]
    assert len(choose(selector, 13)) == 2, "where no credits are left, they do not bind"
    assert make(rounds=30).credits == [20] * 3
    assert make(rounds=1, tiers=5).credits == [1] * 5


def test_credits_do_not_stop_the_only_tier_with_candidates():
    selector = make(tier_credits=1)
    for round_number in range(1, 5):
        assert set(choose(selector, round_number, candidates=[1, 3, 6] if round_number > 1 else range(9))) <= set(
            range(9)
        )
    selector.credits = [0, 5, 5]
    assert set(choose(selector, 9, candidates=[1, 3, 6])) < {1, 3, 6}
    assert selector.drawn == 0


def test_probabilities_by_hand():
    # four tiers: 10 = 4 x 5 / 2; the highest loss gets 4 tenths
    assert tier_probabilities([0.5, 2.0, 1.0, 0.1], [1, 1, 1, 1]) == pytest.approx([0.2, 0.4, 0.3, 0.1])
    # unknown counts as the highest, ties go to the faster
    assert tier_probabilities([0.5, None, 0.5], [1, 1, 1]) == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    # no credits, no chance: the others share
    assert tier_probabilities([0.5, 2.0, 1.0], [1, 0, 1]) == pytest.approx([1 / 3, 0, 2 / 3])
    assert tier_probabilities([0.5, 2.0], [0, 0]) == [0, 0]
    assert tier_probabilities([], []) == []


def test_probabilities_change_when_the_tier_drawn_last_got_no_better():
    selector = make(tier_rounds=2)
    uniform = pytest.approx([1 / 3] * 3)
    choose(selector, 1)
    selector.observe([told(1, 3.0, 10), told(3, 1.0, 30), told(2, 2.0), told(0, 1.0)])
    assert selector.losses == [1.5, 2.0, 1.0], "weighted by samples"
    assert selector.probabilities == uniform, "not yet two rounds"
    choose(selector, 2)
    selector.observe([DeviceReport(0, 10, failed="diverged", loss=9.0)])
    # the first time there is nothing to compare with: by rank
    assert selector.probabilities == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    for round_number in (3, 4):
        choose(selector, round_number)
        # all got better, and their order changed
        selector.observe([told(1, 0.1), told(2, 0.2), told(0, 0.3)])
    assert selector.probabilities == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    for round_number in (5, 6):
        choose(selector, round_number)
        selector.observe([told(1, 0.1), told(2, 0.2), told(0, 0.3)])
    assert selector.probabilities == pytest.approx([1 / 6, 2 / 6, 3 / 6])
