"""Rank 0's mind: participant selector, pace controller, emulated clock. Pure: no collectives, no wall time."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs
from fedfreeze.device.probe import LOSSES
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet
from fedfreeze.messages import Assignment, DeviceReport, LeftOut, ProbePlan, RoundPlan, Verdict
from fedfreeze.methods.aggregate import device_weight, fraction_bits
from fedfreeze.plugins import is_own, own_code
from fedfreeze.select import Probes, Situation, make_selector
from fedfreeze.server.asking import groups_to_ask
from fedfreeze.server.clock import EmulatedClock
from fedfreeze.server.pace import PaceDecision, StageRound, make_policy
from fedfreeze.units import MIB

# How much more work than its share a rank may have, so that a device stays with it.
_UNEVEN = 1.1


class Coordinator:
    """Plans each round and judges it. Its state is small and plain; a checkpoint holds all of it."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        samples: Sequence[int],
        costs: Costs,
        *,
        world_size: int = 1,
        paced: bool = True,
    ):
        self.config = config
        self.fleet = fleet
        self.samples = samples
        self.costs = costs
        self.world_size = world_size
        self.paced = paced
        pace = config.pace if paced else replace(config.pace, policy="fixed", max_rounds=None)
        self.policy = pace.policy
        self._check_rounds()
        self.eligible = [fleet.eligible(needed) for needed in costs.needed_bytes]
        self._check_stages_fit()
        self.able = [self._able(stage) for stage in range(len(costs.stages))]
        self.selector = make_selector(config)
        self.clock = EmulatedClock(fleet, samples, costs, config.train, config.data.view_count or 1)
        self._check_deadline()
        self.pace = make_policy(pace, config.train.rounds, [cost.watched_parameters for cost in costs.stages])
        self.round = 0
        self.stage = 0
        self.stage_round = 0
        self.ended = False
        self.candidates: list[int] = []
        self.expected = 1  # devices that this round would have at best
        self.homes: dict[int, int] = {}  # which rank trained a device last; no checkpoint has it, as no result needs it
        self.ran_out: set[int] = set()  # devices that really ran out in this stage, whatever was predicted
        self.trained: set[int] = set()
        self.peak_bytes = 0
        self.peak_sum_bytes = 0
        self.device_rounds = 0
        self.stage_device_rounds = 0  # of these, in this stage
        self.last_failure: str | None = None  # why devices failed in the last round in which any did
        self.small_batch_rounds = 0  # of these, by devices with fewer samples than a batch: their peaks are lower

    def _check_rounds(self) -> None:
        stages, rounds = len(self.costs.stages), self.config.train.rounds
        if self.policy in ("fixed", "proportional") and rounds < stages:
            raise ConfigError(
                f"train.rounds: {rounds} is less than the {stages} stages, and pace.policy "
                f"{self.policy} gives each at least one round"
            )

    def _check_stages_fit(self) -> None:
        for levels, devices in zip(self.costs.levels, self.eligible, strict=True):
            if not devices:
                largest = max(cap for cap in self.fleet.memory_cap_bytes if cap is not None) / MIB
                raise ConfigError(
                    f"no device holds stage {levels[0].name!r}: it needs {_up(levels[0].least_bytes)} MiB at batch "
                    f"{self.config.train.batch_size}, the largest cap is {math.floor(largest * 100 + 0.01) / 100} MiB; "
                    f"the smallest cap that holds every stage is {_up(self._smallest_cap())} MiB "
                    "(raise fleet.memory_cap_mib, lower train.batch_size or model.width, or try train.fit=auto)"
                )

    def _able(self, stage: int) -> list[int]:
        """Return the devices that can train in a stage: enough samples, and by `select.memory` a cap that holds it.

        Raises ConfigError if there is none that has both.
        """
        least = self.costs.least_samples[stage]
        held = self._with_samples(self.eligible[stage], least)
        if not held:
            needed = f"{least} samples, as batch normalisation does" if least > 1 else "a sample"
            most = max(self.samples[device] for device in self.eligible[stage])
            raise ConfigError(
                f"stage {self.costs.stages[stage].name!r}: none of the {len(self.eligible[stage])} devices whose cap "
                f"holds it can train, as that takes {needed}, and they have {most} at most (lower "
                "fleet.devices, or raise data.alpha or fleet.memory_cap_mib)"
            )
        if self.config.select.memory:
            return held
        return self._with_samples(range(len(self.fleet)), least)

    def _with_samples(self, devices: Iterable[int], least: int) -> list[int]:
        return [device for device in devices if self.samples[device] >= least]

    @property
    def trainable(self) -> set[int]:
        """The devices whose cap holds some stage for which they have enough samples."""
        return {
            device
            for devices, least in zip(self.eligible, self.costs.least_samples, strict=True)
            for device in self._with_samples(devices, least)
        }

    def _check_deadline(self) -> None:
        limit = self.config.train.deadline_s
        if limit is None:
            return
        for stage, devices in enumerate(self.able):
            self.clock.enter_stage(stage)
            seconds = self.clock.round_seconds()
            fastest = min(float(seconds[device]) for device in devices)
            if fastest > limit:
                raise ConfigError(
                    f"train.deadline_s: {limit:g} s is too short for stage {self.costs.stages[stage].name!r}, which "
                    f"takes the fastest device that holds it {fastest:.3g} s (raise it, or lower train.local_epochs)"
                )
        self.clock.enter_stage(0)

    def _smallest_cap(self) -> int:
        return max(self.costs.needed_bytes)

    def begin_round(self) -> None:
        """Find out who can be selected, and tell the selector. Raises ConfigError if nobody is left."""
        self.round += 1
        self.stage_round += 1
        select = self.config.select
        barred = self._barred()
        left = [device for device in self.able[self.stage] if not barred[device]]
        if not left:
            cost = self.costs.levels[self.stage][0]
            raise ConfigError(
                f"every device that should hold stage {cost.name!r} ({cost.least_bytes / MIB:.1f} MiB predicted) ran "
                "out of memory in it; raise fleet.memory_cap_mib"
            )
        self.expected = min(self.config.train.participants, len(left))
        self.candidates = self.clock.wait_for(left)
        with own_code("select.name", select.name):
            self.selector.prepare(
                Situation(self.round, self.stage, self.stage_round, self.clock.samples, self.clock.round_seconds())
            )

    def _barred(self) -> np.ndarray:
        """Return who ran out in this stage, or has no more memory and no smaller batch than one that did."""
        barred = np.zeros(len(self.fleet), dtype=bool)
        barred[list(self.ran_out)] = True
        if not self.ran_out or not self.config.select.memory_correction:
            return barred
        caps = np.array([math.inf if cap is None else cap for cap in self.fleet.memory_cap_bytes])
        batches = np.minimum(self.clock.samples, self.config.train.batch_size)
        levels = self.clock.level
        for cap, batch, level in {(caps[d], batches[d], levels[d]) for d in self.ran_out}:
            if math.isfinite(cap):
                barred |= (caps <= cap) & (batches >= batch) & (levels == level)
        return barred

    def ask(self) -> ProbePlan | None:
        """Return which devices the selector wants to ask before it chooses; None: it asks none."""
        name, count = self.config.select.name, self._asked_for()
        with own_code("select.name", name):
            request = self.selector.wanted(self.candidates, count)
        if request is None or not request.devices:
            return None
        devices = self.clock.probe(sorted(request.devices), LOSSES + request.signature_size)
        groups = groups_to_ask(
            devices,
            self.samples,
            self.fleet.memory_cap_bytes,
            most_samples=self.config.eval.batch_size,  # a forward pass of as many is made in any case
            world_size=self.world_size,
        )
        return ProbePlan(self.round, self.stage, groups, request.signature_size)

    def learn(self, probes: Probes) -> None:
        """Pass on what the devices told."""
        with own_code("select.name", self.config.select.name):
            self.selector.learn(probes)

    def _asked_for(self) -> int:
        """How many devices are selected, so that `train.participants` finish."""
        return math.ceil(self.config.train.participants * self.config.train.over_selection)

    def plan_round(self) -> RoundPlan:
        """Return the plan of the round that has begun."""
        participants = self.config.train.participants
        chosen = self._select(self.candidates)
        finish = self.clock.finish(chosen, participants)
        weights = [device_weight(self.config.method.weights, self.samples[device]) for device in finish.in_time]
        caps = self.fleet.memory_cap_bytes
        return RoundPlan(
            round=self.round,
            stage=self.stage,
            stage_round=self.stage_round,
            assignments=self._assign(finish.in_time),
            learning_rate=self._learning_rate(),
            fraction_bits=fraction_bits(sum(weights)),
            left_out=tuple(LeftOut(d, self.samples[d], caps[d], reason) for d, reason in sorted(finish.late.items())),
        )

    def _select(self, candidates: Sequence[int]) -> list[int]:
        """Ask the selector, and hold a selector of the user's own to its promise. Raises ConfigError."""
        key, name, count = "select.name", self.config.select.name, self._asked_for()
        with own_code(key, name):
            chosen = self.selector.select(self.round, candidates, count)
            devices = [] if chosen is None else [int(device) for device in chosen]
        different = set(devices)
        if not 1 <= len(devices) <= count or len(different) < len(devices) or not different <= set(candidates):
            raise ConfigError(
                f"{key}: {name} returned {devices[:20] or chosen} in round {self.round}; it must return 1 to {count} "
                f"different devices of the {len(candidates)} candidates"
            )
        return devices

    def _assign(self, devices: Sequence[int]) -> tuple[Assignment, ...]:
        """Give the device with most work, by its operations, to the rank with least; the result does not depend on it.

        Where ranks keep features, a device stays with the rank that has them, unless that would have much more work
        than the others.
        """
        flops = self.clock.train_flops
        work = {device: float(flops[device]) for device in devices}
        load = [0.0] * self.world_size
        most = _UNEVEN * sum(work.values()) / self.world_size
        ranks = {}
        for device in sorted(devices, key=lambda d: (-work[d], d)):
            rank = min(range(self.world_size), key=lambda r: (load[r], r))
            home = self.homes.get(device)
            if home is not None and load[home] + work[device] <= most:
                rank = home
            ranks[device] = rank
            load[rank] += work[device]
        if self.config.cache.features:
            self.homes |= ranks
        caps = self.fleet.memory_cap_bytes
        level, stores = self.clock.level, self.clock.stores()
        ways = [way.way.name for way in self.costs.levels[self.stage][0].ways]
        return tuple(
            Assignment(d, ranks[d], caps[d], int(level[d]), ways[self.clock.way[d]], bool(stores[d]))
            for d in sorted(devices)
        )

    def _learning_rate(self) -> float:
        train = self.config.train
        if train.schedule == "cosine":
            return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.round - 1) / train.rounds))
        return train.learning_rate

    def is_sparse(self, reports: Sequence[DeviceReport]) -> bool:
        """Tell whether so few devices completed that the round says nothing of convergence. [ours]

        Too few are none, or less than `pace.min_share` of `train.participants`; of all devices that can train in the
        stage where those are fewer, whether they are available or not.
        """
        completed = sum(report.failed is None for report in reports)
        return completed == 0 or completed < self.config.pace.min_share * self.expected

    def judge(self, reports: Sequence[DeviceReport], perturbation: float | None) -> Verdict:
        """Learn from a round and decide what follows. `reports` in the order of device numbers."""
        with own_code("select.name", self.config.select.name):
            self.selector.observe(reports)
        self.clock.end_round(reports)
        self.ran_out.update(self.clock.next_way([report.device for report in reports if report.out_of_memory]))
        completed = [report for report in reports if report.failed is None]
        for report in completed:
            self.trained.add(report.device)
            self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
            self.peak_sum_bytes += report.peak_bytes
            self.small_batch_rounds += report.samples < self.config.train.batch_size
        self.device_rounds += len(completed)
        self.stage_device_rounds += len(completed)
        self._note_failure(reports)
        sparse = self.is_sparse(reports)
        if sparse:
            perturbation = None
        loss = None if sparse else train_loss(reports)
        with own_code("pace.policy", self.policy):
            decision = self.pace.observe(StageRound(self.stage, self.stage_round, perturbation, loss))
        if decision.freeze and not self.stage_device_rounds and decision.reason not in ("fixed", "round_limit"):
            decision = PaceDecision(False, slope=decision.slope)  # whatever the user's own policy makes of no evidence
        out_of_rounds = self.round >= self.config.train.rounds
        end_stage = (decision.reason or "converged") if decision.freeze else ("round_limit" if out_of_rounds else None)
        stop = out_of_rounds or (end_stage is not None and self.stage == len(self.costs.stages) - 1)
        self.ended = stop
        evaluate = end_stage is not None or self.round % self.config.eval.every_rounds == 0
        return Verdict(
            end_stage=end_stage,
            stop=stop,
            evaluate=evaluate,
            evaluate_sampled=not evaluate and self.config.eval.samples is not None,
            checkpoint=end_stage is not None or self.round % self.config.checkpoint.every_rounds == 0,
            perturbation=perturbation,
            slope=decision.slope,
            sparse=sparse,
        )

    def _note_failure(self, reports: Sequence[DeviceReport]) -> None:
        reasons = Counter(report.failed for report in reports if report.failed is not None)
        if reasons:
            self.last_failure = reasons.most_common(1)[0][0]

    def check_learned(self) -> None:
        """Raise ConfigError if no device completed any round of the run: there is nothing to deploy."""
        if self.device_rounds:
            return
        raise ConfigError(
            f"no device completed any of the {self.round} rounds, so nothing was learnt and nothing is deployed (at "
            f"last: {self.last_failure}); lower train.learning_rate where devices diverge, raise "
            "fleet.memory_cap_mib or train.deadline_s where memory or time is short; metrics.jsonl has "
            "every reason under 'failed'"
        )

    def advance(self) -> None:
        """Go to the next stage; the block just trained is frozen."""
        self.stage += 1
        self.stage_round = 0
        self.stage_device_rounds = 0
        self.ran_out.clear()
        self.clock.enter_stage(self.stage)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {
            "round": self.round,
            "stage": self.stage,
            "stage_round": self.stage_round,
            "ended": self.ended,
            "ran_out": sorted(self.ran_out),
            "trained": sorted(self.trained),
            "peak_bytes": self.peak_bytes,
            "peak_sum_bytes": self.peak_sum_bytes,
            "device_rounds": self.device_rounds,
            "small_batch_rounds": self.small_batch_rounds,
            "stage_device_rounds": self.stage_device_rounds,
            "last_failure": self.last_failure,
            "pace": _plain("pace.policy", self.policy, self.pace.state_dict),
            "clock": self.clock.state_dict(),
            "selector": _plain("select.name", self.config.select.name, self.selector.state_dict),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        for name in ("round", "stage", "stage_round", "ended", "peak_bytes", "peak_sum_bytes", "device_rounds"):
            setattr(self, name, state[name])
        self.small_batch_rounds = state.get("small_batch_rounds", 0)  # an older version did not count them
        # a checkpoint of an earlier version does not say; some device has probably completed
        self.stage_device_rounds = state.get("stage_device_rounds", self.device_rounds)
        self.last_failure = state.get("last_failure")
        self.ran_out = set(state["ran_out"])
        self.trained = set(state["trained"])
        self.clock.enter_stage(self.stage)
        self.clock.load_state_dict(state["clock"])
        self.pace.load_state_dict(state["pace"])
        self.selector.load_state_dict(state["selector"])


def _plain(key: str, name: str, state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a state as JSON gives it back, so that a run that goes on has what an undisturbed one has."""
    with own_code(key, f"{name}.state_dict" if is_own(name) else name):
        state: dict[str, Any] = json.loads(json.dumps(state_dict()))
        return state


def _up(number_of_bytes: int) -> float:
    """Return MiB rounded up to hundredths: a cap of what is printed must do."""
    return math.ceil(number_of_bytes / MIB * 100) / 100


def train_loss(reports: Sequence[DeviceReport]) -> float | None:
    """Return the mean training loss of the devices that completed, weighted by samples; None if none did."""
    completed = [report for report in reports if report.failed is None and report.loss is not None]
    samples = sum(report.samples for report in completed)
    return sum(report.samples * (report.loss or 0.0) for report in completed) / samples if samples else None
