"""The coordinator: plans that no world size changes, verdicts, traffic, and a state that goes on where it was."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.file import make_config
from fedfreeze.config.ways import WHOLE
from fedfreeze.device.cost import Costs, StageCost, WayCost
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet
from fedfreeze.messages import DeviceReport
from fedfreeze.methods.aggregate import fraction_bits
from fedfreeze.server.coordinator import Coordinator, train_loss
from fedfreeze.units import MIB


def cost(
    name: str, memory_mib: float, *, trained: int = 10, active: int = 10, frozen: int = 0, batch_norm: bool = False
) -> StageCost:
    return StageCost(
        name=name,
        ways=(WayCost(WHOLE, int(memory_mib * MIB), 100),),
        frozen_flops=0,
        forward_flops=40,
        trained_elements=trained,
        watched_parameters=active,
        frozen_elements=frozen,
        batch_norm=batch_norm,
    )


# the front stage needs most, as in a real network
STAGES = (
    cost("block 1", 8, trained=100, active=60, frozen=0),
    cost("block 2", 4, trained=70, active=50, frozen=60),
    cost("block 3", 2, trained=40, active=30, frozen=110),
)
CAPS = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12)


def coordinator(values: dict | None = None, *, caps=CAPS, samples=None, stages=STAGES, **options):
    values = dict(values or {})
    values["fleet"] = {"devices": len(caps)}
    values["train"] = {"participants": min(3, len(caps)), "rounds": 30} | values.get("train", {})
    fleet = Fleet(tuple(None if cap is None else int(cap * MIB) for cap in caps))
    samples = samples if samples is not None else [10 * (device + 1) for device in range(len(caps))]
    return Coordinator(make_config(values), fleet, samples, costs_of(stages), **options)


def costs_of(stages) -> Costs:
    return Costs(tuple((stage,) for stage in stages), cost("full", 16))


def planned(mind):
    """Begin a round and plan it."""
    mind.begin_round()
    return mind.plan_round()


def traffic(mind, reports) -> tuple[int, int]:
    """Bytes up and down that a round of these devices is charged."""
    mind.clock.wait_for([0])
    mind.clock.end_round(reports)
    return mind.clock.bytes_up, mind.clock.bytes_down


def completed(plan, mind, loss: float = 1.0) -> list[DeviceReport]:
    return [DeviceReport(a.device, mind.samples[a.device], loss=loss, peak_bytes=1000) for a in plan.assignments]


# --- who is planned


def test_who_can_join_follows_from_caps():
    mind = coordinator()
    assert mind.eligible == [[6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def test_only_devices_that_hold_the_stage_are_planned():
    mind = coordinator({"train": {"participants": 2}})
    seen = [set(), set(), set()]
    for stage in range(3):
        for _ in range(40):
            seen[stage] |= {assignment.device for assignment in planned(mind).assignments}
        if stage < 2:
            mind.advance()
    # 40 draws of 2: every device that may come does come
    assert [sorted(devices) for devices in seen] == coordinator().eligible


def test_where_fewer_can_join_all_of_them_do():
    mind = coordinator({"train": {"participants": 6}})
    assert [assignment.device for assignment in planned(mind).assignments] == [6, 7, 8, 9]


def test_selection_is_even_and_without_repeats():
    mind = coordinator({"train": {"participants": 3, "rounds": 10**6}}, caps=[10] * 8)
    counts = [0] * 8
    for _ in range(400):
        devices = [assignment.device for assignment in planned(mind).assignments]
        assert len(devices) == len(set(devices)) == 3
        for device in devices:
            counts[device] += 1
    # 150 expected, sd 9.7
    assert min(counts) > 105
    assert max(counts) < 195


def test_the_seed_decides_who_is_selected():
    def devices(seed):
        mind = coordinator({"seed": seed, "train": {"rounds": 50}}, caps=[10] * 20)
        return [[a.device for a in planned(mind).assignments] for _ in range(20)]

    assert devices(1) == devices(1)
    assert devices(1) != devices(2)
    assert len({tuple(selected) for selected in devices(1)}) > 10


def test_rounds_and_stage_rounds_are_counted_from_one():
    mind = coordinator()
    plans = [planned(mind), planned(mind)]
    mind.advance()
    plans.append(planned(mind))
    assert [(plan.round, plan.stage, plan.stage_round) for plan in plans] == [(1, 0, 1), (2, 0, 2), (3, 1, 1)]


def test_an_assignment_carries_the_devices_cap():
    mind = coordinator()
    assert {a.device: a.cap_bytes for a in planned(mind).assignments}.items() <= {
        device: cap * MIB for device, cap in enumerate(CAPS)
    }.items()
    free = coordinator(caps=[None] * 4)
    assert [a.cap_bytes for a in planned(free).assignments] == [None] * 3


def test_the_sum_has_bits_for_the_weights_of_the_round():
    samples = [1000] * 10
    assert planned(coordinator(samples=samples)).fraction_bits == fraction_bits(3000) == 40
    uniform = {"method": {"weights": "uniform"}}
    assert planned(coordinator(uniform, samples=samples)).fraction_bits == fraction_bits(3) == 50


def test_learning_rate_schedules():
    constant = coordinator({"train": {"learning_rate": 0.4}})
    assert {planned(constant).learning_rate for _ in range(5)} == {0.4}
    mind = coordinator({"train": {"learning_rate": 0.4, "schedule": "cosine", "rounds": 8}})
    rates = [planned(mind).learning_rate for _ in range(8)]
    assert rates[0] == 0.4
    assert rates[2] == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert rates[4] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[7] < 0.02


# --- ranks


@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 50), min_size=10, max_size=10))
@settings(max_examples=40, deadline=None)
def test_a_plan_does_not_depend_on_the_world_size_but_for_ranks(world_size, seed, samples):
    samples[9] += 1  # it holds every stage, and somebody must be able to train
    values = {"seed": seed, "train": {"participants": 4, "schedule": "cosine"}}
    one = coordinator(values, samples=samples)
    many = coordinator(values, samples=samples, world_size=world_size)
    for stage_round in range(6):
        alone, spread = planned(one), planned(many)
        assert {assignment.rank for assignment in alone.assignments} == {0}
        assert all(0 <= assignment.rank < world_size for assignment in spread.assignments)
        expected, got = asdict(alone), asdict(spread)
        for assignment in (*expected["assignments"], *got["assignments"]):
            del assignment["rank"]
        assert got == expected
        reports = completed(alone, one)
        assert one.judge(reports, 0.5) == many.judge(reports, 0.5)
        if stage_round % 2 and one.stage < 2:
            one.advance()
            many.advance()
    assert one.state_dict() == many.state_dict()


def test_most_samples_first_to_the_rank_with_least_work():
    mind = coordinator({"train": {"participants": 4}}, caps=[10] * 4, samples=[5, 10, 6, 7], world_size=2)
    # 10 -> rank 0, 7 -> rank 1, 6 -> rank 1 (7 < 10), 5 -> rank 0 (10 < 13)
    assert [(a.device, a.rank) for a in planned(mind).assignments] == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_equal_devices_are_spread_over_all_ranks():
    mind = coordinator({"train": {"participants": 6}}, caps=[10] * 6, samples=[5] * 6, world_size=3)
    assert [a.rank for a in planned(mind).assignments] == [0, 1, 2, 0, 1, 2]


# --- what cannot be run


def test_a_stage_that_no_device_holds_is_told_with_the_cap_that_would_do():
    with pytest.raises(ConfigError) as caught:
        coordinator(caps=[1, 3, 5])
    message = str(caught.value)
    assert "no device holds stage 'block 1'" in message
    assert "needs 8.0 MiB" in message
    assert "largest cap is 5.0 MiB" in message
    assert "every stage is 8.0 MiB" in message
    assert len(message.splitlines()) == 1


def test_the_cap_that_would_do_holds_every_stage_not_only_the_first_that_fails():
    stages = (cost("front", 2), cost("middle", 8), cost("end", 6))
    with pytest.raises(ConfigError, match=r"'middle'.*needs 8\.0 MiB.*every stage is 8\.0 MiB"):
        coordinator(caps=[1, 3], stages=stages)
    coordinator(caps=[1, 8], stages=stages)


@pytest.mark.parametrize("policy", ["fixed", "proportional"])
def test_fewer_rounds_than_stages_cannot_be_shared_out(policy):
    with pytest.raises(ConfigError, match=r"train\.rounds: 2 is less than the 3 stages"):
        coordinator({"pace": {"policy": policy}, "train": {"rounds": 2}})
    coordinator({"pace": {"policy": policy}, "train": {"rounds": 3}})
    coordinator({"pace": {"policy": "perturbation"}, "train": {"rounds": 2}})


@pytest.mark.parametrize(("correction", "left"), [(True, [8, 9]), (False, [6, 8, 9])])
def test_a_device_that_ran_out_is_left_out_until_the_next_stage(correction, left):
    """And with it, by correction, device 6: its cap is smaller, its batch the same."""
    mind = coordinator({"train": {"participants": 4}, "select": {"memory_correction": correction}})
    plan = planned(mind)
    reports = completed(plan, mind)
    reports[1] = DeviceReport(7, 80, failed="out of memory", out_of_memory=True)
    reports[2] = DeviceReport(8, 90, failed="diverged")
    mind.judge(reports, None)
    assert [a.device for a in planned(mind).assignments] == left
    mind.advance()
    assert 7 in {a.device for _ in range(30) for a in planned(mind).assignments}


def test_a_device_with_smaller_batches_may_still_try_when_one_with_more_memory_ran_out():
    mind = coordinator({"train": {"participants": 4}}, samples=[100, 100, 100, 100, 100, 100, 5, 100, 100, 100])
    plan = planned(mind)
    reports = completed(plan, mind)
    reports[1] = DeviceReport(7, 100, failed="out of memory", out_of_memory=True)
    mind.judge(reports, None)
    assert [a.device for a in planned(mind).assignments] == [6, 8, 9]


def test_without_the_memory_model_any_device_may_be_selected():
    mind = coordinator({"train": {"participants": 10}, "select": {"memory": False}})
    assert [a.device for a in planned(mind).assignments] == list(range(10))


def test_the_deadline_leaves_devices_out_and_over_selection_asks_for_more():
    # a round takes device d as many seconds as it has samples: 100 FLOPs a step of 32 samples
    fast = {"train": {"participants": 3, "batch_size": 1, "deadline_s": 85.0}}
    mind = coordinator(fast, caps=[20] * 10)
    for name, value in (("speed_flops", 100.0), ("up_bytes_s", 1e12), ("down_bytes_s", 1e12)):
        object.__setattr__(mind.fleet, name, np.full(10, value))
    for _ in range(20):
        plan = planned(mind)
        assert all(mind.samples[a.device] <= 80 for a in plan.assignments)
        assert all(left.samples >= 90 and left.reason.startswith("deadline") for left in plan.left_out)
        assert len(plan.assignments) + len(plan.left_out) == 3
    more = coordinator({"train": {"participants": 3, "over_selection": 1.5}}, caps=[20] * 10)
    plan = planned(more)
    assert (len(plan.assignments), len(plan.left_out)) == (3, 2)
    assert max(a.device for a in plan.assignments) < min(left.device for left in plan.left_out)


def test_a_deadline_that_nobody_meets_is_told_at_once():
    with pytest.raises(ConfigError, match=r"train\.deadline_s: 1e-06 s is too short for stage 'block 1', .* fastest"):
        coordinator({"train": {"deadline_s": 1e-6}})


def test_when_every_device_ran_out_the_run_says_so():
    mind = coordinator({"train": {"participants": 4}})
    plan = planned(mind)
    mind.judge([DeviceReport(a.device, 1, failed="oom", out_of_memory=True) for a in plan.assignments], None)
    with pytest.raises(ConfigError, match=r"every device that should hold stage 'block 1' \(8\.0 MiB predicted\)"):
        planned(mind)


# --- verdicts


def drive(mind, perturbation=None) -> list:
    """Run to the end; return the verdicts."""
    verdicts = []
    while not verdicts or not verdicts[-1].stop:
        plan = planned(mind)
        verdicts.append(mind.judge(completed(plan, mind), perturbation))
        if verdicts[-1].end_stage and not verdicts[-1].stop:
            mind.advance()
    return verdicts


def test_fixed_rounds_end_each_stage_on_time_and_stop_after_the_last():
    verdicts = drive(coordinator({"pace": {"policy": "fixed"}, "train": {"rounds": 8}}))
    assert [verdict.end_stage for verdict in verdicts] == [None, None, "fixed"] * 2 + [None, "fixed"]
    assert [verdict.stop for verdict in verdicts] == [False] * 7 + [True]


def test_a_method_that_freezes_nothing_trains_for_all_rounds():
    """Whatever the pace section says: it is about freezing."""
    for pace in ({}, {"max_rounds": 3}, {"policy": "plateau", "slope_window": 2, "checks": 1}):
        mind = coordinator({"pace": pace, "train": {"rounds": 12}}, stages=[cost("all", 8)], paced=False)
        verdicts = drive(mind, perturbation=0.1)
        assert len(verdicts) == 12, pace
        assert [verdict.end_stage is not None for verdict in verdicts] == [False] * 11 + [True]
        assert verdicts[-1].stop


def test_a_converged_last_stage_stops_before_the_round_limit():
    pace = {"window": 16, "slope_window": 2, "checks": 1}
    mind = coordinator({"pace": pace})
    verdicts = drive(mind, perturbation=0.3)
    assert [verdict.end_stage for verdict in verdicts] == [None, "converged"] * 3
    assert [verdict.stop for verdict in verdicts] == [False] * 5 + [True]
    assert verdicts[-1].slope == 0
    assert verdicts[-1].perturbation == 0.3
    assert (mind.round, mind.stage) == (6, 2)


def test_the_round_limit_stops_in_whatever_stage():
    mind = coordinator({"train": {"rounds": 5}})
    verdicts = drive(mind)
    assert [verdict.end_stage for verdict in verdicts] == [None] * 4 + ["round_limit"]
    assert mind.stage == 0


def test_a_stage_that_converges_in_the_last_round_of_all_says_converged_and_stops():
    mind = coordinator({"pace": {"window": 16, "slope_window": 2, "checks": 1}, "train": {"rounds": 2}})
    verdict = drive(mind, perturbation=0.3)[-1]
    assert (verdict.end_stage, verdict.stop, mind.stage) == ("converged", True, 0)


def test_evaluations_and_checkpoints_come_on_time_and_at_every_end():
    values = {
        "pace": {"policy": "fixed"},
        "train": {"rounds": 12},
        "eval": {"every_rounds": 3},
        "checkpoint": {"every_rounds": 5},
    }
    verdicts = drive(coordinator(values))
    assert [n for n, verdict in enumerate(verdicts, 1) if verdict.evaluate] == [3, 4, 6, 8, 9, 12]
    assert not any(verdict.evaluate_sampled for verdict in verdicts)
    sampled = drive(coordinator({**values, "eval": {"every_rounds": 3, "samples": 50}}))
    assert [n for n, verdict in enumerate(sampled, 1) if verdict.evaluate_sampled] == [1, 2, 5, 7, 10, 11]
    assert [n for n, verdict in enumerate(verdicts, 1) if verdict.checkpoint] == [4, 5, 8, 10, 12]


def test_judging_counts_only_devices_that_completed():
    mind = coordinator({"train": {"participants": 4}})
    planned(mind)
    mind.judge(
        [
            DeviceReport(6, 70, loss=1.0, peak_bytes=500),
            DeviceReport(7, 80, loss=2.0, peak_bytes=700),
            DeviceReport(8, 90, failed="diverged", peak_bytes=9000),
        ],
        None,
    )
    planned(mind)
    mind.judge([DeviceReport(6, 70, loss=1.0, peak_bytes=600)], None)
    assert mind.trained == {6, 7}
    assert (mind.peak_bytes, mind.peak_sum_bytes, mind.device_rounds) == (700, 1800, 3)


def test_a_round_in_which_every_device_failed_goes_on():
    mind = coordinator()
    plan = planned(mind)
    verdict = mind.judge([DeviceReport(a.device, 1, failed="diverged") for a in plan.assignments], None)
    assert (verdict.end_stage, verdict.stop) == (None, False)
    assert mind.trained == set()


def test_loss_is_weighted_by_samples_of_those_that_completed():
    reports = [
        DeviceReport(0, 1, loss=4.0),
        DeviceReport(1, 3, loss=2.0),
        DeviceReport(2, 96, loss=100.0, failed="diverged"),
        DeviceReport(3, 96, loss=None),
    ]
    assert train_loss(reports) == 2.5
    assert train_loss([DeviceReport(0, 5, loss=0.0)]) == 0.0
    assert train_loss(reports[2:]) is None
    assert train_loss([]) is None


# --- traffic


def test_a_frozen_block_is_sent_down_once_to_a_device():
    mind = coordinator()
    both = [DeviceReport(8, 90), DeviceReport(9, 100)]
    # stage 1: 100 floats each way a device
    assert traffic(mind, both) == (800, 800)
    assert traffic(mind, both[:1]) == (400, 400)
    mind.advance()
    # stage 2: 70 floats up; down the same, and the 60 frozen ones to a device that lacks them
    assert traffic(mind, both[:1]) == (280, 280 + 240)
    assert traffic(mind, both) == (560, 280 + 280 + 240)
    assert traffic(mind, both) == (560, 560)
    mind.advance()
    # stage 3: 40 floats; of 110 frozen ones, devices 8 and 9 lack 50, device 1 comes for the first time
    newcomer = DeviceReport(1, 20)
    assert traffic(mind, [newcomer, *both]) == (480, (160 + 440) + 2 * (160 + 200))
    assert traffic(mind, [newcomer, *both]) == (480, 480)
    assert mind.clock.bytes_total == 800 * 2 + 400 * 2 + 280 + 520 + 560 + 800 + 560 * 2 + 480 + 1320 + 480 * 2


def test_a_device_that_failed_was_sent_the_model_but_sends_nothing():
    mind = coordinator()
    mind.advance()
    reports = [DeviceReport(8, 90), DeviceReport(9, 100, failed="out of memory", out_of_memory=True)]
    assert traffic(mind, reports) == (280, 2 * (280 + 240))
    assert traffic(mind, reports[1:]) == (0, 280)


# --- state


def fake_round(mind) -> dict:
    """One round in which device 7 runs out in stage 0 and device 5 diverges; return all that can be seen of it."""
    plan = planned(mind)
    reports = []
    for assignment in plan.assignments:
        device = assignment.device
        oom, diverged = device == 7 and plan.stage == 0, device == 5
        failed = "out of memory" if oom else "diverged" if diverged else None
        reports.append(
            DeviceReport(
                device,
                mind.samples[device],
                failed=failed,
                out_of_memory=oom,
                loss=None if failed else 1 / plan.round,
                peak_bytes=1000 + device,
            )
        )
    perturbation = None if plan.stage_round < 3 else max(0.3, 0.8 - 0.1 * plan.stage_round)
    verdict = mind.judge(reports, perturbation)
    if verdict.end_stage and not verdict.stop:
        mind.advance()
    clock = [mind.clock.emulated_s, mind.clock.bytes_up, mind.clock.bytes_down]
    return {"plan": plan.to_json(), "verdict": verdict.to_json(), "clock": clock}


@pytest.mark.parametrize("policy", ["perturbation", "fixed", "proportional", "plateau"])
@given(cut=st.integers(0, 24), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_state_that_went_through_json_gives_the_same_further_rounds(policy, cut, seed):
    values = {
        "seed": seed,
        "train": {"rounds": 25, "schedule": "cosine"},
        "pace": {"policy": policy, "window": 16, "slope_window": 3, "checks": 2, "improvement": 0.5},
    }
    whole = coordinator(values)
    log = []
    while not log or not log[-1]["verdict"]["stop"]:
        log.append(fake_round(whole))
    assert whole.stage > 0  # else the cut would never meet a frozen block
    cut = min(cut, len(log) - 1)
    first = coordinator(values)
    for _ in range(cut):
        fake_round(first)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = coordinator(values)
    second.load_state_dict(state)
    assert [fake_round(second) for _ in range(cut, len(log))] == log[cut:]
    assert second.state_dict() == whole.state_dict()


def test_a_saved_state_does_not_change_as_the_run_goes_on():
    mind = coordinator()
    fake_round(mind)
    state = mind.state_dict()
    before = json.dumps(state)
    for _ in range(5):
        fake_round(mind)
    assert json.dumps(state) == before


def test_a_loaded_state_is_kept_apart_from_what_was_loaded():
    mind = coordinator()
    fake_round(mind)
    state = json.loads(json.dumps(mind.state_dict()))
    before = json.dumps(state)
    other = coordinator()
    other.load_state_dict(state)
    for _ in range(5):
        fake_round(other)
    assert json.dumps(state) == before
