"""SmartFreeze's selector: slots for communities, utility inside them, each ingredient alone, refreshes."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.config.file import make_config
from fedfreeze.errors import ConfigError
from fedfreeze.messages import DeviceReport
from fedfreeze.select import Probes, Situation, make_selector
from fedfreeze.select.dealing import deal_slots, speed_factor, weighted_draw
from fedfreeze.select.smartfreeze import UNKNOWN, SmartFreezeSelector
from tests.support.signatures import planted

ALONE = {"communities": False, "loss_utility": False, "speed_utility": False, "exploration": 0.0}


def make(participants: int = 2, *, train: dict | None = None, seed: int = 0, **select) -> SmartFreezeSelector:
    selector = make_selector(
        make_config(
            {
                "seed": seed,
                "select": {"name": "smartfreeze", **select},
                "train": {"participants": participants, **(train or {})},
            }
        )
    )
    assert isinstance(selector, SmartFreezeSelector)
    return selector


def situation(samples, seconds=None, *, round_number: int = 1, stage: int = 0, stage_round: int | None = None):
    seconds = np.ones(len(samples)) if seconds is None else np.asarray(seconds, dtype=np.float64)
    return Situation(round_number, stage, stage_round or round_number, np.asarray(samples), seconds)


def probes(devices, signatures=None, squared_loss=None) -> Probes:
    n = len(devices)
    squared = np.ones(n) if squared_loss is None else np.asarray(squared_loss, dtype=np.float64)
    signatures = np.eye(n, 8, dtype=np.float32) if signatures is None else np.asarray(signatures, dtype=np.float32)
    return Probes(np.asarray(devices), np.sqrt(squared), squared, signatures)


def choose(selector, samples, *, count, seconds=None, round_number=1, candidates=None, **at) -> list[int]:
    selector.prepare(situation(samples, seconds, round_number=round_number, **at))
    return selector.select(round_number, candidates or list(range(len(samples))), count)


# --- slots


def test_each_group_gets_one_and_the_rest_goes_by_highest_averages():
    # 60/3 = 20, then 60/5 = 12, then 30/3 = 10 against 60/7 = 8.6
    assert deal_slots(3, [60, 30, 10], [1, 1, 1], [9, 9, 9]) == [1, 1, 1]
    assert deal_slots(4, [60, 30, 10], [1, 1, 1], [9, 9, 9]) == [2, 1, 1]
    assert deal_slots(5, [60, 30, 10], [1, 1, 1], [9, 9, 9]) == [3, 1, 1]
    assert deal_slots(6, [60, 30, 10], [1, 1, 1], [9, 9, 9]) == [3, 2, 1]
    assert deal_slots(10, [60, 30, 10], [1, 1, 1], [20, 20, 20]) == [6, 3, 1]


def test_no_group_gets_more_than_it_has():
    assert deal_slots(6, [60, 30, 10], [1, 1, 1], [1, 2, 9]) == [1, 2, 3]
    assert deal_slots(9, [60, 30], [1, 1], [2, 1]) == [2, 1]
    assert deal_slots(0, [1, 2], [1, 1], [3, 3]) == [0, 0]
    assert deal_slots(3, [], [], []) == []


def test_groups_without_a_slot_have_their_turn_by_volume_and_waiting():
    assert deal_slots(1, [60, 30, 10], [1, 3, 1], [9, 9, 9]) == [0, 1, 0]
    volumes, last, times = [60, 30, 10], [0, 0, 0], Counter()
    longest = [0, 0, 0]
    for turn in range(1, 401):
        dealt = deal_slots(1, volumes, [turn - when for when in last], [9, 9, 9], turn=turn)
        group = dealt.index(1)
        longest[group] = max(longest[group], turn - last[group])
        last[group] = turn
        times[group] += 1
    assert times[0] > times[1] > times[2] > 20
    assert max(longest) <= 12  # a tenth of the data: served about every eighth round


def test_ties_go_in_turn():
    extra = [deal_slots(4, [1, 1, 1], [1, 1, 1], [9, 9, 9], turn=turn).index(2) for turn in range(6)]
    assert extra == [0, 1, 2, 0, 1, 2]
    one = [deal_slots(1, [1, 1, 1], [1, 1, 1], [9, 9, 9], turn=turn).index(1) for turn in range(6)]
    assert one == [0, 1, 2, 0, 1, 2]


@given(
    slots=st.integers(0, 30),
    groups=st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 50), st.integers(1, 9)), max_size=12),
    turn=st.integers(0, 50),
)
def test_slots_are_all_dealt(slots, groups, turn):
    volumes, waits, room = ([group[i] for group in groups] for i in range(3))
    dealt = deal_slots(slots, volumes, waits, room, turn=turn)
    assert sum(dealt) == min(slots, sum(room))
    assert all(0 <= number <= most for number, most in zip(dealt, room, strict=True))
    assert slots < len(groups) or all(dealt)


def test_draws_follow_their_weights():
    weights = np.array([1.0, 2.0, 7.0, 0.0])
    counts = np.zeros(4)
    for seed in range(2000):
        counts[weighted_draw(np.random.default_rng(seed), weights, 1)[0]] += 1
    # 200, 400, 1400, 0 expected; sd at most 21
    assert counts == pytest.approx([200, 400, 1400, 0], abs=85)
    assert sorted(weighted_draw(np.random.default_rng(0), weights, 9)) == [0, 1, 2, 3]
    assert weighted_draw(np.random.default_rng(0), weights, 4)[-1] == 3
    assert len(weighted_draw(np.random.default_rng(0), weights, -1)) == 0


def test_slow_devices_are_worth_less():
    assert speed_factor(np.array([1.0, 4.0, 8.0]), 4.0, 2.0).tolist() == [1.0, 1.0, 0.25]
    assert speed_factor(np.array([1.0, 4.0, 8.0]), 4.0, 0.0).tolist() == [1.0, 1.0, 1.0]


# --- utility inside a community


def test_without_any_ingredient_devices_with_most_samples_are_taken():
    samples = [10, 50, 20, 50, 40]
    assert choose(make(**ALONE), samples, count=3) == [1, 3, 4]
    assert choose(make(**ALONE), samples, count=3, candidates=[0, 2, 4]) == [0, 2, 4]
    assert choose(make(**ALONE), samples, count=9) == [0, 1, 2, 3, 4]


def test_utility_by_hand():
    samples, seconds, squared = [10, 10, 30, 20], [1.0, 2.0, 4.0, 3.0], [16.0, 9.0, 1.0, 4.0]
    selector = make(preferred_percentile=50.0, speed_exponent=2.0, **{**ALONE, "loss_utility": True})
    selector.prepare(situation(samples, seconds))
    selector.learn(probes(range(4), squared_loss=squared))
    assert selector._utilities(range(4)).tolist() == [40, 30, 30, 40]
    selector.select_config = replace(selector.select_config, speed_utility=True)
    # T is the median, 2.5: factors 1, 1, (2.5/4)^2, (2.5/3)^2
    assert selector._utilities(range(4)) == pytest.approx([40, 30, 30 * 0.390625, 40 * 0.694444], rel=1e-5)
    selector.select_config = replace(selector.select_config, loss_utility=False)
    assert selector._utilities(range(4)) == pytest.approx([10, 10, 30 * 0.390625, 20 * 0.694444], rel=1e-5)
    # of the candidates alone: T is now 3.5
    assert selector._utilities([2, 3]) == pytest.approx([30 * (3.5 / 4) ** 2, 20])


def test_a_device_whose_loss_is_unknown_counts_as_the_worst_served():
    selector = make(**{**ALONE, "loss_utility": True})
    samples = [10, 10, 10]
    assert choose(selector, samples, count=1) == [0]
    selector.observe([DeviceReport(0, 10, loss=1.0, squared_loss=4.0)])
    assert selector._utilities([0, 1, 2]).tolist() == [20, 20, 20]
    choose(selector, samples, count=1, round_number=2)
    selector.observe([DeviceReport(1, 10, loss=0.1, squared_loss=0.01)])
    assert selector._utilities([0, 1, 2]) == pytest.approx([20, 1, 20])
    selector.observe([DeviceReport(0, 10, loss=0.1, squared_loss=0.0001)])
    assert selector._utilities([0, 1, 2]) == pytest.approx([0.1, 1, 1])


def test_reports_say_more_than_older_probes_and_probes_more_than_older_reports():
    selector = make(**{**ALONE, "loss_utility": True})
    selector.prepare(situation([10, 10]))
    selector.learn(probes([0, 1], squared_loss=[4.0, 9.0]))
    selector.observe([DeviceReport(1, 10, loss=1.0, squared_loss=1.0)])
    assert selector._utilities([0, 1]).tolist() == [20, 10]
    selector.learn(probes([0, 1], squared_loss=[1.0, 16.0]))
    assert selector._utilities([0, 1]).tolist() == [10, 40]


def test_devices_that_failed_or_miss_the_deadline_come_last():
    options = {**ALONE, "speed_utility": True}
    selector = make(train={"deadline_s": 5.0}, **options)
    samples, seconds = [10, 20, 30, 40, 50], [1.0, 1.0, 1.0, 1.0, 9.0]
    assert choose(selector, samples, seconds=seconds, count=2) == [2, 3]
    selector.observe([DeviceReport(3, 40, failed="diverged"), DeviceReport(2, 30, failed="late", left_out=True)])
    assert choose(selector, samples, seconds=seconds, count=2, round_number=2) == [1, 2]
    assert choose(selector, samples, seconds=seconds, count=4, round_number=3) == [0, 1, 2, 3]
    # the next stage is another task
    assert choose(selector, samples, seconds=seconds, count=2, round_number=4, stage=1, stage_round=1) == [2, 3]
    late = make(train={"deadline_s": 5.0}, **{**options, "speed_utility": False})
    assert choose(late, samples, seconds=seconds, count=2) == [3, 4]


# --- exploration


def test_exploration_takes_its_share_among_those_that_never_trained():
    samples = [100 - device for device in range(40)]
    selector = make(10, **{**ALONE, "exploration": 0.3})
    best, seen = set(range(7)), set()
    for round_number in range(1, 8):
        chosen = set(choose(selector, samples, count=10, round_number=round_number))
        untried = set(range(40)) - seen
        assert best <= chosen
        if round_number > 1:
            explored = chosen - best
            assert len(explored & untried) == 3
        seen |= chosen
    assert len(seen) == 7 + 7 * 3


def test_a_fraction_of_a_slot_explores_by_chance():
    samples = [1000 - device for device in range(1000)]
    selector = make(1, **{**ALONE, "exploration": 0.25})
    explored = 0
    for round_number in range(1, 401):
        explored += choose(selector, samples, count=1, round_number=round_number) != [0]
    assert explored == pytest.approx(100, abs=30)  # sd 8.7


def test_without_exploration_nothing_is_drawn():
    def log(seed):
        selector = make(4, seed=seed, **ALONE)
        return [choose(selector, [5, 9, 7, 8, 6, 4], count=3, round_number=n) for n in range(1, 6)]

    assert log(0) == log(1) == [[1, 2, 3]] * 5


def test_when_all_have_trained_the_slots_go_by_utility():
    selector = make(2, **{**ALONE, "exploration": 1.0})
    samples = [10, 20, 30, 40]
    seen = {d for n in (1, 2) for d in choose(selector, samples, count=2, round_number=n)}
    assert seen == {0, 1, 2, 3}
    assert choose(selector, samples, count=2, round_number=3) == [2, 3]


# --- communities


def in_communities(selector, communities: list[list[list[int]]]):
    selector._adopt(communities)
    return selector


def test_planted_groups_are_all_covered_in_every_round():
    signatures, group = planted(100, 10)
    selector = make(10)
    samples = np.random.default_rng(0).integers(20, 200, 100)
    seconds = np.random.default_rng(1).uniform(1, 50, 100)
    times: Counter[int] = Counter()
    for round_number in range(1, 21):
        selector.prepare(situation(samples, seconds, round_number=round_number))
        request = selector.wanted(range(100), 10)
        assert (request is not None) == (round_number == 1)
        if request is not None:
            selector.learn(probes(request.devices, signatures, np.ones(100)))
        chosen = selector.select(round_number, range(100), 10)
        assert sorted(group[chosen]) == list(range(10))
        times.update(chosen)
        selector.observe([DeviceReport(d, int(samples[d]), loss=1.0, squared_loss=1.0) for d in chosen])
    assert len(times) > 30  # exploration: not the same device of each group


def test_more_groups_than_participants_have_their_turns():
    signatures, group = planted(100, 10)
    selector = make(4, exploration=0.0)
    samples = np.full(100, 50)
    selector.prepare(situation(samples))
    selector.learn(probes(range(100), signatures))
    served = [set(group[choose(selector, samples, count=4, round_number=n)].tolist()) for n in range(1, 16)]
    assert all(len(groups) == 4 for groups in served)
    for begin in range(13):
        assert set().union(*served[begin : begin + 3]) == set(range(10))  # 12 slots in three rounds


def test_slots_go_by_volume_or_evenly():
    communities = [[list(range(0, 10))], [list(range(10, 20))]]
    samples = [30] * 10 + [10] * 10
    by_volume = in_communities(make(8, exploration=0.0), communities)
    assert Counter(d // 10 for d in choose(by_volume, samples, count=8)) == {0: 6, 1: 2}
    evenly = in_communities(make(8, exploration=0.0, slots_by_volume=False), communities)
    assert Counter(d // 10 for d in choose(evenly, samples, count=8)) == {0: 4, 1: 4}
    off = make(8, exploration=0.0, communities=False)
    assert Counter(d // 10 for d in choose(off, samples, count=8)) == {0: 8}


def test_parts_of_a_community_take_turns():
    parts = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    selector = in_communities(make(2, exploration=0.0), [parts, [[9, 10]]])
    samples = [10] * 11
    part = [[d // 3 for d in choose(selector, samples, count=2, round_number=n) if d < 9] for n in range(1, 10)]
    assert all(len(one) == 1 for one in part), "one slot of two for each community"
    assert all({*part[n], *part[n + 1], *part[n + 2]} == {0, 1, 2} for n in range(7))


def test_a_community_that_cannot_come_leaves_its_slots_to_others():
    selector = in_communities(make(4, exploration=0.0), [[[0, 1]], [[2, 3]], [[4, 5, 6]]])
    assert choose(selector, [10] * 7, count=4, candidates=[0, 1, 4, 5, 6]) == [0, 1, 4, 5]


def test_devices_without_a_signature_are_a_community_of_their_own():
    selector = in_communities(make(3, exploration=0.0), [[[0, 1]], [[2, 3]]])
    assert selector._place(5) == UNKNOWN
    chosen = choose(selector, [90, 90, 90, 90, 10, 20], count=3)
    assert len({selector._place(device)[0] for device in chosen}) == 3
    assert 5 in chosen


def test_a_device_that_does_not_answer_goes_with_its_company():
    selector = in_communities(make(2), [[[0, 1, 2, 3]], [[4, 5], [6]], [[7]]])
    selector.asked = set(range(8))
    selector._adopt([[[0, 1], [2]], [[4, 6], [5]]])
    assert selector._place(3) == (0, 0), "three of its company are there, two in that part"
    assert selector._place(7) == UNKNOWN, "nobody that it was with answered"
    assert selector.communities == [[[0, 1, 3], [2]], [[4, 6], [5]]]
    selector._adopt([[[0, 1, 2, 3]]])
    assert [selector._place(device) for device in (4, 5, 6)] == [UNKNOWN] * 3


# --- when devices are asked


def asked_in(selector, stage_rounds, *, stage: int = 0, answer: bool = True) -> list[int]:
    """Return the rounds of a stage in which devices are asked."""
    asked = []
    for stage_round in stage_rounds:
        selector.prepare(
            situation([10] * 6, round_number=100 * stage + stage_round, stage=stage, stage_round=stage_round)
        )
        request = selector.wanted([0, 2, 3], 2)
        if request is not None:
            assert (request.devices, request.signature_size) == ([0, 2, 3], 512)
            asked.append(stage_round)
            selector.learn(probes([0, 2, 3] if answer else []))
    return asked


def test_devices_are_asked_when_a_stage_starts_and_from_time_to_time():
    selector = make(refresh_rounds=4)
    assert asked_in(selector, range(1, 12)) == [1, 5, 9]
    assert asked_in(selector, range(1, 7), stage=1) == [1, 5]
    assert asked_in(make(refresh_rounds=None), range(1, 60)) == [1]
    assert asked_in(make(), range(1, 60)) == [1, 26, 51]
    assert asked_in(make(loss_utility=False), range(1, 3)) == [1]


def test_without_communities_nobody_is_asked():
    assert asked_in(make(communities=False), range(1, 40)) == []


def test_as_long_as_nobody_answers_it_asks_again():
    selector = make()
    assert asked_in(selector, range(1, 4), answer=False) == [1, 2, 3]
    assert asked_in(selector, range(4, 8)) == [4]


@given(devices=st.integers(1, 60), most=st.integers(2, 70), placed=st.sets(st.integers(0, 59)), seed=st.integers(0, 99))
def test_so_many_are_asked_half_of_them_new(devices, most, placed, seed):
    selector = in_communities(
        make(2, seed=seed, signature_devices=most, neighbours=1), [[sorted(placed)]] if placed else []
    )
    selector.prepare(situation([10] * devices, round_number=5))
    asked = selector.wanted(range(devices), 2).devices
    assert asked == sorted(set(asked))
    assert len(asked) == min(most, devices)
    known = [device for device in range(devices) if device in placed]
    of_known = len(set(asked) & set(known))
    # half and half, but where one kind is short
    assert of_known == min(len(known), max(most // 2, most - (devices - len(known))))
    assert selector.wanted(range(devices), 2).devices == asked


def test_who_was_asked_once_stays_with_its_company_and_the_unknown_become_fewer():
    signatures, group = planted(300, 3)
    selector = make(6, signature_devices=100, refresh_rounds=1)
    unknown = []
    for round_number in range(1, 6):
        selector.prepare(situation([10] * 300, round_number=round_number))
        asked = selector.wanted(range(300), 6).devices
        assert len(asked) == 100
        selector.learn(probes(asked, signatures[asked]))
        unknown.append(sum(selector._place(device) == UNKNOWN for device in range(300)))
        for members in ([device for part in parts for device in part] for parts in selector.communities):
            assert len(set(group[members])) == 1, "planted groups, also of those that were not asked this time"
        chosen = selector.select(round_number, range(300), 6)
        if unknown[-1]:
            assert any(selector._place(device) == UNKNOWN for device in chosen)
    assert unknown == [200, 150, 100, 50, 0]


def test_of_every_community_some_are_asked_and_none_is_forgotten():
    """Drawn alike, a community without one in the draw was forgotten, and few devices ever had one."""
    signatures, group = planted(200, 10)
    selector = make(10, signature_devices=60, refresh_rounds=1, neighbours=3)
    known = []
    for round_number in range(1, 12):
        selector.prepare(situation([10] * 200, round_number=round_number))
        asked = selector.wanted(range(200), 10).devices
        assert {selector.place[device][0] for device in asked if device in selector.place} == set(
            range(len(selector.communities))
        )
        selector.learn(probes(asked, signatures[asked]))
        known.append(len(selector.place))
        for members in ([device for part in parts for device in part] for parts in selector.communities):
            assert len(set(group[members])) == 1
    assert known == sorted(known)
    assert known[-1] == 200


def test_a_community_of_which_nobody_was_asked_stays_and_one_that_does_not_answer_goes():
    selector = in_communities(make(), [[[0, 1]], [[2, 3]], [[4]]])
    selector.asked = {0, 2}
    selector._adopt([[[0]]])
    assert selector.communities == [[[0, 1]], [[4]]]
    assert set(selector.place) == {0, 1, 4}


@pytest.mark.parametrize(("asked", "neighbours"), [(10, 10), (1, 1), (3, 1000)])
def test_too_few_to_tell_them_apart_are_refused(asked, neighbours):
    with pytest.raises(ConfigError, match=rf"select\.signature_devices: {asked} devices, each of them alike to "):
        make(signature_devices=asked, neighbours=neighbours)


def test_fewer_candidates_than_the_limit_are_all_asked():
    assert asked_in(make(signature_devices=3, neighbours=2), range(1, 3)) == [1]


def test_devices_without_data_are_not_asked():
    selector = make()
    selector.prepare(situation([0, 5, 1, 7]))
    assert selector.wanted([0, 1, 2, 3], 2).devices == [1, 3]


def test_answers_that_are_no_numbers_are_none():
    selector = make()
    selector.prepare(situation([10] * 4))
    signatures = np.eye(4, 8, dtype=np.float32)
    signatures[1, 0] = np.nan
    selector.learn(probes(range(4), signatures, [1.0, 1.0, np.inf, 4.0]))
    assert set(selector.place) == {0, 3}
    assert selector.squared_loss == {0: 1.0, 3: 4.0}


def test_a_resumed_run_does_not_ask_again():
    selector = make(refresh_rounds=4)
    assert asked_in(selector, range(1, 3)) == [1]
    again = make(refresh_rounds=4)
    again.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    assert asked_in(again, range(3, 7)) == [5]
