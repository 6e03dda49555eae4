"""The messages of a round survive JSON, and a plan tells each rank its devices."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.messages import AskedGroup, Assignment, DeviceReport, LeftOut, ProbePlan, RoundPlan, Verdict

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ASSIGNMENTS = st.lists(
    st.builds(
        Assignment, st.integers(0, 10**6), st.integers(0, 7), st.none() | st.integers(1, 2**45), st.integers(0, 4)
    ),
    max_size=6,
).map(tuple)
PLANS = st.builds(
    RoundPlan,
    round=st.integers(1, 10**6),
    stage=st.integers(0, 9),
    stage_round=st.integers(1, 10**6),
    assignments=ASSIGNMENTS,
    learning_rate=FINITE,
    fraction_bits=st.integers(0, 51),
    left_out=st.lists(
        st.builds(LeftOut, st.integers(0, 10**6), st.integers(0, 99), st.none() | st.integers(1, 2**45), st.text()),
        max_size=3,
    ).map(tuple),
)


def small_plan() -> RoundPlan:
    assignments = (Assignment(2, 0, 100), Assignment(5, 1, None), Assignment(9, 0, 300))
    return RoundPlan(round=7, stage=1, stage_round=3, assignments=assignments, learning_rate=0.05, fraction_bits=39)


@given(PLANS)
@settings(max_examples=50, deadline=None)
def test_a_plan_survives_json(plan):
    again = RoundPlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert again == plan
    assert hash(again) == hash(plan)  # tuples all the way down, not lists


@given(PLANS)
@settings(max_examples=50, deadline=None)
def test_every_device_of_a_plan_is_emulated_by_exactly_one_rank(plan):
    emulated = [assignment for rank in range(8) for assignment in plan.devices_of(rank)]
    assert sorted(map(repr, emulated)) == sorted(map(repr, plan.assignments))


@given(st.lists(st.lists(ASSIGNMENTS, max_size=3).map(lambda found: sum(found, ())), max_size=5), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_plan_of_questions_survives_json(groups, size):
    asked = tuple(
        AskedGroup(rank, tuple(a.device for a in group), tuple(a.cap_bytes for a in group))
        for rank, group in enumerate(groups)
    )
    plan = ProbePlan(3, 1, asked, size)
    assert plan.devices == [assignment.device for group in groups for assignment in group]
    assert ProbePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_devices_of_one_level_come_together():
    assignments = (Assignment(2, 0, 9, 1), Assignment(5, 0, 5, 0), Assignment(9, 0, 9, 1), Assignment(11, 0, 5, 0))
    plan = replace(small_plan(), assignments=assignments)
    assert [assignment.device for assignment in plan.devices_of(0)] == [5, 11, 2, 9]


def test_a_rank_gets_its_devices_in_the_order_of_the_plan():
    plan = small_plan()
    assert [assignment.device for assignment in plan.devices_of(0)] == [2, 9]
    assert [assignment.device for assignment in plan.devices_of(1)] == [5]
    assert plan.devices_of(2) == []


def test_the_json_of_a_plan():
    assert small_plan().to_json() == {
        "round": 7,
        "stage": 1,
        "stage_round": 3,
        "assignments": (
            {"device": 2, "rank": 0, "cap_bytes": 100, "level": 0, "way": "whole", "stores": False},
            {"device": 5, "rank": 1, "cap_bytes": None, "level": 0, "way": "whole", "stores": False},
            {"device": 9, "rank": 0, "cap_bytes": 300, "level": 0, "way": "whole", "stores": False},
        ),
        "learning_rate": 0.05,
        "fraction_bits": 39,
        "left_out": (),
    }


def test_a_plan_with_a_field_too_few_or_too_many_is_no_plan():
    values = small_plan().to_json()
    with pytest.raises(TypeError):
        RoundPlan.from_json(values | {"more": 1})
    del values["stage"]
    with pytest.raises(TypeError):
        RoundPlan.from_json(values)


def test_from_json_leaves_what_it_was_given_as_it_was():
    values = json.loads(json.dumps(small_plan().to_json()))
    before = json.dumps(values)
    RoundPlan.from_json(values)
    assert json.dumps(values) == before


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        small_plan().stage = 2


@given(
    st.builds(
        DeviceReport,
        device=st.integers(0, 10**6),
        samples=st.integers(0, 10**6),
        failed=st.none() | st.text(max_size=10),
        out_of_memory=st.booleans(),
        loss=st.none() | FINITE,
        steps=st.integers(0, 10**6),
        peak_bytes=st.integers(0, 2**45),
        tensor_peak_bytes=st.integers(0, 2**45),
    )
)
@settings(max_examples=50, deadline=None)
def test_a_report_survives_json(report):
    assert DeviceReport(**json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_a_report_is_of_a_device_that_completed_unless_it_says_otherwise():
    assert DeviceReport(3, 40).to_json() == {
        "device": 3,
        "samples": 40,
        "failed": None,
        "out_of_memory": False,
        "left_out": False,
        "loss": None,
        "squared_loss": None,
        "steps": 0,
        "peak_bytes": 0,
        "tensor_peak_bytes": 0,
        "large_statistics": False,
    }


def test_a_verdict_survives_json():
    verdict = Verdict("converged", False, True, False, True, 0.31, -0.002)
    values = json.loads(json.dumps(verdict.to_json()))
    assert values == {
        "end_stage": "converged",
        "stop": False,
        "evaluate": True,
        "evaluate_sampled": False,
        "checkpoint": True,
        "perturbation": 0.31,
        "slope": -0.002,
        "sparse": False,
    }
    assert Verdict(**values) == verdict
