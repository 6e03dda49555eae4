"""The sum of updates: the same bits in any order, no overflow, its stated resolution, and weights per element."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.methods.aggregate import STATISTICS_LIMIT, UPDATE_LIMIT, UpdateSum, first_unusable, fraction_bits

WITHIN_LIMIT = st.floats(-UPDATE_LIMIT, UPDATE_LIMIT, width=32)
ELEMENTS = 4
DEVICES = st.lists(
    st.tuples(st.lists(WITHIN_LIMIT, min_size=ELEMENTS, max_size=ELEMENTS), st.integers(0, 5000)),
    min_size=1,
    max_size=8,
)


def sum_of(devices, bits: int, **options) -> UpdateSum:
    total = UpdateSum(ELEMENTS, bits, **options)
    for update, weight, *index in devices:
        total.add(torch.tensor(update), weight, *index)
    return total


@pytest.mark.parametrize(("weights", "bits"), [(5000, 39), (1, 51), (0, 51), (2, 50), (3, 50), (4, 49), (10**6, 32)])
def test_bits_after_the_point(weights, bits):
    assert fraction_bits(weights) == bits


@given(st.integers(1, 2**40))
@settings(max_examples=50, deadline=None)
def test_the_largest_sum_fits_63_bits(weight_sum):
    assert UPDATE_LIMIT * 2 ** fraction_bits(weight_sum) * weight_sum < 2**63


@given(st.lists(st.integers(1, 2**24), min_size=1, max_size=12), st.sampled_from([UPDATE_LIMIT, -UPDATE_LIMIT]))
@settings(max_examples=50, deadline=None)
def test_updates_at_the_limit_do_not_overflow(weights, value):
    bits = fraction_bits(sum(weights))
    total = sum_of([([value] * ELEMENTS, weight) for weight in weights], bits)
    assert total.total.tolist() == [int(value) * 2**bits * sum(weights)] * ELEMENTS
    assert total.mean(sum(weights)).tolist() == [value] * ELEMENTS


def test_a_sum_of_weights_that_float32_cannot_hold_is_divided_by_as_it_is():
    weights = 2**24 + 3
    total = sum_of([([1.0, 1024.0, -1.0, 0.0], weights)], fraction_bits(weights))
    assert total.mean(weights).tolist() == [1.0, 1024.0, -1.0, 0.0]


@given(DEVICES, st.randoms(use_true_random=False), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_any_order_and_any_split_over_ranks_gives_the_same_bits(devices, random, ranks):
    weight_sum = sum(weight for _, weight in devices)
    bits = fraction_bits(weight_sum)
    once = sum_of(devices, bits)
    shuffled = random.sample(devices, len(devices))
    shares = [[] for _ in range(ranks)]
    for device in shuffled:
        random.choice(shares).append(device)
    parts = [sum_of(share, bits) for share in shares]
    together = parts[0]
    for part in parts[1:]:
        for mine, theirs in zip(together.tensors(), part.tensors(), strict=True):
            mine += theirs
    assert torch.equal(together.total, once.total)
    assert torch.equal(together.mean(weight_sum), once.mean(weight_sum))


def test_an_order_that_changes_a_float32_sum_does_not_change_the_exact_one():
    devices = [([1000.0] * ELEMENTS, 1), ([1e-5] * ELEMENTS, 1), ([-1000.0] * ELEMENTS, 1)]
    orders = list(itertools.permutations(devices))
    bits = fraction_bits(3)
    assert len({tuple(sum_of(order, bits, exact=False).mean(3).tolist()) for order in orders}) > 1
    exact = {tuple(sum_of(order, bits).mean(3).tolist()) for order in orders}
    assert len(exact) == 1
    assert exact.pop()[0] == pytest.approx(1e-5 / 3, rel=1e-6)


@given(DEVICES)
@settings(max_examples=100, deadline=None)
def test_the_mean_is_within_its_resolution_of_the_true_one(devices):
    weight_sum = sum(weight for _, weight in devices)
    bits = fraction_bits(weight_sum)
    summed = sum_of(devices, bits)
    mean = summed.mean(weight_sum).tolist()
    for element in range(ELEMENTS):
        exact = sum(Fraction(update[element]) * weight for update, weight in devices)
        # rounded, not cut off: half a unit of the last bit for each sample
        assert abs(Fraction(summed.total[element].item(), 2**bits) - exact) <= Fraction(weight_sum, 2 ** (bits + 1))
        if weight_sum == 0:
            assert mean[element] == 0
            continue
        true = exact / weight_sum
        # each term is rounded to half a unit of the last bit, and the mean once more to float32
        allowed = Fraction(1, 2 ** (bits + 1)) + abs(true) * Fraction(1, 2**23) + Fraction(1, 2**149)
        assert abs(Fraction(mean[element]) - true) <= allowed


def test_terms_are_rounded_to_the_nearest_unit():
    unit = 2.0**-40
    total = sum_of([([0.75 * unit, -0.75 * unit, 0.25 * unit, 2.75 * unit], 5)], 40)
    assert total.total.tolist() == [5, -5, 0, 15]


def test_a_hand_worked_mean():
    total = sum_of([([1.0, -2.0, 0.5, 0.0], 1), ([3.0, 2.0, 0.5, 0.0], 3)], fraction_bits(4))
    assert total.mean(4).tolist() == [2.5, 1.0, 0.5, 0.0]
    assert total.mean(4).dtype == torch.float32


def test_no_device_at_all_gives_no_update():
    for options in ({}, {"counted": True}, {"exact": False}):
        assert UpdateSum(3, 40, **options).mean(0).tolist() == [0, 0, 0]


def test_a_device_without_samples_changes_nothing():
    alone = sum_of([([1.0, 2.0, 3.0, 4.0], 5)], 40)
    both = sum_of([([1.0, 2.0, 3.0, 4.0], 5), ([9.0] * ELEMENTS, 0)], 40)
    assert torch.equal(alone.mean(5), both.mean(5))


def test_the_update_that_is_added_is_left_as_it_was():
    for exact in (True, False):
        update = torch.tensor([0.1, -0.2, 0.3, 700.0])
        before = update.clone()
        UpdateSum(ELEMENTS, 40, exact=exact).add(update, 7)
        assert torch.equal(update, before)


PARTIAL = st.lists(
    st.tuples(
        st.sets(st.integers(0, ELEMENTS - 1)),
        st.lists(WITHIN_LIMIT, min_size=ELEMENTS, max_size=ELEMENTS),
        st.integers(0, 500),
        st.booleans(),
    ),
    max_size=6,
)


@given(PARTIAL, st.booleans())
@settings(max_examples=100, deadline=None)
def test_partial_updates_equal_a_loop_over_elements(devices, exact):
    bits = fraction_bits(sum(weight for *_, weight, _ in devices))
    total = UpdateSum(ELEMENTS, bits, exact=exact, counted=True)
    sums, weights, sizes = [Fraction(0)] * ELEMENTS, [0] * ELEMENTS, [Fraction(0)] * ELEMENTS
    for places, values, weight, whole in devices:
        places = list(range(ELEMENTS)) if whole else sorted(places)
        values = values[: len(places)]
        index = None if whole else torch.tensor(places, dtype=torch.int64)
        total.add(torch.tensor(values, dtype=torch.float32), weight, index)
        for place, value in zip(places, values, strict=True):
            sums[place] += Fraction(value) * weight
            sizes[place] += abs(Fraction(value)) * weight
            weights[place] += weight
    assert total.count.tolist() == weights
    for place, mean in enumerate(total.mean(0).tolist()):
        if weights[place] == 0:
            assert mean == 0
            continue
        true = sums[place] / weights[place]
        lost = Fraction(1, 2 ** (bits + 1)) if exact else sizes[place] / weights[place] * Fraction(1, 2**20)
        assert abs(Fraction(mean) - true) <= lost + abs(true) * Fraction(1, 2**23) + Fraction(1, 2**140)


def test_a_hand_worked_partial_mean():
    total = UpdateSum(4, 40, counted=True)
    total.add(torch.tensor([1.0, 2.0]), 1, torch.tensor([0, 2]))
    total.add(torch.tensor([4.0, 8.0]), 3, torch.tensor([2, 1]))
    assert total.count.tolist() == [1, 3, 4, 0]
    assert total.mean(4).tolist() == [1.0, 8.0, 3.5, 0.0]


def test_ranks_sum_eight_bytes_an_element_exactly_four_otherwise_and_counts_where_wanted():
    assert [t.dtype for t in UpdateSum(3, 40).tensors()] == [torch.int64]
    assert [t.dtype for t in UpdateSum(3, 40, exact=False).tensors()] == [torch.float32]
    assert [(t.dtype, len(t)) for t in UpdateSum(3, 40, counted=True).tensors()] == [(torch.int64, 3)] * 2


def test_partial_sums_of_ranks_add_up():
    bits = fraction_bits(7)
    first = UpdateSum(2, bits, counted=True)
    first.add(torch.tensor([5.0]), 3, torch.tensor([1]))
    second = UpdateSum(2, bits, counted=True)
    second.add(torch.tensor([1.0, -2.0]), 4)
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        mine += theirs
    assert first.mean(7).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, UPDATE_LIMIT, -UPDATE_LIMIT, 1e-30])
def test_an_update_within_the_limit_is_usable(value):
    assert first_unusable(torch.tensor([0.0, value]), 2) is None


@pytest.mark.parametrize("value", [UPDATE_LIMIT * 1.001, -2048.0, float("inf"), -float("inf"), float("nan")])
def test_an_update_beyond_the_limit_or_no_number_is_not(value):
    assert first_unusable(torch.tensor([0.0, value, value]), 3) == 1
    assert first_unusable(torch.zeros(0), 0) is None


@pytest.mark.parametrize("value", [6e4, -1e9, STATISTICS_LIMIT])
def test_statistics_have_a_range_of_their_own(value):
    assert first_unusable(torch.tensor([0.0, value]), 1) is None
    assert first_unusable(torch.tensor([value, 0.0]), 1) == 0
    assert (
        first_unusable(torch.tensor([0.0, value * 1.001 if abs(value) == STATISTICS_LIMIT else float("nan")]), 1) == 1
    )


LARGE = st.floats(-STATISTICS_LIMIT, STATISTICS_LIMIT, width=32)


@given(
    st.lists(st.tuples(WITHIN_LIMIT, LARGE, LARGE, st.integers(0, 5000)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_large_statistics_are_summed_exactly_in_any_order(devices, random):
    weights = [device[-1] for device in devices]
    bits = fraction_bits(sum(weights))
    sums = []
    for order in (devices, random.sample(devices, len(devices))):
        total = UpdateSum(3, bits, statistics_from=1)
        for *update, weight in order:
            total.add(torch.tensor(update), weight)
        total.make_over()
        sums.append(total)
    assert all(torch.equal(a, b) for a, b in zip(sums[0].tensors(over=True), sums[1].tensors(over=True), strict=True))
    for position in range(3):
        scaled = [round(Fraction(device[position]) * 2**bits) * device[-1] for device in devices]
        over = 0 if position == 0 else int(sums[0].make_over()[position - 1]) * int(UPDATE_LIMIT) * 2**bits
        assert int(sums[0].total[position]) + over == sum(scaled)
    if sum(weights):
        means = [float(sum(Fraction(d[p]) * d[-1] for d in devices) / sum(weights)) for p in range(3)]
        largest = [max(abs(d[p]) for d in devices) for p in range(3)]
        for mean, expected, size in zip(sums[0].mean(sum(weights)).tolist(), means, largest, strict=True):
            assert mean == pytest.approx(expected, rel=1e-6, abs=size * 1e-6 + 2.0**-bits)


def test_large_statistics_of_a_part_land_where_they_belong():
    total = UpdateSum(4, fraction_bits(3), counted=True, statistics_from=2)
    total.add(torch.tensor([1.0, 5e6]), 1, torch.tensor([0, 3]))
    total.add(torch.tensor([3.0, 7e6, 2.0]), 2, torch.tensor([0, 3, 2]))
    assert total.mean(3).tolist() == pytest.approx([7 / 3, 0.0, 2.0, 19e6 / 3])
