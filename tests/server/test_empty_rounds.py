"""Devices that can train nothing, and rounds in which few complete: nobody is drawn in vain, nothing converges."""

import json

import numpy as np
import pytest

from fedfreeze.errors import ConfigError
from fedfreeze.messages import DeviceReport
from fedfreeze.select import SELECTORS, Selector
from fedfreeze.server.pace import PaceDecision, PacePolicy
from tests.server.test_coordinator import completed, coordinator, cost, planned

# --- who has samples enough


class Last(Selector):
    """Of the candidates those that come last: a selector of the user's own."""

    def select(self, round_number, candidates, count):
        """See Selector."""
        return list(candidates)[-count:]


NORMED = (cost("block 1", 2, batch_norm=True), cost("block 2", 2))


@pytest.mark.parametrize("name", [*SELECTORS, "tests.server.test_empty_rounds:Last"])
def test_whoever_cannot_train_is_not_selected_while_others_can(name):
    """Not even where more are asked for than can: an empty seat tells nobody anything."""
    samples = [0, 1, 2, 5, 0, 1, 0, 9, 0, 1]
    mind = coordinator({"select": {"name": name}, "train": {"participants": 6}}, samples=samples, stages=NORMED)
    assert mind.able == [[2, 3, 7], [1, 2, 3, 5, 7, 9]]
    for _ in range(3):
        plan = planned(mind)
        assert [assignment.device for assignment in plan.assignments] == [2, 3, 7]
        mind.judge(completed(plan, mind), 1.0)
    mind.advance()
    assert [assignment.device for assignment in planned(mind).assignments] == [1, 2, 3, 5, 7, 9]
    assert mind.trainable == {1, 2, 3, 5, 7, 9}


def test_a_round_waits_for_a_device_that_can_train():
    mind = coordinator(caps=[9] * 3, samples=[0, 20, 0])
    for name, value in (("availability", [1.0, 0.5, 1.0]), ("phase", [0.0, 0.5, 0.0])):
        object.__setattr__(mind.fleet, name, np.array(value))
    assert [assignment.device for assignment in planned(mind).assignments] == [1]
    assert mind.clock.waited_s == pytest.approx(0.5 * mind.fleet.period_s, rel=1e-5)


def test_without_the_memory_model_too_samples_are_needed():
    mind = coordinator(
        {"train": {"participants": 10}, "select": {"memory": False}}, samples=[1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    )
    assert [a.device for a in planned(mind).assignments] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([0] * 10, r"stage 'block 1': none of the 9 devices .* takes 2 samples, as batch .* they have 0 at most"),
        ([1] * 10, r"stage 'block 1': .* they have 1 at most \(lower fleet\.devices, or raise data\.alpha"),
        ([50] + [0] * 9, r"none of the 9 devices whose cap holds it"),  # who has data holds no stage
    ],
)
def test_a_stage_in_which_nobody_can_train_is_told_at_once(samples, says):
    with pytest.raises(ConfigError, match=says):
        coordinator(samples=samples, stages=NORMED)


def test_when_all_who_have_samples_ran_out_the_others_do_not_go_on_for_them():
    mind = coordinator(samples=[0, 0, 0, 0, 0, 0, 0, 30, 0, 0])
    plan = planned(mind)
    mind.judge([DeviceReport(a.device, 30, failed="oom", out_of_memory=True) for a in plan.assignments], None)
    with pytest.raises(ConfigError, match="every device that should hold stage"):
        planned(mind)


# --- sparse rounds: no evidence of convergence

EAGER = {"window": 16, "slope_window": 2, "checks": 1, "improvement": 0.5}


def sparse_round(mind, number: int, loss: float = 1.0):
    """Have `number` of a round's devices complete, the others diverge; return the verdict."""
    plan = planned(mind)
    reports = completed(plan, mind, loss)
    reports[number:] = [DeviceReport(report.device, report.samples, failed="diverged") for report in reports[number:]]
    return mind.judge(reports, 0.3)


@pytest.mark.parametrize("policy", ["perturbation", "plateau"])
@pytest.mark.parametrize(
    ("share", "number", "sparse"), [(0.5, 4, True), (0.5, 5, False), (0.05, 1, False), (0.0, 1, False), (1.0, 9, True)]
)
def test_a_stage_converges_by_rounds_that_are_not_sparse(policy, share, number, sparse):
    pace = {**EAGER, "policy": policy, "min_share": share}
    mind = coordinator({"pace": pace, "train": {"participants": 10}}, caps=[9] * 20)
    verdicts = [sparse_round(mind, number) for _ in range(2)]
    assert [verdict.sparse for verdict in verdicts] == [sparse] * 2
    assert [verdict.end_stage for verdict in verdicts] == [None, None if sparse else "converged"]
    assert [verdict.perturbation for verdict in verdicts] == [None if sparse else 0.3] * 2


@pytest.mark.parametrize("policy", ["perturbation", "plateau"])
def test_a_sparse_round_breaks_the_row_of_checks(policy):
    mind = coordinator({"pace": {**EAGER, "checks": 2, "policy": policy}, "train": {"participants": 4}}, caps=[9] * 9)
    ends = [sparse_round(mind, number).end_stage for number in (4, 4, 1, 4, 4)]
    assert ends == [None, None, None, None, "converged"]


def test_where_few_devices_can_train_all_of_them_are_enough():
    mind = coordinator({"pace": EAGER, "train": {"participants": 10}}, caps=[9] * 20, samples=[5, 5] + [0] * 18)
    assert [sparse_round(mind, 2).end_stage for _ in range(2)] == [None, "converged"]


def test_a_round_is_sparse_too_where_few_devices_are_available():
    mind = coordinator({"pace": EAGER, "train": {"participants": 4}}, caps=[9] * 10)
    object.__setattr__(mind.fleet, "availability", np.array([1.0] + [1e-6] * 9))
    object.__setattr__(mind.fleet, "phase", np.full(10, 0.5))
    assert sparse_round(mind, 1).sparse


@pytest.mark.parametrize("policy", ["fixed", "proportional"])
def test_a_budget_counts_every_round_and_max_rounds_too(policy):
    mind = coordinator({"pace": {"policy": policy}, "train": {"rounds": 6}}, stages=[cost("a", 2), cost("b", 2)])
    assert [sparse_round(mind, 1).end_stage for _ in range(3)] == [None, None, "fixed"]
    limited = coordinator({"pace": {**EAGER, "max_rounds": 2}})
    assert [sparse_round(limited, 1).end_stage for _ in range(2)] == [None, "round_limit"]


class Gullible(PacePolicy):
    """Freezes at once, whatever it sees: a policy of the user's own."""

    def decision_after(self, seen):
        """See PacePolicy."""
        return PaceDecision(True, self.config.options["reason"])


@pytest.mark.parametrize("reason", ["converged", "whatever", None])
def test_a_stage_in_which_nobody_completed_a_round_is_not_converged_whoever_says_so(reason):
    pace = {"policy": "tests.server.test_empty_rounds:Gullible", "options": {"reason": reason}}
    mind = coordinator({"pace": pace})
    assert [sparse_round(mind, 0).end_stage for _ in range(3)] == [None] * 3
    assert sparse_round(mind, 1).end_stage == (reason or "converged")
    mind.advance()
    assert sparse_round(mind, 0).end_stage is None


def test_a_run_in_which_nobody_completed_a_round_is_told():
    mind = coordinator({"train": {"rounds": 2}})
    sparse_round(mind, 0)
    mind.load_state_dict(json.loads(json.dumps(mind.state_dict())))
    sparse_round(mind, 0)
    with pytest.raises(ConfigError, match=r"no device completed any of the 2 rounds, .* \(at last: diverged\); lower"):
        mind.check_learned()
    sparse_round(mind, 1)
    mind.check_learned()


def test_a_state_of_an_earlier_version_is_taken():
    mind = coordinator()
    sparse_round(mind, 2)
    state = json.loads(json.dumps(mind.state_dict()))
    del state["stage_device_rounds"], state["last_failure"]
    other = coordinator()
    other.load_state_dict(state)
    assert sparse_round(other, 2) == sparse_round(mind, 2)
    assert other.stage_device_rounds == 4


# --- long stages


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("policy", ["perturbation", "plateau"])
def test_a_state_does_not_grow_with_the_rounds_of_a_stage(name, policy):
    """Or each round of a long stage would cost more than the one before: it is in every checkpoint."""
    pace = {"policy": policy, "min_rounds": 10**6}
    select = {"name": name, "blocklist_rounds": None}
    mind = coordinator({"pace": pace, "select": select, "train": {"rounds": 10**6}}, caps=[9] * 10)
    lengths = []
    for number in range(1, 241):
        plan = planned(mind)
        mind.judge(completed(plan, mind, loss=1 + 1 / number), 0.5 + 1 / number)
        lengths.append(len(json.dumps(mind.state_dict())))
    assert max(lengths[-40:]) <= max(lengths[80:120]) + 100  # the digits of a number, not numbers
