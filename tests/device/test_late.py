"""Outcomes that are read late: what they say, in which order, and that waiting hears of losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.device.late import LateReport, Outcome, sum_late, told_later
from fedfreeze.errors import RankLostError
from fedfreeze.messages import DeviceReport
from fedfreeze.methods.aggregate import STATISTICS_LIMIT, UPDATE_LIMIT, UpdateSum, first_unusable, fraction_bits

BITS = fraction_bits(1000)
LOSSES = torch.tensor([3.0, 5.0], dtype=torch.float64)


def outcome_of(change: list[float], losses: torch.Tensor = LOSSES, **options) -> tuple[Outcome, UpdateSum]:
    update = UpdateSum(len(change), BITS, statistics_from=options.pop("statistics_from", len(change)))
    row = sum_late(update, torch.tensor(change), losses, 7, None, update.statistics_from)
    return Outcome(*row.tolist()), update


def test_a_change_that_can_be_summed_is() -> None:
    outcome, update = outcome_of([1.0, -2.0, 0.5])
    assert outcome[:4] == (3.0, 5.0, 1.0, 0.0)
    assert update.mean(7).tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, UPDATE_LIMIT * 1.001])
def test_one_that_cannot_adds_nothing_and_its_first_element_is_named(bad: float) -> None:
    outcome, update = outcome_of([1.0, bad, 2.0, math.nan])
    assert (outcome.usable, outcome.position) == (0.0, 1.0)
    assert outcome.value == pytest.approx(bad, nan_ok=True)
    assert update.total.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_adds_nothing(loss: float) -> None:
    outcome, update = outcome_of([1.0], torch.tensor([loss, 1.0], dtype=torch.float64))
    assert outcome.usable == 0.0
    assert update.total.tolist() == [0]


NUMBERS = st.one_of(
    st.floats(-UPDATE_LIMIT, UPDATE_LIMIT, width=32),
    st.sampled_from([UPDATE_LIMIT, -UPDATE_LIMIT, 3000.5, -(2.0**39), STATISTICS_LIMIT, 2.0**41, math.nan, math.inf]),
)


@given(
    st.lists(
        st.tuples(st.lists(NUMBERS, min_size=6, max_size=6), st.permutations(range(6)), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_sums_are_those_of_the_cpus_way(devices, counted, exact) -> None:
    """Bit for bit, with statistics beyond the limit, elements that are the device's alone, and devices that diverge."""
    usual = UpdateSum(6, BITS, exact=exact, counted=counted, statistics_from=3)
    late = UpdateSum(6, BITS, exact=exact, counted=counted, statistics_from=3)
    for values, places, sent in devices:
        change, index = torch.tensor(values), torch.tensor(places) if counted else None
        statistics_from = 3
        if index is not None:
            change = change[:sent]
            index = index[:sent]
            index = torch.where(torch.arange(sent) % 3 == 2, -1, index)
            statistics_from = sent  # of a sub-model
        row = sum_late(late, change, LOSSES, 5, index, statistics_from)
        outcome = Outcome(*row.tolist())
        change = change.clone()
        if index is not None:
            change[index < 0] = 0.0
        beyond = first_unusable(change, statistics_from)
        assert bool(outcome.usable) is (beyond is None)
        if beyond is None:
            if index is not None:
                change, index = change[index >= 0], index[index >= 0]
            assert bool(outcome.large) is usual.add(change, 5, index)
        else:
            assert outcome.position == beyond
            assert outcome.value == pytest.approx(float(change[beyond]), nan_ok=True)
    assert torch.equal(late.total, usual.total)
    if counted:
        assert torch.equal(late.count, usual.count)
    if exact:
        assert torch.equal(late.make_over(), usual.make_over())
    assert torch.equal(late.mean(20), usual.mean(20))


def test_a_report_is_made_when_the_gpu_has_come_so_far() -> None:
    row = torch.zeros(6, dtype=torch.float64)
    asked: list[int] = []

    def ready() -> bool:
        row[0] = 4.0  # what comes while we wait
        asked.append(1)
        return len(asked) > 3

    late = LateReport(row, ready, lambda outcome: DeviceReport(1, 2, loss=outcome.loss_sum))
    checks: list[int] = []
    assert late.report(lambda: checks.append(1)).loss == 4.0
    assert len(checks) == 3


def test_while_waiting_a_loss_is_heard() -> None:
    def lost() -> None:
        raise RankLostError("rank 1 has died")

    late = LateReport(torch.zeros(6), lambda: False, lambda outcome: DeviceReport(1, 2))
    with pytest.raises(RankLostError):
        late.report(lost)


def test_on_a_cpu_there_is_nothing_to_wait_for() -> None:
    late = told_later(torch.arange(6.0, dtype=torch.float64), lambda outcome: DeviceReport(1, 2, loss=outcome.value))
    assert late.ready()
    assert late.report(lambda: None).loss == 5.0
