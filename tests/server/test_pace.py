"""The pace controller: the value of block perturbation, and sequences that must and must not freeze."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedfreeze.config.schema import PaceConfig
from fedfreeze.server import pace
from fedfreeze.server.pace import (
    POLICIES,
    PaceDecision,
    PerturbationWindow,
    StageRound,
    block_perturbation,
    slope_per_round,
)

UPDATES = st.tuples(st.integers(1, 6), st.integers(1, 20)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))
)


# --- block perturbation


@given(UPDATES)
@settings(max_examples=200, deadline=None)
def test_perturbation_lies_between_0_and_1(updates):
    assert 0 <= block_perturbation(list(updates)) <= 1


@given(UPDATES)
@settings(max_examples=100, deadline=None)
def test_updates_that_all_point_one_way_give_1(updates):
    signs = np.where(np.arange(updates.shape[1]) % 2, -1, 1).astype(np.float32)
    one_way = np.abs(updates) * signs
    assume(one_way.any())
    assert block_perturbation(list(one_way)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("updates", "value"),
    [
        ([[1, -2], [3, 2]], 0.5),  # |4| + |0| of 1 + 3 + 2 + 2
        ([[1, 1], [-1, -1]], 0.0),
        ([[1, 0, 0], [0, -1, 0], [0, 0, 1]], 1.0),
        ([[3, 1], [-1, 1], [-1, -1]], 0.25),  # |1| + |1| of 5 + 3
        ([[5]], 1.0),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_perturbation_of_small_examples(updates, value):
    assert block_perturbation([np.array(update, np.float32) for update in updates]) == value


@pytest.mark.parametrize("window", [4, 10, 25])
def test_unrelated_zero_mean_updates_give_one_over_the_root_of_the_window(window):
    updates = np.random.default_rng(0).standard_normal((window, 50_000)).astype(np.float32)
    assert block_perturbation(list(updates)) == pytest.approx(1 / math.sqrt(window), rel=0.01)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 30)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.integers(-100, 100))
    ),
    st.integers(1, 31),
)
@settings(max_examples=60, deadline=None)
def test_chunks_do_not_change_the_value(updates, chunk):
    # whole numbers: every sum is exact, so the values must be equal and not only close
    with pytest.MonkeyPatch.context() as patch:
        whole = block_perturbation(list(updates))
        patch.setattr(pace, "_CHUNK_ELEMENTS", chunk)
        assert block_perturbation(list(updates)) == whole


def test_more_elements_than_a_chunk_are_all_counted():
    elements = pace._CHUNK_ELEMENTS + 3
    still, moving = np.zeros(elements, np.float32), np.zeros(elements, np.float32)
    moving[[0, -1]] = 1
    back = np.zeros(elements, np.float32)
    back[0] = -1
    assert block_perturbation([moving, back, still]) == pytest.approx(1 / 3)


@given(UPDATES, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_neither_order_nor_sign_nor_scale_changes_the_value(updates, random):
    value = block_perturbation(list(updates))
    shuffled = random.sample(list(updates), len(updates))
    assert block_perturbation(shuffled) == pytest.approx(value, abs=1e-9)
    assert block_perturbation(list(-updates)) == pytest.approx(value, abs=1e-12)
    assert block_perturbation(list(updates.astype(np.float64) * 64)) == pytest.approx(value, abs=1e-12)


def test_the_window_speaks_when_full_and_forgets_the_oldest():
    window = PerturbationWindow(2)
    assert window.push(1, np.array([1.0], np.float32)) is None
    assert window.push(2, np.array([-1.0], np.float32)) == 0.0
    assert window.push(3, np.array([-3.0], np.float32)) == 1.0
    assert [number for number, _ in window.updates] == [2, 3]
    window.clear()
    assert window.push(4, np.array([1.0], np.float32)) is None


# --- slope


@pytest.mark.parametrize(
    ("values", "slope"),
    [([1, 2, 3], 1), ([5, 5, 5, 5], 0), ([0, 3], 3), ([0, 1, 0], 0), ([2, 0, 1], -0.5), ([1, 0.5, 0.5], -0.25)],
)
def test_slope_of_small_examples(values, slope):
    assert slope_per_round(values) == slope


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_slope_is_the_least_squares_one(values):
    assert slope_per_round(values) == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-9)


# --- policies


def make_policy(name: str, *, total_rounds: int = 1000, parameters=(10, 20, 30), **options):
    return POLICIES[name](PaceConfig(policy=name, **options), total_rounds, list(parameters))


def decide(policy, values, stage: int = 0, first: int = 1) -> list[PaceDecision]:
    """Tell a policy one value a round, as perturbation and as loss, until it freezes."""
    decisions = []
    for number, value in enumerate(values, start=first):
        decisions.append(policy.observe(StageRound(stage, number, value, value)))
        if decisions[-1].freeze:
            break
    return decisions


def frozen_at(policy, values, stage: int = 0) -> tuple[int, str] | None:
    """Return the round in which the block is frozen, and why; None where it is not."""
    decisions = decide(policy, values, stage)
    return (len(decisions), decisions[-1].reason) if decisions[-1].freeze else None


# noise_level / sqrt(window) = 0.375, exactly
LOW = {"window": 16, "noise_level": 1.5}
# noise level of next to nothing: only rho x highest counts
NO_NOISE = {"window": 16, "noise_level": 1e-9}


def test_low_and_flat_for_long_enough_freezes():
    policy = make_policy("perturbation", slope_window=3, checks=2, slope_limit=0.01, relative_level=0.8, **NO_NOISE)
    # rounds 4 and 5 are the first whose last three values are flat
    assert frozen_at(policy, [1.0, 0.5, 0.5, 0.5, 0.5, 0.5]) == (5, "converged")


def test_under_the_noise_level_freezes_though_it_never_fell():
    policy = make_policy("perturbation", slope_window=4, checks=3, slope_limit=0.01, **LOW)
    assert frozen_at(policy, [0.3] * 20) == (6, "converged")


def test_flat_but_as_high_as_ever_does_not_freeze():
    policy = make_policy("perturbation", slope_window=3, checks=1, slope_limit=0.01, **NO_NOISE)
    assert frozen_at(policy, [0.9] * 50) is None


def test_exactly_at_the_noise_level_does_not_freeze_and_just_under_does():
    options = {"slope_window": 2, "checks": 1, "slope_limit": 0.01, **LOW}
    assert frozen_at(make_policy("perturbation", **options), [0.375] * 20) is None
    assert frozen_at(make_policy("perturbation", **options), [0.374] * 20) == (2, "converged")


def test_exactly_at_its_share_of_the_highest_does_not_freeze_and_just_under_does():
    options = {"slope_window": 2, "checks": 1, "slope_limit": 0.01, "relative_level": 0.5, **NO_NOISE}
    assert frozen_at(make_policy("perturbation", **options), [1.0] + [0.5] * 20) is None
    assert frozen_at(make_policy("perturbation", **options), [1.0] + [0.499] * 20) == (3, "converged")


def test_the_highest_of_the_whole_stage_counts_not_of_the_window():
    options = {"slope_window": 2, "checks": 1, "slope_limit": 0.01, "relative_level": 0.8, **NO_NOISE}
    # flat at 0.9 is too high; flat at 0.7 is under 0.8 x 0.9 long after the 0.9s left the window
    assert frozen_at(make_policy("perturbation", **options), [0.9] * 5 + [0.8, 0.74, 0.7, 0.7]) == (9, "converged")
    assert frozen_at(make_policy("perturbation", **options), [0.7] * 9) is None


@pytest.mark.parametrize("step", [0.02, -0.02])
def test_low_but_not_flat_does_not_freeze(step):
    policy = make_policy("perturbation", slope_window=5, checks=1, slope_limit=0.01, **LOW)
    values = [0.2 + step * k for k in range(9)]
    assert all(0 < value < 0.375 for value in values)
    assert frozen_at(policy, values) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_slope_of_exactly_the_limit_is_flat_and_of_more_is_not(sign):
    values = [0.25 + sign * k / 64 for k in range(3)]
    options = {"slope_window": 3, "checks": 1, **LOW}
    assert frozen_at(make_policy("perturbation", slope_limit=1 / 64, **options), values) == (3, "converged")
    assert frozen_at(make_policy("perturbation", slope_limit=1 / 65, **options), values) is None


def test_checks_must_pass_in_a_row():
    policy = make_policy("perturbation", slope_window=2, checks=3, slope_limit=0.01, **LOW)
    # rounds 2 and 3 pass; the blip of round 4 fails rounds 4 and 5; 6, 7 and 8 pass
    assert frozen_at(policy, [0.3, 0.3, 0.3, 0.35, 0.3, 0.3, 0.3, 0.3, 0.3]) == (8, "converged")


def test_a_blip_every_third_round_never_lets_it_freeze():
    policy = make_policy("perturbation", slope_window=2, checks=2, slope_limit=0.01, **LOW)
    assert frozen_at(policy, [0.3, 0.3, 0.35] * 20) is None


def test_no_block_is_frozen_before_min_rounds():
    options = {"slope_window": 2, "checks": 3, "slope_limit": 0.01, **LOW}
    assert frozen_at(make_policy("perturbation", **options), [0.3] * 30) == (4, "converged")
    # checks count from round 10 on
    assert frozen_at(make_policy("perturbation", min_rounds=10, **options), [0.3] * 30) == (12, "converged")
    once = options | {"checks": 1}
    assert frozen_at(make_policy("perturbation", min_rounds=10, **once), [0.3] * 30) == (10, "converged")


def test_rounds_without_perturbation_neither_count_nor_hurt():
    policy = make_policy("perturbation", slope_window=3, checks=2, slope_limit=0.01, **LOW)
    assert frozen_at(policy, [None] * 15 + [0.3] * 10) == (19, "converged")
    assert frozen_at(make_policy("perturbation"), [None] * 50) is None


def test_a_round_without_perturbation_breaks_the_row():
    policy = make_policy("perturbation", slope_window=2, checks=2, slope_limit=0.01, **LOW)
    assert frozen_at(policy, [0.3, 0.3, None, 0.3, 0.3]) == (5, "converged")


def test_a_block_that_never_converges_is_ended_by_max_rounds():
    policy = make_policy("perturbation", max_rounds=7, slope_window=3, **NO_NOISE)
    assert frozen_at(policy, [0.9] * 50) == (7, "round_limit")
    assert frozen_at(make_policy("perturbation", max_rounds=3), [None] * 50) == (3, "round_limit")


def test_converged_in_the_last_round_is_converged():
    policy = make_policy("perturbation", slope_window=2, checks=2, slope_limit=0.01, max_rounds=3, **LOW)
    assert frozen_at(policy, [0.3] * 9) == (3, "converged")


def test_the_slope_that_was_looked_at_is_told():
    policy = make_policy("perturbation", slope_window=3, checks=9, **LOW)
    decisions = decide(policy, [0.5, 0.25, 0.25, 0.25])
    assert [decision.slope for decision in decisions] == [None, None, -0.125, 0]
    assert not any(decision.freeze or decision.reason for decision in decisions)


@pytest.mark.parametrize("how", ["converged", "round_limit"])
def test_a_new_stage_starts_without_the_old_ones_values(how):
    options = {"slope_window": 3, "checks": 1, "slope_limit": 0.01, **NO_NOISE}
    policy = make_policy("perturbation", max_rounds=None if how == "converged" else 4, **options)
    assert frozen_at(policy, [1.0, 0.5, 0.5, 0.5 if how == "converged" else 0.9]) == (4, how)
    # 0.5 was low against the 1.0 of stage 0; in stage 1 it is the highest
    after = decide(policy, [0.5] * 3, stage=1)
    assert [decision.freeze for decision in after] == [False] * 3
    assert [decision.slope for decision in after] == [None, None, 0]


def test_a_loss_that_stands_still_is_a_plateau():
    assert frozen_at(make_policy("plateau", slope_window=4, checks=3), [0.7] * 20) == (6, "converged")


def test_a_loss_that_rises_is_a_plateau():
    assert frozen_at(make_policy("plateau", slope_window=3, checks=1), [0.7, 0.8, 0.9]) == (3, "converged")


def test_a_loss_that_falls_is_none():
    assert frozen_at(make_policy("plateau", slope_window=4, checks=1), [0.95**k for k in range(60)]) is None


def test_the_fall_is_relative_and_over_the_window():
    # 1.00, 0.99, 0.98: a fall of 0.02 of a mean of 0.99, that is 0.0202
    losses = [1.0, 0.99, 0.98]
    for scale in (1, 100):
        scaled = [scale * loss for loss in losses]
        below = make_policy("plateau", slope_window=3, checks=1, improvement=0.0201)
        assert frozen_at(below, scaled) is None
        above = make_policy("plateau", slope_window=3, checks=1, improvement=0.0203)
        assert frozen_at(above, scaled) == (3, "converged")


def test_plateau_knows_patience_min_rounds_max_rounds_and_rounds_without_loss():
    assert frozen_at(make_policy("plateau", slope_window=2, checks=1, min_rounds=9), [1.0] * 20) == (9, "converged")
    assert frozen_at(make_policy("plateau", slope_window=2, max_rounds=5), [0.5**k for k in range(20)]) == (
        5,
        "round_limit",
    )
    assert frozen_at(make_policy("plateau", slope_window=2, checks=2), [1.0, 1.0, None, 1.0, 1.0]) == (5, "converged")


@pytest.mark.parametrize(
    ("name", "total", "parameters", "budgets"),
    [
        ("fixed", 10, [1, 2, 7], [4, 3, 3]),
        ("fixed", 3, [5, 5, 5], [1, 1, 1]),
        ("fixed", 9, [4], [9]),
        # one each, then 7 in shares of 0.7, 1.4 and 4.9: the two left over go to the largest remainders
        ("proportional", 10, [1, 2, 7], [2, 2, 6]),
        ("proportional", 100, [1, 1, 98], [2, 2, 96]),
        ("proportional", 3, [1, 1, 10**9], [1, 1, 1]),
    ],
)
def test_budgets_of_small_examples(name, total, parameters, budgets):
    assert make_policy(name, total_rounds=total, parameters=parameters).budgets() == budgets


@pytest.mark.parametrize("name", ["fixed", "proportional"])
def test_a_budget_is_kept_to_the_round(name):
    policy = make_policy(name, total_rounds=10, parameters=[1, 2, 7])
    for stage, budget in enumerate(policy.budgets()):
        assert frozen_at(policy, [0.5] * 20, stage) == (budget, "fixed")


def test_max_rounds_cuts_a_budget():
    policy = make_policy("fixed", total_rounds=30, max_rounds=4)
    assert frozen_at(policy, [0.5] * 20) == (4, "round_limit")


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=12), st.integers(0, 5000))
@settings(max_examples=200, deadline=None)
def test_shares_sum_to_the_total_with_at_least_one_each(weights, total):
    shares = pace._share_out(total, weights)
    assert len(shares) == len(weights)
    assert sum(shares) == total
    assert min(shares) >= (1 if total >= len(weights) else 0)
    if total >= len(weights):
        free = total - len(weights)
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - 1 - free * weight / sum(weights)) < 1 + 1e-9


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.integers(8, 500))
@settings(max_examples=50, deadline=None)
def test_who_weighs_more_never_gets_less(weights, total):
    pairs = sorted(zip(weights, pace._share_out(total, weights), strict=True))
    assert all(low[1] <= high[1] for low, high in itertools.pairwise(pairs) if low[0] < high[0])


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(
    values=st.lists(st.none() | st.sampled_from([0.3, 0.3, 0.3, 0.31, 0.5, 0.9]), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    checks=st.integers(1, 3),
    max_rounds=st.none() | st.integers(4, 12),
)
@settings(max_examples=40, deadline=None)
def test_a_policy_saved_in_the_middle_of_a_stage_decides_as_if_it_never_was(name, values, cut, checks, max_rounds):
    def fresh():
        return make_policy(
            name, total_rounds=12, slope_window=3, checks=checks, slope_limit=0.02, max_rounds=max_rounds, **LOW
        )

    def run(saved_after: int | None) -> list[PaceDecision]:
        policy, stage, stage_round, decisions = fresh(), 0, 0, []
        for number, value in enumerate(values):
            if number == saved_after:
                state = json.loads(json.dumps(policy.state_dict()))
                policy = fresh()
                policy.load_state_dict(state)
            stage_round += 1
            decisions.append(policy.observe(StageRound(stage, stage_round, value, value)))
            if decisions[-1].freeze:
                stage, stage_round = min(stage + 1, 2), 0
        return decisions

    assert run(cut) == run(None)


@pytest.mark.parametrize("name", ["perturbation", "plateau"])
@pytest.mark.parametrize("cut", range(1, 6))
def test_neither_values_nor_checks_passed_are_lost_between_save_and_load(name, cut):
    options = {"slope_window": 3, "checks": 4, "slope_limit": 0.02, **LOW}
    before, after = make_policy(name, **options), make_policy(name, **options)
    assert not decide(before, [0.3] * cut)[-1].freeze
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    # checks pass in rounds 3, 4, 5 and 6
    rest = decide(after, [0.3] * 9, first=cut + 1)
    assert (cut + len(rest), rest[-1].reason) == (6, "converged")


class Whole(pace.Perturbation):
    """The same, with all of the stage's history."""

    def _forget(self) -> None:
        return


@given(
    values=st.lists(st.none() | st.floats(0.05, 1), min_size=1, max_size=60),
    window=st.integers(2, 6),
    checks=st.integers(1, 4),
    relative_level=st.sampled_from([0.5, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_what_is_forgotten_of_a_stage_is_not_looked_at(values, window, checks, relative_level):
    options = {"slope_window": window, "checks": checks, "relative_level": relative_level, "slope_limit": 0.3}
    forgetful = make_policy("perturbation", noise_level=0.1, **options)
    whole = Whole(forgetful.config, forgetful.total_rounds, forgetful.active_parameters)
    assert decide(forgetful, values) == decide(whole, values)


def test_a_state_of_an_earlier_version_with_all_of_the_history_is_taken():
    values = [1.0, *[0.44] * 50]
    options = {"slope_window": 4, "checks": 3, "relative_level": 0.45, "noise_level": 0.1, "min_rounds": 60}
    before, after = make_policy("perturbation", **options), make_policy("perturbation", **options)
    decide(before, values)
    after.load_state_dict({"history": values, "checks_passed": 0})
    # 0.44 is low beside the 1.0 of the first round alone; 60, 61 and 62 are the checks
    rest = decide(after, [0.44] * 20, first=52)
    assert (51 + len(rest), rest[-1].reason) == (62, "converged")
    assert rest == decide(before, [0.44] * 20, first=52)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_state_does_not_grow_with_the_rounds_of_a_stage(name):
    policy = make_policy(name, total_rounds=10**5, slope_window=5, min_rounds=10**5)
    decide(policy, [0.9, *([0.5] * 20)])
    early = len(json.dumps(policy.state_dict()))
    decide(policy, [0.5] * 2000, first=22)
    assert len(json.dumps(policy.state_dict())) == early


def test_a_saved_state_is_a_copy():
    policy = make_policy("perturbation", slope_window=3)
    decide(policy, [0.9, 0.8])
    state = policy.state_dict()
    decide(policy, [0.7], first=3)
    assert state == {"history": [0.9, 0.8], "checks_passed": 0}
    other = make_policy("perturbation", slope_window=3)
    other.load_state_dict(state)
    decide(other, [0.7], first=3)
    assert state["history"] == [0.9, 0.8]
