"""The pace controller: decides at run time when a block has converged and is frozen."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfreeze.config.schema import PaceConfig
from fedfreeze.plugins import choose_class, own_code

_CHUNK_ELEMENTS = 1 << 18  # keeps the temporaries of a perturbation in cache, however large the block


def block_perturbation(updates: Sequence[np.ndarray]) -> float:
    """Return P = sum_s |sum_q U_q,s| / sum_s sum_q |U_q,s| of a window of updates (flat float32), in [0, 1].

    1: every scalar keeps moving one way; Q independent zero-mean updates give about 1/sqrt(Q). No update at all counts
    as 0. [paper: a measure at the level of single scalars; the formula is ours, after APF's effective perturbation]
    """
    net = travelled = 0.0
    for begin in range(0, len(updates[0]), _CHUNK_ELEMENTS):
        piece = np.stack([update[begin : begin + _CHUNK_ELEMENTS] for update in updates]).astype(np.float64)
        net += float(np.abs(piece.sum(axis=0)).sum())
        travelled += float(np.abs(piece).sum())
    return min(1.0, net / travelled) if travelled > 0 else 0.0  # the two sums round apart


class PerturbationWindow:
    """The last Q updates of what the stage freezes, cleared when a stage begins."""

    def __init__(self, window: int):
        self.window = window
        self.updates: deque[tuple[int, np.ndarray]] = deque(maxlen=window)

    def clear(self) -> None:
        """Forget the updates of the stage before."""
        self.updates.clear()

    def push(self, round_number: int, update: np.ndarray) -> float | None:
        """Add a round's update and return the perturbation; None before the window is full."""
        self.updates.append((round_number, update))
        if len(self.updates) < self.window:
            return None
        return block_perturbation([update for _, update in self.updates])


@dataclass(frozen=True)
class StageRound:
    """What the pace controller sees of a round."""

    stage: int
    stage_round: int
    """Rounds of this stage so far, this one included."""
    perturbation: float | None
    """None: the window is not full, or the round is sparse: too few devices completed (`pace.min_share`)."""
    train_loss: float | None
    """None: the round is sparse."""


@dataclass(frozen=True)
class PaceDecision:
    """Freeze or not, why (converged | fixed | round_limit), and the slope that was looked at."""

    freeze: bool
    reason: str | None = None
    slope: float | None = None


class PacePolicy(ABC):
    """One rule for when a block is frozen: a plain object, told every round, asked nothing else."""

    def __init__(self, config: PaceConfig, total_rounds: int, active_parameters: Sequence[int]):
        """`active_parameters`: how many each stage freezes."""
        self.config = config
        self.total_rounds = total_rounds
        self.active_parameters = active_parameters
        self.history: list[float] = []
        """What a policy remembers of the stage; it is in every checkpoint, so keep only what is still looked at."""
        self.checks_passed = 0

    def observe(self, seen: StageRound) -> PaceDecision:
        """Return the decision after a round; forgets the stage when it ends."""
        decision = self.decision_after(seen)
        limit = self.config.max_rounds
        if not decision.freeze and limit is not None and seen.stage_round >= limit:
            decision = PaceDecision(True, "round_limit", decision.slope)
        if decision.freeze:
            self.history.clear()
            self.checks_passed = 0
        return decision

    @abstractmethod
    def decision_after(self, seen: StageRound) -> PaceDecision:
        """Return whether to freeze after this round; `passed` counts checks that hold in a row."""

    def passed(self, holds: bool, seen: StageRound, slope: float | None) -> PaceDecision:
        """Count checks in a row, and freeze after enough of them."""
        self.checks_passed = self.checks_passed + 1 if holds and seen.stage_round >= self.config.min_rounds else 0
        freeze = self.checks_passed >= self.config.checks
        return PaceDecision(freeze, "converged" if freeze else None, slope)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"history": list(self.history), "checks_passed": self.checks_passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.history = list(state["history"])
        self.checks_passed = state["checks_passed"]


def slope_per_round(values: Sequence[float]) -> float:
    """Return the least-squares slope of values at rounds 0, 1, 2, ..."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float((x * np.asarray(values)).sum() / (x * x).sum())


class Perturbation(PacePolicy):
    """Freeze when block perturbation is low and flat. [paper: watched per block; the criterion is ours]

    Low: under max(rho x highest of the stage, noise_level / sqrt(Q)); flat: the least-squares slope of the last W
    values within +-phi; both for C rounds in a row.
    """

    def decision_after(self, seen: StageRound) -> PaceDecision:
        """See PacePolicy."""
        config = self.config
        if seen.perturbation is None:
            return self.passed(False, seen, None)
        self.history.append(seen.perturbation)
        self._forget()
        if len(self.history) < config.slope_window:
            return self.passed(False, seen, None)
        slope = slope_per_round(self.history[-config.slope_window :])
        level = max(config.relative_level * max(self.history), config.noise_level / math.sqrt(config.window))
        return self.passed(seen.perturbation < level and abs(slope) <= config.slope_limit, seen, slope)

    def _forget(self) -> None:
        """Keep of the stage's history what is still looked at: its highest value and the last W.

        With all of it, each round and each checkpoint would cost more than the one before.
        """
        window = self.config.slope_window
        if len(self.history) > window + 1:
            highest = max(self.history)
            self.history = self.history[-window:]
            if highest not in self.history:
                self.history.insert(0, highest)


class Plateau(PacePolicy):
    """Freeze when the training loss has stopped falling. [ours, for comparison]"""

    def decision_after(self, seen: StageRound) -> PaceDecision:
        """See PacePolicy."""
        if seen.train_loss is None:
            return self.passed(False, seen, None)
        self.history.append(seen.train_loss)
        span = self.config.slope_window
        del self.history[:-span]  # what is older is not looked at any more
        if len(self.history) < span:
            return self.passed(False, seen, None)
        recent = self.history[-span:]
        slope = slope_per_round(recent)
        fall = -slope * (span - 1) / max(float(np.mean(recent)), 1e-12)
        return self.passed(fall <= self.config.improvement, seen, slope)


class _Budget(PacePolicy):
    """Freeze after a number of rounds known beforehand."""

    @abstractmethod
    def budgets(self) -> list[int]:
        """Return the rounds of each stage."""

    def decision_after(self, seen: StageRound) -> PaceDecision:
        """See PacePolicy."""
        freeze = seen.stage_round >= self.budgets()[seen.stage]
        return PaceDecision(freeze, "fixed" if freeze else None)


class Fixed(_Budget):
    """`train.rounds` split equally over the stages; the first stages get what does not divide."""

    def budgets(self) -> list[int]:
        """See _Budget."""
        return _share_out(self.total_rounds, [1] * len(self.active_parameters))


class Proportional(_Budget):
    """`train.rounds` in proportion to the parameters of the blocks, at least one each."""

    def budgets(self) -> list[int]:
        """See _Budget."""
        return _share_out(self.total_rounds, self.active_parameters)


def _share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` by weights (largest remainder, ties to the first), at least one each where there are enough."""
    floor = 1 if total >= len(weights) else 0
    free = total - floor * len(weights)
    exact = [free * weight / sum(weights) for weight in weights]
    shares = [floor + int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(exact[i] % 1), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


POLICIES: dict[str, type[PacePolicy]] = {
    "perturbation": Perturbation,
    "fixed": Fixed,
    "proportional": Proportional,
    "plateau": Plateau,
}


def make_policy(config: PaceConfig, total_rounds: int, active_parameters: Sequence[int]) -> PacePolicy:
    """Return the configured policy, registered or the user's own. Raises ConfigError."""
    key, name = "pace.policy", config.policy
    with own_code(key, name):
        return choose_class(key, name, POLICIES, PacePolicy)(config, total_rounds, active_parameters)
