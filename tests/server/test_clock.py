"""The emulated clock: rounds worked out by hand, who is in time, what is sent once, and what always holds."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import WHOLE
from fedfreeze.device.cost import Costs, StageCost, WayCost
from fedfreeze.fleet.devices import Fleet
from fedfreeze.messages import DeviceReport
from fedfreeze.server.clock import EmulatedClock, Finish, Work, finish_of, seconds_of

# --- the time model


def test_seconds_are_download_then_computing_then_upload():
    fleet = Fleet((None,) * 3, speed_flops=[1e9, 2e9, 4e9], up_bytes_s=[10, 20, 40], down_bytes_s=[100, 200, 400])
    work = Work(flops=np.array([8e9, 2e9]), bytes_down=np.array([800, 100]), bytes_up=np.array([40, 30]))
    # device 2: 800/400 + 8/4 + 40/40; device 0: 100/100 + 2/1 + 30/10
    assert seconds_of(fleet, [2, 0], work).tolist() == [5, 6]


def test_no_devices_take_no_seconds():
    nothing = np.array([])
    assert seconds_of(Fleet((None,)), [], Work(nothing, nothing, nothing)).tolist() == []


# --- who is in time


def finish(devices, seconds, participants, deadline_s=None) -> Finish:
    return finish_of(devices, np.array(seconds, dtype=float), participants=participants, deadline_s=deadline_s)


def test_without_deadline_the_round_waits_for_the_slowest():
    assert finish([7, 3, 5], [2, 9, 4], 3) == Finish([3, 5, 7], {}, 9.0)


def test_of_more_than_are_needed_the_first_take_part():
    found = finish([7, 3, 5, 1], [2, 9, 4, 6], 2)
    assert found.in_time == [5, 7]
    assert found.seconds == 4
    assert found.late == {3: "over-selection: 2 others were faster", 1: "over-selection: 2 others were faster"}


def test_ties_go_to_the_smaller_number():
    found = finish([9, 4, 6], [5, 5, 5], 2)
    assert found.in_time == [4, 6]
    assert set(found.late) == {9}
    assert found.seconds == 5


def test_a_deadline_leaves_out_who_would_take_longer_and_ends_the_round():
    found = finish([1, 2, 3], [4, 10.26, 7], 3, deadline_s=8)
    assert found.in_time == [1, 3]
    assert found.late == {2: "deadline: it would take 10.3 s, train.deadline_s is 8"}
    assert found.seconds == 8


def test_at_the_deadline_is_in_time():
    assert finish([1], [8], 1, deadline_s=8) == Finish([1], {}, 8.0)


def test_who_meets_the_deadline_ends_the_round_before_it():
    assert finish([1, 2], [3, 4], 2, deadline_s=8).seconds == 4


def test_a_deadline_and_over_selection_together():
    # two of four are needed and two meet the deadline: the round ends with the second
    found = finish([1, 2, 3, 4], [3, 5, 20, 30], 2, deadline_s=8)
    assert (found.in_time, found.seconds) == ([1, 2], 5)
    assert all(reason.startswith("over-selection") for reason in found.late.values())
    # three are needed and two meet it: the round waits until the deadline
    found = finish([1, 2, 3, 4], [3, 5, 20, 30], 3, deadline_s=8)
    assert (found.in_time, found.seconds) == ([1, 2], 8)
    assert {device: reason.split(":")[0] for device, reason in found.late.items()} == {3: "deadline", 4: "deadline"}


def test_nobody_in_time_takes_until_the_deadline():
    found = finish([1, 2], [9, 10], 2, deadline_s=8)
    assert (found.in_time, set(found.late), found.seconds) == ([], {1, 2}, 8)


def test_nobody_selected_takes_no_time():
    assert finish([], [], 3) == Finish([], {}, 0.0)
    assert finish([], [], 3, deadline_s=8) == Finish([], {}, 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(1e-6, 1e9)), max_size=30, unique_by=lambda pair: pair[0]),
    st.integers(1, 30),
    st.none() | st.floats(1e-3, 1e9),
)
@settings(max_examples=300, deadline=None)
def test_what_holds_for_every_round(pairs, participants, deadline_s):
    devices, seconds = [device for device, _ in pairs], [taken for _, taken in pairs]
    took = dict(pairs)
    found = finish(devices, seconds, participants, deadline_s)
    assert found.seconds >= max((took[device] for device in found.in_time), default=0)
    if deadline_s is not None:
        assert found.seconds <= deadline_s
        assert all(took[device] <= deadline_s for device in found.in_time)
    assert sorted([*found.in_time, *found.late]) == sorted(devices)
    assert not set(found.in_time) & set(found.late)
    assert len(found.in_time) <= participants
    assert found.in_time == sorted(found.in_time)
    if found.in_time and found.late:
        slowest = max(took[device] for device in found.in_time)
        assert all(took[device] >= slowest for device in found.late)
    if deadline_s is None:
        assert len(found.in_time) == min(participants, len(devices))


# --- the clock over rounds and stages


def cost(
    *, step: int, forward: int, trained: int, frozen: int = 0, memory: int = 100, frozen_flops: int = 0
) -> StageCost:
    return StageCost(
        name="a stage",
        ways=(WayCost(WHOLE, memory, step),),
        frozen_flops=frozen_flops,
        forward_flops=forward,
        trained_elements=trained,
        watched_parameters=trained,
        frozen_elements=frozen,
    )


# batch 10: in stage 0 a step is 100 FLOP and the model 50 floats; then the first block, 30 floats, is frozen
STAGES = (cost(step=100, forward=40, trained=50), cost(step=80, forward=60, trained=20, frozen=30))
FULL = cost(step=300, forward=100, trained=100)
# device:             0    1    2
SAMPLES = [10, 20, 40]
SPEEDS = [100.0, 100.0, 50.0]  # FLOP/s
UPS = [100.0, 50.0, 200.0]  # bytes/s
DOWNS = [200.0, 100.0, 400.0]


def clock(
    fleet: Fleet | None = None, levels: tuple[tuple[StageCost, ...], ...] | None = None, **train
) -> EmulatedClock:
    fleet = fleet or Fleet((None,) * 3, speed_flops=SPEEDS, up_bytes_s=UPS, down_bytes_s=DOWNS)
    costs = Costs(levels=levels or tuple((stage,) for stage in STAGES), full=FULL)
    return EmulatedClock(fleet, SAMPLES, costs, TrainConfig(**{"batch_size": 10, "participants": 3} | train))


def report(device: int, failed: str | None = None) -> DeviceReport:
    return DeviceReport(device, SAMPLES[device], failed=failed)


def one_round(now: EmulatedClock, devices: list[int], participants: int = 3) -> list[int]:
    """As the coordinator has it: who is left out is reported, too."""
    now.wait_for([0, 1, 2])
    found = now.finish(devices, participants)
    now.end_round([report(device, found.late.get(device)) for device in devices])
    return found.in_time


def test_a_round_by_hand():
    now = clock()
    # 200 bytes down and up; device 0: 200/200 + 10 * 100/10 / 100 + 200/100, and so on
    assert now.round_seconds().tolist() == [1 + 1 + 2, 2 + 2 + 4, 0.5 + 8 + 1]
    assert one_round(now, [0, 2]) == [0, 2]
    assert now.round_s == now.emulated_s == now.now_s == 9.5
    assert (now.bytes_up, now.bytes_down, now.bytes_total) == (400, 400, 800)
    assert now.flops == now.flops_total == 100 + 400  # 10 samples at 100 a batch of 10, and 40


def test_local_epochs_are_charged():
    assert clock(local_epochs=3).round_seconds().tolist() == [1 + 3 + 2, 2 + 6 + 4, 0.5 + 24 + 1]


def test_a_frozen_block_is_sent_once_to_a_device_that_lacks_it():
    now = clock()
    one_round(now, [0, 1])  # stage 0: 200 bytes each way a device
    now.enter_stage(1)
    one_round(now, [0])
    assert (now.bytes_down, now.bytes_up) == (80 + 120, 80)  # 20 floats, and the frozen 30
    assert now.round_s == pytest.approx(200 / 200 + 8 / 10 + 80 / 100)
    one_round(now, [0, 2])
    assert now.bytes_down == 80 + (80 + 120)  # device 0 has it; device 2 was never here before
    assert now.round_s == pytest.approx(200 / 400 + 40 * 8 / 50 + 80 / 200)
    one_round(now, [0, 2])
    assert now.bytes_down == 160
    assert now.now_s == pytest.approx(8 + 2.6 + 7.3 + (80 / 400 + 6.4 + 0.4))


def test_a_device_that_failed_downloaded_and_sent_nothing():
    now = clock()
    now.wait_for([0, 1, 2])
    now.finish([0, 1], 3)
    now.end_round([report(0), report(1, failed="out of memory")])
    assert (now.bytes_down, now.bytes_up) == (400, 200)
    assert now.now_s == 8  # it is not known before how long a device lasts that fails


def test_a_device_that_was_left_out_downloaded_and_sent_nothing():
    now = clock(deadline_s=5.0)
    assert one_round(now, [0, 1, 2]) == [0]
    assert now.round_s == 5
    assert (now.bytes_down, now.bytes_up) == (600, 200)


def test_over_selection_ends_with_the_last_that_is_needed():
    now = clock(over_selection=1.5, participants=2)
    assert one_round(now, [0, 1, 2], participants=2) == [0, 1]
    assert now.now_s == 8
    assert (now.bytes_down, now.bytes_up) == (600, 400)


def test_a_probe_is_a_forward_pass_the_model_down_and_the_answers_up():
    now = clock()
    now.wait_for([0, 1, 2])
    assert now.probe([0, 1], 25) == [0, 1]  # 100 bytes of answers
    # device 0: 200/200 + 10 * 40/10 / 100 + 100/100; device 1: 200/100 + 0.8 + 100/50
    assert now.probe_s == pytest.approx(4.8)
    assert now.probed == 2
    assert (now.bytes_down, now.bytes_up) == (400, 200)


def test_who_was_asked_has_the_models_and_is_not_sent_it_again_in_that_round():
    now = clock()
    now.wait_for([0, 1, 2])
    now.probe([0, 1], 25)
    assert now.round_seconds().tolist() == [1 + 2, 2 + 4, 0.5 + 8 + 1]
    now.finish([0, 2], 3)
    now.end_round([report(0), report(2)])
    assert now.bytes_down == 400 + 200  # device 2 alone
    assert now.bytes_up == 200 + 400
    assert now.emulated_s == now.now_s == pytest.approx(4.8 + 9.5)
    now.wait_for([0, 1, 2])
    assert now.round_seconds().tolist() == [4, 8, 9.5]  # the next round has another model
    assert (now.probe_s, now.probed, now.bytes_down) == (0, 0, 0)


def test_a_probe_has_the_rounds_deadline():
    now = clock(deadline_s=3.0)
    now.wait_for([0, 1, 2])
    assert now.probe([0, 1], 25) == [0]
    assert now.probe_s == 3
    assert now.probed == 1
    assert now.bytes_up == 100


def test_a_probe_downloads_frozen_blocks_as_well():
    now = clock()
    now.enter_stage(1)
    now.wait_for([0, 1, 2])
    now.probe([0], 25)
    assert now.bytes_down == 80 + 120
    assert now.frozen_held.tolist() == [1, 0, 0]


def test_a_device_trains_the_largest_level_that_its_cap_holds():
    levels = ((cost(step=10, forward=4, trained=5, memory=10), STAGES[0]),)
    fleet = Fleet((9, 50, None), speed_flops=SPEEDS, up_bytes_s=UPS, down_bytes_s=DOWNS)
    now = clock(fleet, levels)
    assert now.level.tolist() == [0, 0, 1]
    assert now.round_seconds().tolist() == pytest.approx([0.1 + 0.1 + 0.2, 0.2 + 0.2 + 0.4, 9.5])


# --- availability


def at_night() -> Fleet:
    return Fleet((None,) * 3, SPEEDS, UPS, DOWNS, availability=[0.5, 0.5, 0.1], phase=[0.0, 0.5, 0.5], period_s=100.0)


def test_only_devices_that_are_available_can_be_selected():
    now = clock(at_night())
    assert now.wait_for([0, 1, 2]) == [0]
    assert now.waited_s == 0
    now.now_s = 55.0
    assert now.wait_for([0, 1, 2]) == [1, 2]
    now.now_s = 70.0
    assert now.wait_for([0, 1, 2]) == [1]


def test_waiting_for_a_device_is_charged():
    now = clock(at_night())
    now.now_s = 70.0
    assert now.wait_for([2]) == [2]  # its period begins again at 150
    assert now.waited_s == pytest.approx(80, abs=0.01)
    now.finish([2], 3)
    now.end_round([report(2)])
    assert now.emulated_s == pytest.approx(89.5, abs=0.01)
    assert now.now_s == pytest.approx(159.5, abs=0.01)


# --- going on


def test_a_device_that_stores_features_runs_its_frozen_blocks_once_a_stage():
    stage = cost(step=100, forward=40, trained=50, frozen_flops=30)
    levels = ((cost(step=100, forward=40, trained=50),), (stage,), (stage,))
    now = clock(levels=levels, prefix="stored")
    assert now.train_flops.tolist() == [100, 200, 400]
    assert not now.stores().any()  # nothing is frozen
    now.enter_stage(1)
    assert now.train_flops.tolist() == [70 + 30, 140 + 60, 280 + 120]
    one_round(now, [0, 1])
    assert now.flops == 100 + 200
    assert now.stores().tolist() == [False, False, True]
    assert now.train_flops.tolist() == [70, 140, 400]
    again = clock(levels=levels, prefix="stored")
    again.enter_stage(1)
    again.load_state_dict(json.loads(json.dumps(now.state_dict())))
    assert again.stores().tolist() == [False, False, True]
    now.end_round([report(2, "out of memory")])
    assert now.stores().tolist() == [False, False, True]  # it has not completed
    now.enter_stage(2)
    assert now.stores().all()
    now.views = 3
    now.enter_stage(2)
    assert now.train_flops.tolist() == [70 + 90, 140 + 180, 280 + 360]


def test_a_state_goes_through_json_and_goes_on_where_it_was():
    now = clock()
    one_round(now, [0, 1])
    now.enter_stage(1)
    one_round(now, [1])
    state = json.loads(json.dumps(now.state_dict()))
    again = clock()
    again.frozen_held[:] = 7
    again.load_state_dict(state)
    again.enter_stage(1)
    assert (again.now_s, again.bytes_total, again.flops_total) == (now.now_s, now.bytes_total, now.flops_total)
    assert again.frozen_held.tolist() == [0, 1, 0]
    for each in (now, again):
        one_round(each, [0, 1])
    assert again.state_dict() == now.state_dict()
    assert again.bytes_down == now.bytes_down == 80 + 80 + 120


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), min_size=1, max_size=8),
    st.integers(1, 3),
    st.none() | st.floats(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_time_and_bytes_only_grow_and_nobody_gets_a_frozen_block_twice(rounds, participants, deadline_s):
    now = clock(deadline_s=deadline_s, participants=participants)
    now.enter_stage(1)
    sent = selected = 0
    for devices in rounds:
        before = now.now_s, now.bytes_total
        in_time = one_round(now, devices, participants)
        assert now.now_s >= before[0]
        assert now.bytes_total == before[1] + now.bytes_up + now.bytes_down
        assert now.bytes_up == 80 * len(in_time)
        sent += now.bytes_down
        selected += len(devices)
    assert sent == 80 * selected + 120 * int((now.frozen_held == 1).sum())


def test_who_fails_has_computed_nothing_that_counts_and_an_older_checkpoint_has_no_sum():
    now = clock()
    now.wait_for([0, 1, 2])
    now.finish([0, 1], 3)
    now.end_round([report(0, "diverged"), report(1)])
    assert now.flops == now.flops_total == 10 * SAMPLES[1]
    state = {name: value for name, value in now.state_dict().items() if name != "flops_total"}
    again = clock()
    again.load_state_dict(state)
    one_round(again, [0])
    assert (again.flops, again.flops_total) == (100, None)
