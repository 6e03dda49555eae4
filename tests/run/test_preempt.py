"""When to save and leave: signals, the job's end, a file. With a clock of the tests' own."""

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.config.schema import CheckpointConfig
from fedfreeze.errors import ExitCode, PreemptedError
from fedfreeze.run.preempt import Preemption

MARGIN_S = 3.0


class Clock:
    """Seconds, by hand."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def armed(clock: Clock, *, root: bool = True, stop: Path = Path("/nowhere/stop"), **config: float) -> Preemption:
    preemption = Preemption(CheckpointConfig(**config), {}, now=clock)
    preemption.arm(root=root, stop_file=stop)
    return preemption


def run_round(preemption: Preemption, clock: Clock, seconds: float) -> None:
    preemption.round_begins()
    clock.s += seconds
    preemption.round_ends()


def test_nothing_to_do() -> None:
    clock = Clock()
    preemption = armed(clock)
    preemption.round_begins()
    clock.s += 1e9
    assert preemption.reason_to_stop() is None
    assert preemption.reason_to_drop() is None
    assert preemption.message(root=True) is None
    assert preemption.message(root=False) is None


def test_a_wish_ends_the_run_after_the_round_if_there_is_time() -> None:
    clock = Clock()
    preemption = armed(clock)
    run_round(preemption, clock, 10)
    preemption.round_begins()
    clock.s += 4
    preemption.hear("signal SIGUSR1", 20)
    assert preemption.reason_to_drop() is None  # 6 s to go, 20 left
    clock.s += 6
    preemption.round_ends()
    assert preemption.reason_to_stop() == "signal SIGUSR1"


def test_a_round_without_time_for_its_rest_is_dropped_at_once() -> None:
    clock = Clock()
    preemption = armed(clock)
    run_round(preemption, clock, 60)
    preemption.round_begins()
    clock.s += 5
    preemption.hear("signal SIGTERM", 20)
    assert preemption.reason_to_drop() == "signal SIGTERM, 20 s are left and the round needs 55 s more"
    assert preemption.message(root=True) == {"drop": preemption.reason_to_drop()}


def test_a_round_of_unknown_length_goes_on_until_the_deadline_is_near() -> None:
    clock = Clock()
    preemption = armed(clock)
    preemption.round_begins()
    preemption.hear("signal SIGUSR1", 20)
    clock.s += 20 - MARGIN_S
    assert preemption.reason_to_drop() is None
    clock.s += 0.1
    assert preemption.reason_to_drop() is not None


def test_nothing_is_dropped_between_rounds() -> None:
    clock = Clock()
    preemption = armed(clock)
    run_round(preemption, clock, 60)
    preemption.hear("signal SIGTERM", 0)
    assert preemption.reason_to_drop() is None
    assert preemption.reason_to_stop() == "signal SIGTERM"


def test_a_round_that_cannot_finish_before_the_jobs_end_is_not_begun() -> None:
    clock = Clock()
    preemption = armed(clock, time_limit_s=100)
    run_round(preemption, clock, 30)
    assert preemption.reason_to_stop() is None  # 70 s left
    run_round(preemption, clock, 20)
    assert preemption.reason_to_stop() is None  # 50 s left, the longest took 30
    run_round(preemption, clock, 20)
    assert preemption.reason_to_stop() == "the time ends in 30 s, and a round takes up to 30 s"


def test_a_round_that_takes_longer_than_all_before_is_dropped_at_the_jobs_end() -> None:
    clock = Clock()
    preemption = armed(clock, time_limit_s=100)
    run_round(preemption, clock, 10)
    preemption.round_begins()
    clock.s += 80
    assert preemption.reason_to_drop() is None
    clock.s += 8
    assert "the time ends" in str(preemption.reason_to_drop())


def test_of_two_wishes_the_more_urgent_counts_and_is_told_again() -> None:
    clock = Clock()
    preemption = armed(clock, root=False)
    preemption.hear("signal SIGUSR1", 90)
    assert preemption.message(root=False) == {"wish": "signal SIGUSR1", "grace_s": 90}
    assert preemption.message(root=False) is None
    preemption.hear("signal SIGTERM", 20)
    assert preemption.message(root=False) == {"wish": "signal SIGTERM", "grace_s": 20}
    preemption.hear("signal SIGUSR2", 90)
    assert preemption.message(root=False) is None


def test_the_file_stop_is_found_within_a_second(tmp_path: Path) -> None:
    clock = Clock()
    preemption = armed(clock, stop=tmp_path / "stop")
    assert preemption.reason_to_stop() is None
    (tmp_path / "stop").touch()
    clock.s += 1.0
    assert preemption.reason_to_stop() == f"the file {tmp_path / 'stop'}"


def test_only_rank_0_watches_the_file_and_the_jobs_end(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "stop").touch()
    preemption = armed(clock, root=False, stop=tmp_path / "stop", time_limit_s=1)
    clock.s += 100
    assert preemption.reason_to_stop() is None


@given(
    rounds=st.lists(st.floats(0, 500), max_size=8),
    elapsed=st.floats(0, 500),
    grace=st.floats(0, 500),
    limit=st.one_of(st.none(), st.floats(1, 5000)),
)
def test_what_is_not_dropped_can_still_finish(
    rounds: list[float], elapsed: float, grace: float, limit: float | None
) -> None:
    """If it takes as long as expected: it ends before the deadline, with the margin. What is dropped could not."""
    clock = Clock()
    preemption = armed(clock) if limit is None else armed(clock, time_limit_s=limit)
    ends = clock.s + (math.inf if limit is None else limit)
    for seconds in rounds:
        run_round(preemption, clock, seconds)
    preemption.round_begins()
    clock.s += elapsed
    preemption.hear("signal SIGUSR1", grace)
    deadline = min(clock.s + grace, ends)
    finished = clock.s + max(max(rounds[-5:], default=0.0) - elapsed, 0.0)
    if abs(finished + MARGIN_S - deadline) > 1e-6:
        assert (preemption.reason_to_drop() is None) == (finished + MARGIN_S < deadline)


# --- signals


@pytest.fixture
def installed() -> Iterator[Preemption]:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
    preemption = Preemption(CheckpointConfig(grace_s=50, term_grace_s=10), {})
    preemption.install()
    yield preemption
    preemption.uninstall()
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_is_a_wish(installed: Preemption, number: signal.Signals) -> None:
    installed.arm(root=True, stop_file=Path("/nowhere/stop"))
    os.kill(os.getpid(), number)
    assert installed.reason_to_stop() == f"signal {number.name}"
    assert installed.wish is not None
    left = installed.wish.deadline_s - time.monotonic()
    assert (5 < left <= 10) if number == signal.SIGTERM else (40 < left <= 50)


def test_before_the_first_round_it_ends_the_run_at_once(installed: Preemption) -> None:
    with pytest.raises(PreemptedError, match="signal SIGUSR2 before the first round") as caught:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert caught.value.exit_code == ExitCode.RUN_AGAIN
