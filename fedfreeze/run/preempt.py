"""When to save and leave: signals, the job's end, a file in the run folder. Knows nothing of ranks."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfreeze.comm.signals import put_back, set_handler
from fedfreeze.comm.slurm import seconds_left
from fedfreeze.config.schema import CheckpointConfig
from fedfreeze.errors import PreemptedError

# What a round needs beyond its usual time, and the way out: so early is it dropped or not begun.
_MARGIN_S = 3.0

# How often the run folder is searched for the files `save` and `stop`.
_FILE_S = 1.0

# Of the rounds before, the longest of so many is what the next is expected to take.
_REMEMBERED_ROUNDS = 5


@dataclass(frozen=True)
class Wish:
    """That the run shall save and leave, and until when (on the monotonic clock)."""

    reason: str
    deadline_s: float


class Preemption:
    """What this rank knows of the end that is near. Rank 0 hears the wishes of all and decides; see Lifeline.

    A wish is obeyed at the end of the round, or by dropping the round if there is no time for the rest of it.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        environment: Mapping[str, str],
        *,
        now: Callable[[], float] = time.monotonic,
    ):
        self.config = config
        self.now = now
        self.environment = environment
        self.wish: Wish | None = None
        self.end_s = math.inf
        """When the job ends, on the monotonic clock."""
        self.stop_file: Path | None = None
        self._started = now()
        self._armed = False
        self._before: dict[int, Any] = {}
        self._rounds: list[float] = []
        self._began: float | None = None
        self._told: Wish | None = None
        self._next_look = -math.inf

    def install(self) -> None:
        """Take SIGUSR1, SIGUSR2, SIGTERM and SIGHUP as wishes: before the first round they end the run at once.

        In a thread that is not the main one it goes without them: the file `stop` ends the run all the same.
        """
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = set_handler(number, self._signalled)

    def uninstall(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            put_back(number, handler)

    def _signalled(self, number: int, frame: object) -> None:
        urgent = number in (signal.SIGTERM, signal.SIGHUP)
        again = self.wish is not None
        self.hear(f"signal {signal.Signals(number).name}", self.config.term_grace_s if urgent else self.config.grace_s)
        if not self._armed and not again:  # a second one must not break into the way out after the first
            raise PreemptedError(f"{self.wish.reason if self.wish else 'a signal'} before the first round")

    def arm(self, *, root: bool, stop_file: Path) -> None:
        """From now on wishes are noted and obeyed at the right moment; rank 0 also watches the job's end and a file."""
        if root:
            self.stop_file = stop_file
            limit = math.inf if self.config.time_limit_s is None else self.config.time_limit_s
            self.end_s = min(self._started + limit, self.now() + seconds_left(self.environment))
        self._armed = True

    def hear(self, reason: str, grace_s: float) -> None:
        """Note a wish; of several the most urgent counts."""
        wish = Wish(reason, self.now() + grace_s)
        if self.wish is None or wish.deadline_s < self.wish.deadline_s:
            self.wish = wish

    def round_begins(self) -> None:
        """Note that a round is begun."""
        self._began = self.now()

    def round_ends(self) -> None:
        """Note that it has ended."""
        if self._began is not None:
            self._rounds = [*self._rounds, self.now() - self._began][-_REMEMBERED_ROUNDS:]
        self._began = None

    def remember(self, round_s: float) -> None:
        """Take over how long rounds took before a restart; 0: not known."""
        if round_s > 0:
            self._rounds = [round_s]

    @property
    def round_s(self) -> float:
        """Seconds that a round is expected to take; 0 before the first."""
        return max(self._rounds, default=0.0)

    def reason_to_stop(self) -> str | None:
        """Return why the run shall leave between two rounds; None: go on."""
        self._look_for_file()
        if self.wish is not None:
            return self.wish.reason
        left = self.end_s - self.now()
        began = self._began
        needed = max(self.round_s, 0.0 if began is None else self.now() - began)
        if left >= needed + _MARGIN_S:
            return None
        if needed:
            return f"the time ends in {max(left, 0):.0f} s, and a round takes up to {needed:.0f} s"
        return f"the time ends in {max(left, 0):.0f} s, before a first round can be done; give the job more"

    def reason_to_drop(self) -> str | None:
        """Return why the round in progress shall be dropped: there is no time for the rest of it. None: go on."""
        self._look_for_file()
        began = self._began  # the other thread may change it
        if began is None:
            return None
        rest = max(self.round_s - (self.now() - began), 0.0)
        deadline = min(self.end_s, math.inf if self.wish is None else self.wish.deadline_s)
        if self.now() + rest + _MARGIN_S <= deadline:
            return None
        reason = "the time ends" if self.wish is None else self.wish.reason
        needs = f"{rest:.0f} s more" if rest or self._rounds else "longer"
        return f"{reason}, {max(deadline - self.now(), 0):.0f} s are left and the round needs {needs}"

    def message(self, *, root: bool) -> dict[str, str | float] | None:
        """Return what this rank has to tell by the lifeline: its own wish, once; rank 0, that the round is dropped."""
        if root:
            reason = self.reason_to_drop()
            return None if reason is None else {"drop": reason}
        wish = self.wish
        if wish is None or wish is self._told:
            return None
        self._told = wish
        return {"wish": wish.reason, "grace_s": wish.deadline_s - self.now()}

    def _look_for_file(self) -> None:
        if self.stop_file is None or self.now() < self._next_look:
            return
        self._next_look = self.now() + _FILE_S
        with contextlib.suppress(OSError):  # a network file system that stutters: look again in a second
            there = self.stop_file.exists()
            if not there or self.wish is not None:
                return
            self.hear(f"the file {self.stop_file}", self.config.grace_s)
