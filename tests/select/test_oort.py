"""Oort's selector against values worked by hand: utility, exploration, pacer, blocklist."""

import math
from collections import Counter

import numpy as np
import pytest

from fedfreeze.config.file import make_config
from fedfreeze.messages import DeviceReport
from fedfreeze.select import Situation, make_selector
from fedfreeze.select.oort import Oort


def make(participants: int = 2, *, seed: int = 0, **select) -> Oort:
    train = {"participants": participants}
    selector = make_selector(make_config({"seed": seed, "select": {"name": "oort", **select}, "train": train}))
    assert isinstance(selector, Oort)
    return selector


def at(round_number: int, seconds, samples=None, *, stage: int = 0) -> Situation:
    samples = np.full(len(seconds), 10) if samples is None else np.asarray(samples)
    return Situation(round_number, stage, round_number, samples, np.asarray(seconds, dtype=np.float64))


def trained(device: int, squared_loss: float, samples: int = 10) -> DeviceReport:
    return DeviceReport(device, samples, loss=math.sqrt(squared_loss), squared_loss=squared_loss)


def test_utility_by_hand():
    selector = make(clip_percentile=100.0, preferred_percentile=50.0, speed_exponent=2.0)
    seconds = [1.0, 2.0, 4.0]
    selector.prepare(at(1, seconds))
    selector.observe([trained(0, 1.0), trained(1, 9.0)])
    selector.prepare(at(2, seconds))
    selector.observe([trained(2, 4.0, samples=20)])
    # |B| sqrt(mean of squared losses)
    assert selector.utility == {0: 10.0, 1: 30.0, 2: 40.0}
    scores = selector._scores([0, 1, 2], [0, 1, 2], 5)
    low = 0.999 * 10
    uncertain = [math.sqrt(0.1 * math.log(5) / since) for since in (1, 1, 2)]
    scaled = [(u - low) / (40 - low) for u in (10, 30, 40)]
    # T is the median of the candidates, 2 s: the third takes 4 s, so (2 / 4)^2
    expected = [scaled[0] + uncertain[0], scaled[1] + uncertain[1], (scaled[2] + uncertain[2]) / 4]
    assert scores == pytest.approx(expected)
    assert expected == pytest.approx([0.4015, 1.0680, 0.3209], abs=1e-4)


def test_an_outlier_is_clipped():
    selector = make(clip_percentile=50.0)
    selector.prepare(at(1, [1.0] * 3))
    selector.observe([trained(0, 1.0), trained(1, 4.0), trained(2, 1e8)])
    # the median is 20: the outlier counts no more
    scores = selector._scores([0, 1, 2], [0, 1, 2], 1)
    assert scores == pytest.approx([0.01 / 10.01, 1.0, 1.0])


def test_equal_utilities_do_not_divide_by_zero():
    selector = make()
    selector.prepare(at(1, [1.0] * 3))
    selector.observe([trained(device, 0.0) for device in range(3)])
    assert np.isfinite(selector._scores([0, 1, 2], [0, 1, 2], 1)).all()
    assert selector.select(2, [0, 1, 2], 2)
    assert selector._scores([], [0], 3).tolist() == []


@pytest.mark.parametrize("candidates", [1, 2, 3, 5])
@pytest.mark.parametrize("participants", [1, 3, 10])
def test_few_devices_do_not_crash(candidates, participants):
    selector = make(participants)
    everyone = list(range(candidates))
    for round_number in range(1, 30):
        selector.prepare(at(round_number, [1.0] * candidates))
        chosen = selector.select(round_number, everyone, participants)
        assert len(chosen) == min(candidates, participants)
        # losses of zero, and devices that fail: no weight that a draw could scale to 1
        failed = [None, "diverged"][round_number % 2]
        selector.observe([DeviceReport(d, 10, failed=failed, loss=0.0, squared_loss=0.0) for d in chosen])


def test_the_share_of_exploration_falls_to_its_floor():
    selector = make(exploration_start=0.9, exploration_decay=0.5, exploration_floor=0.2)
    assert [selector._exploration(n) for n in (1, 2, 3, 4, 9)] == pytest.approx([0.9, 0.45, 0.225, 0.2, 0.2])


def explored(selector: Oort, round_number: int, tried: list[int], everyone: list[int], count: int) -> int:
    selector.prepare(at(round_number, [1.0] * len(everyone)))
    return len(set(selector.select(round_number, everyone, count)) - set(tried))


def test_exploration_and_exploitation_share_the_slots():
    everyone, tried = list(range(60)), list(range(30))
    selector = make(10, exploration_decay=0.5, blocklist_rounds=None)
    selector.prepare(at(1, [1.0] * 60))
    selector.observe([trained(device, 1.0 + device) for device in tried])
    assert [explored(selector, n, tried, everyone, 10) for n in (1, 2, 3, 4)] == [9, 4, 2, 2]
    # where there is nobody to explore, all exploit; where nobody trained, all explore
    assert explored(selector, 1, tried, tried, 10) == 0
    assert explored(make(10), 40, [], everyone, 10) == 10


def test_exploration_prefers_fast_devices():
    counts: Counter[int] = Counter()
    for seed in range(300):
        selector = make(1, seed=seed)
        selector.prepare(at(1, [1.0, 9.0]))
        counts.update(selector.select(1, [0, 1], 1))
    assert counts[0] == pytest.approx(270, abs=21)  # 0.9 of 300; sd 5.2


def test_exploitation_draws_by_utility_above_the_cutoff():
    selector = make(exploration_start=0.0, exploration_floor=0.0, cutoff=0.5, clip_percentile=100.0)
    scores = np.array([0.1, 0.8, 1.0, 0.49, 0.5])
    drawn: Counter[int] = Counter()
    for seed in range(600):
        drawn.update(selector._exploit([10, 11, 12, 13, 14], scores, 1, np.random.default_rng(seed)))
    # half of the best is 0.5: three are left, with 0.8, 1.0 and 0.5 of 2.3
    assert set(drawn) == {11, 12, 14}
    assert drawn[12] == pytest.approx(600 / 2.3, abs=50)
    assert drawn[11] == pytest.approx(600 * 0.8 / 2.3, abs=50)
    # with two to take, the cut-off follows the second, 0.8
    assert {
        d for s in range(50) for d in selector._exploit([10, 11, 12, 13, 14], scores, 2, np.random.default_rng(s))
    } == {
        11,
        12,
        13,
        14,
    }
    assert selector._exploit([10, 11], scores[:2], 0, np.random.default_rng(0)) == []


def test_the_pacer_allows_longer_rounds_when_utility_falls():
    selector = make(pacer_rounds=2, pacer_step=5.0, preferred_percentile=50.0)
    # sums of two rounds each: 50, 50, 40, 60, 30
    losses = [4.0, 1.0, 1.0, 4.0, 4.0, 0.0, 9.0, 0.0, 0.0, 0.0]
    gains = [sum(10 * math.sqrt(x) for x in losses[i : i + 2]) for i in range(0, 10, 2)]
    assert gains == [30, 30, 20, 30, 0]
    seen = []
    for round_number, loss in enumerate(losses, 1):
        selector.prepare(at(round_number, [1.0]))
        selector.observe([trained(0, loss)])
        seen.append(selector.percentile)
    # after 30 = 30 it stays, after 20 < 30 it rises, after 30 > 20 it stays, after 0 < 30 it rises
    assert seen == [50, 50, 50, 50, 50, 55, 55, 55, 55, 60]


def test_the_pacer_ends_at_the_slowest_and_starts_anew_with_a_stage():
    selector = make(pacer_rounds=1, pacer_step=40.0, preferred_percentile=50.0)
    for round_number, loss in enumerate([100.0, 81.0, 64.0, 49.0], 1):
        selector.prepare(at(round_number, [1.0]))
        selector.observe([trained(0, loss)])
    assert selector.percentile == 100
    selector = make(pacer_rounds=1, pacer_step=5.0)
    selector.prepare(at(1, [1.0]))
    selector.observe([trained(0, 100.0)])
    selector.prepare(at(2, [1.0], stage=1))
    selector.observe([trained(0, 1.0)])
    assert selector.percentile == 50, "losses of two stages do not compare"


def test_devices_that_trained_often_are_left_out_but_not_too_many():
    selector = make(2, blocklist_rounds=3)
    selector.times = {0: 5, 1: 3, 2: 2, 3: 4, 4: 3}
    everyone = [0, 1, 2, 3, 4, 5]
    assert selector._not_blocked(everyone, 2) == [2, 5]
    assert selector._not_blocked(everyone, 3) == [1, 2, 5]
    assert selector._not_blocked(everyone, 5) == [1, 2, 3, 4, 5]
    assert selector._not_blocked(everyone, 9) == everyone
    assert make(blocklist_rounds=None)._not_blocked(everyone, 1) == everyone


def test_what_became_of_a_device():
    selector = make()
    selector.prepare(at(3, [1.0] * 3))
    late, failed = DeviceReport(0, 10, failed="late", left_out=True), DeviceReport(1, 10, failed="diverged")
    selector.observe([late, failed, trained(2, 1.0)])
    assert selector.utility == {1: 0.0, 2: 10.0}
    assert selector.trained_at == {1: 3, 2: 3}
    assert selector.times == {1: 1, 2: 1}
    assert selector.gained == [10.0]
