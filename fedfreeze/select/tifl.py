"""TiFL's participant selector (Chai et al., HPDC 2020): each round one tier of devices of alike speed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.messages import DeviceReport
from fedfreeze.seeds import numpy_generator
from fedfreeze.select.base import Selector, Situation
from fedfreeze.select.dealing import trainable, weighted_draw


class TiFL(Selector):
    """Draws a tier of devices of alike speed, and the participants in it at random, so that nobody waits for slow ones.

    Chai et al., "TiFL: A Tier-based Federated Learning System", HPDC 2020, with adaptive tier selection: tiers have
    credits, and every I rounds, if the tier drawn last got no better, probabilities follow from the tiers' ranks.

    Deviations [ours]: the paper ranks tiers by accuracy on test data of each tier, which the server has not; here by
    the mean training loss that the tier's devices told last, highest first, unknown before all. Durations are
    predicted, not profiled, and change with the stage, so tiers are made anew of the candidates at each stage's first
    round; others join the tier of their duration when first seen. Where a tier has too few candidates, neighbours fill
    up (the nearest first, the faster of two). Where no tier with candidates has credits left, credits do not bind.
    Devices without data to train on belong to no tier, and are taken only where nobody else is left.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.tiers = config.select.tiers
        self.rounds = config.select.tier_rounds
        credits = config.select.tier_credits or math.ceil(2 * config.train.rounds / self.tiers)
        self.credits = [credits] * self.tiers
        self.stage = 0
        self._forget_tiers()

    def _forget_tiers(self) -> None:
        self.starts: list[float] = []  # seconds of the fastest device of each tier but the first
        self.tier: dict[int, int] = {}  # device -> tier, 0: the fastest
        self.probabilities: list[float] = []
        self.losses: list[float | None] = []  # of each tier, as its devices told last
        self.losses_before: list[float | None] = []  # the same `rounds` ago
        self.drawn: int | None = None

    def prepare(self, situation: Situation) -> None:
        """See Selector."""
        super().prepare(situation)
        if situation.stage != self.stage:
            self.stage = situation.stage
            self._forget_tiers()

    def _make_tiers(self, devices: Sequence[int]) -> None:
        """Cut devices, sorted by seconds, into tiers of equal size."""
        by_speed = sorted(devices, key=lambda device: (self.situation.seconds[device], device))
        number = min(self.tiers, len(by_speed))
        cut = [[int(device) for device in part] for part in np.array_split(by_speed, number)]
        self.tier = {device: tier for tier, members in enumerate(cut) for device in members}
        self.starts = [float(self.situation.seconds[members[0]]) for members in cut[1:]]
        self.probabilities = [1 / number] * number
        self.losses = [None] * number
        self.losses_before = [None] * number

    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """See Selector."""
        able, last = trainable(self.situation.samples, candidates)
        if not able:
            return sorted(last[:count])
        if not self.tier:
            self._make_tiers(able)
        members: list[list[int]] = [[] for _ in self.probabilities]
        for device in able:
            joined = int(np.searchsorted(self.starts, self.situation.seconds[device], side="right"))
            members[self.tier.setdefault(device, joined)].append(device)
        generator = numpy_generator(self.config.seed, "select", round_number)
        drawn = self._draw(members, generator)
        self.drawn = drawn
        self.credits[drawn] = max(0, self.credits[drawn] - 1)
        chosen: list[int] = []
        for tier in sorted(range(len(members)), key=lambda tier: (abs(tier - drawn), tier)):
            size = min(count - len(chosen), len(members[tier]))
            chosen += [members[tier][i] for i in generator.choice(len(members[tier]), size=size, replace=False)]
            if len(chosen) == count:
                break
        return sorted([*chosen, *last[: count - len(chosen)]])

    def _draw(self, members: Sequence[Sequence[int]], generator: np.random.Generator) -> int:
        """Draw a tier that has candidates and credits."""
        present = [tier for tier, devices in enumerate(members) if devices]
        allowed = [tier for tier in present if self.credits[tier]] or present
        weights = np.array([self.probabilities[tier] for tier in allowed])
        if not weights.any():
            weights[:] = 1.0
        return allowed[int(weighted_draw(generator, weights, 1)[0])]

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Take the losses that training showed; every `tier_rounds` rounds of a stage, see to the probabilities."""
        for tier in range(len(self.losses)):
            told = [
                (report.samples, report.loss)
                for report in reports
                if report.failed is None and report.loss is not None and self.tier.get(report.device) == tier
            ]
            samples = sum(number for number, _ in told)
            if samples:
                self.losses[tier] = sum(number * loss for number, loss in told) / samples
        if self.situation.stage_round % self.rounds == 0 and self.drawn is not None:
            now, before = self.losses[self.drawn], self.losses_before[self.drawn]
            if now is None or before is None or now >= before:
                self.probabilities = tier_probabilities(self.losses, self.credits)
            self.losses_before = list(self.losses)

    def state_dict(self) -> dict[str, Any]:
        """See Selector."""
        return {
            "credits": list(self.credits),
            "stage": self.stage,
            "starts": list(self.starts),
            "tier": sorted(self.tier.items()),
            "probabilities": list(self.probabilities),
            "losses": list(self.losses),
            "losses_before": list(self.losses_before),
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Selector."""
        self.stage = state["stage"]
        for name in ("credits", "starts", "probabilities", "losses", "losses_before"):
            setattr(self, name, list(state[name]))
        self.tier = dict(state["tier"])
        self.drawn = state["drawn"]


def tier_probabilities(losses: Sequence[float | None], credits: Sequence[int]) -> list[float]:
    """Return each tier's probability: the higher its loss (None: unknown, the highest), the likelier.

    TiFL, Algorithm 2: (n - i) / (n (n + 1) / 2) for the i-th, from 0, of the n tiers that have credits; 0 without.
    """
    known = [math.inf if loss is None else loss for loss in losses]
    ranked = sorted(range(len(losses)), key=lambda tier: -known[tier])
    left = [tier for tier in ranked if credits[tier]]
    n = len(left)
    probabilities = [0.0] * len(losses)
    for i, tier in enumerate(left):
        probabilities[tier] = (n - i) / (n * (n + 1) / 2)
    return probabilities
