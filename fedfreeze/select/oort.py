"""Oort's participant selector (Lai et al., OSDI 2021): loss times speed, with exploration and a pacer."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.messages import DeviceReport
from fedfreeze.seeds import numpy_generator
from fedfreeze.select.base import Selector, Situation
from fedfreeze.select.dealing import speed_factor, trainable, weighted_draw


class Oort(Selector):
    """Exploits devices of high utility, explores fast ones that never trained.

    Lai, Zhu, Madhyastha, Chowdhury, "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021,
    Algorithm 1. Utility of a device that trained: U + sqrt(0.1 log R / L), with U = |B| sqrt(1/|B| sum of loss^2) of
    its last training, R this round and L the round of that training; times (T / t)^alpha where it takes t > T seconds.

    As in the authors' code, not in the paper: U is clipped, then scaled to 0..1 over the candidates before the second
    term is added (which would vanish beside U otherwise); T is a percentile of durations, and the pacer moves the
    percentile; where nobody is left to explore, all slots exploit.
    Other than in both [ours]: U is over all samples of the last training (the code keeps the last batch's loss); T is a
    percentile of the candidates' durations, which are predicted, not measured, so untried devices have one, too;
    exploration draws with probability proportional to 1 / t (paper: "by speed"; code: by size, and speed above T);
    `cutoff` limits the draw strictly (code: at least ten times as many are admitted). The pacer looks every W rounds
    (as the code; the paper: in every round) and relaxes when utility fell (as the paper; the code: when it is flat),
    and starts anew with a stage, as losses of two stages do not compare. The blocklist gives back those that trained
    least often where fewer candidates than slots would remain. Draws go by exponential races. A device that failed has
    utility 0; devices without data to train on are taken only where nobody else is left.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.settings = config.select
        self.percentile = config.select.preferred_percentile
        self.utility: dict[int, float] = {}  # device -> U of its last training
        self.trained_at: dict[int, int] = {}  # device -> round of its last training
        self.times: dict[int, int] = {}  # device -> how often it trained
        self.gained: list[float] = []  # sum of U of a round's devices, of at most two windows of the pacer
        self.stage = 0

    def prepare(self, situation: Situation) -> None:
        """See Selector."""
        super().prepare(situation)
        if situation.stage != self.stage:
            self.stage = situation.stage
            self.gained.clear()

    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """See Selector."""
        able, last = trainable(self.situation.samples, candidates)
        able = self._not_blocked(able, count)
        slots = min(count, len(able))
        tried = [device for device in able if device in self.utility]
        untried = [device for device in able if device not in self.utility]
        explore = min(int(slots * self._exploration(round_number)), len(untried))
        exploit = min(slots - explore, len(tried))
        generator = numpy_generator(self.config.seed, "select", round_number)
        chosen = self._exploit(tried, self._scores(tried, able, round_number), exploit, generator)
        speed = 1 / np.maximum(self.situation.seconds[np.asarray(untried, dtype=np.int64)], 1e-9)
        chosen += [untried[i] for i in weighted_draw(generator, speed, slots - exploit)]
        return sorted([*chosen, *last[: max(0, count - len(chosen))]])

    def _exploration(self, round_number: int) -> float:
        settings = self.settings
        falling = settings.exploration_start * settings.exploration_decay ** (round_number - 1)
        return max(falling, settings.exploration_floor)

    def _not_blocked(self, devices: Sequence[int], count: int) -> list[int]:
        """Leave out devices that trained often, but never so many that fewer than `count` remain."""
        limit = self.settings.blocklist_rounds
        often = [device for device in devices if limit is not None and self.times.get(device, 0) >= limit]
        often.sort(key=lambda device: (self.times[device], device))
        blocked = set(often[max(0, count - (len(devices) - len(often))) :])
        return [device for device in devices if device not in blocked]

    def _scores(self, tried: Sequence[int], able: Sequence[int], round_number: int) -> np.ndarray:
        """Return the utility, with its temporal uncertainty and the penalty of slow ones, of devices that trained."""
        if not tried:
            return np.zeros(0)
        utility = np.array([self.utility[device] for device in tried])
        utility = np.minimum(utility, np.percentile(utility, self.settings.clip_percentile))
        # 0.999: as in the authors' code, the lowest is a little over zero
        low = 0.999 * utility.min()
        scores = (utility - low) / max(utility.max() - low, 1e-4)
        trained_at = np.array([self.trained_at[device] for device in tried])
        scores = scores + np.sqrt(0.1 * math.log(round_number) / trained_at)
        preferred_s = float(np.percentile(self.situation.seconds[np.asarray(able, dtype=np.int64)], self.percentile))
        seconds = self.situation.seconds[np.asarray(tried, dtype=np.int64)]
        return np.asarray(scores * speed_factor(seconds, preferred_s, self.settings.speed_exponent))

    def _exploit(
        self, tried: Sequence[int], scores: np.ndarray, number: int, generator: np.random.Generator
    ) -> list[int]:
        """Draw by utility among those with at least `cutoff` x the utility of the number-th."""
        if not number:
            return []
        least = self.settings.cutoff * np.sort(scores)[-number]
        pool = np.flatnonzero(scores >= least)
        return [tried[pool[i]] for i in weighted_draw(generator, scores[pool], number)]

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Take the losses that training showed, and let the pacer look at what was gained."""
        gained = 0.0
        for report in reports:
            if report.left_out:
                continue  # it was too late to tell anything
            failed = report.failed is not None or report.squared_loss is None
            utility = 0.0 if failed else report.samples * math.sqrt(report.squared_loss or 0.0)
            self.utility[report.device] = utility
            self.trained_at[report.device] = self.situation.round
            self.times[report.device] = self.times.get(report.device, 0) + 1
            gained += utility
        self.gained.append(gained)
        window = self.settings.pacer_rounds
        if len(self.gained) == 2 * window:
            if sum(self.gained[window:]) < sum(self.gained[:window]):
                self.percentile = min(100.0, self.percentile + self.settings.pacer_step)
            del self.gained[:window]

    def state_dict(self) -> dict[str, Any]:
        """See Selector."""
        devices = sorted(self.utility)
        return {
            "devices": [[d, self.utility[d], self.trained_at[d], self.times[d]] for d in devices],
            "percentile": self.percentile,
            "gained": list(self.gained),
            "stage": self.stage,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Selector."""
        self.utility = {device: utility for device, utility, _, _ in state["devices"]}
        self.trained_at = {device: when for device, _, when, _ in state["devices"]}
        self.times = {device: times for device, _, _, times in state["devices"]}
        self.percentile = state["percentile"]
        self.gained = list(state["gained"])
        self.stage = state["stage"]
