"""Rank 0's mind: participant selector, pace controller and history. Pure: no collectives, no tensors, no wall time."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedfreeze.aggregate import device_weight, fraction_bits
from fedfreeze.cap import MIB
from fedfreeze.config import Config
from fedfreeze.cost import FLOAT_BYTES, Costs
from fedfreeze.errors import ConfigError
from fedfreeze.fleet import Fleet
from fedfreeze.pace import StageRound, make_policy
from fedfreeze.plugins import is_own, own_code
from fedfreeze.reports import Assignment, DeviceReport, RoundPlan, Verdict
from fedfreeze.select import make_selector


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
        self.eligible = [fleet.eligible(cost.memory_bytes) for cost in costs.stages]
        self._check_stages_fit()
        self.selector = make_selector(config)
        self.pace = make_policy(pace, config.train.rounds, [cost.active_parameters for cost in costs.stages])
        self.round = 0
        self.stage = 0
        self.stage_round = 0
        self.ended = False
        self.bytes_total = 0
        self.ran_out: set[int] = set()  # devices that really ran out in this stage, whatever was predicted
        self.trained: set[int] = set()
        self.frozen_held: dict[int, int] = {}  # device -> how many frozen blocks it has downloaded
        self.peak_bytes = 0
        self.peak_sum_bytes = 0
        self.device_rounds = 0
        self.small_batch_rounds = 0  # of these, by devices with fewer samples than a batch: their peaks are lower

    def _check_rounds(self) -> None:
        stages, rounds = len(self.costs.stages), self.config.train.rounds
        if self.policy in ("fixed", "proportional") and rounds < stages:
            raise ConfigError(
                f"train.rounds: {rounds} is less than the {stages} stages, and pace.policy "
                f"{self.policy} gives each at least one round"
            )

    def _check_stages_fit(self) -> None:
        for cost, devices in zip(self.costs.stages, self.eligible, strict=True):
            if not devices:
                largest = max(cap for cap in self.fleet.memory_cap_bytes if cap is not None) / MIB
                raise ConfigError(
                    f"no device holds stage {cost.name!r}: it needs {_up(cost.memory_bytes)} MiB at batch "
                    f"{self.config.train.batch_size}, the largest cap is {math.floor(largest * 100 + 0.01) / 100} MiB; "
                    f"the smallest cap that holds every stage is {_up(self._smallest_cap())} MiB "
                    "(raise fleet.memory_cap_mib, or lower train.batch_size or model.width)"
                )

    def _smallest_cap(self) -> int:
        return max(cost.memory_bytes for cost in self.costs.stages)

    def plan_round(self) -> RoundPlan:
        """Return the plan of the next round."""
        self.round += 1
        self.stage_round += 1
        candidates = [device for device in self.eligible[self.stage] if device not in self.ran_out]
        if not candidates:
            cost = self.costs.stages[self.stage]
            raise ConfigError(
                f"every device that should hold stage {cost.name!r} ({cost.memory_bytes / MIB:.1f} MiB predicted) ran "
                "out of memory in it; raise fleet.memory_cap_mib"
            )
        devices = self._select(candidates)
        weights = [device_weight(self.config.method.weights, self.samples[device]) for device in devices]
        return RoundPlan(
            round=self.round,
            stage=self.stage,
            stage_round=self.stage_round,
            assignments=self._assign(devices),
            learning_rate=self._learning_rate(),
            fraction_bits=fraction_bits(sum(weights)),
        )

    def _select(self, candidates: Sequence[int]) -> list[int]:
        """Ask the selector, and hold a selector of the user's own to its promise. Raises ConfigError."""
        key, name, count = "select.name", self.config.select.name, self.config.train.participants
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
        """Give the device with most samples to the rank with least work; the result does not depend on it."""
        load = [0] * self.world_size
        ranks = {}
        for device in sorted(devices, key=lambda d: (-self.samples[d], d)):
            rank = min(range(self.world_size), key=lambda r: (load[r], r))
            ranks[device] = rank
            load[rank] += self.samples[device]
        caps = self.fleet.memory_cap_bytes
        return tuple(Assignment(device, ranks[device], caps[device]) for device in sorted(devices))

    def _learning_rate(self) -> float:
        train = self.config.train
        if train.schedule == "cosine":
            return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.round - 1) / train.rounds))
        return train.learning_rate

    def judge(self, reports: Sequence[DeviceReport], perturbation: float | None) -> Verdict:
        """Learn from a round and decide what follows. `reports` in the order of device numbers."""
        with own_code("select.name", self.config.select.name):
            self.selector.observe(reports)
        self.ran_out.update(report.device for report in reports if report.out_of_memory)
        completed = [report for report in reports if report.failed is None]
        for report in completed:
            self.trained.add(report.device)
            self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
            self.peak_sum_bytes += report.peak_bytes
            self.small_batch_rounds += report.samples < self.config.train.batch_size
        self.device_rounds += len(completed)
        with own_code("pace.policy", self.policy):
            decision = self.pace.observe(StageRound(self.stage, self.stage_round, perturbation, train_loss(reports)))
        out_of_rounds = self.round >= self.config.train.rounds
        end_stage = (decision.reason or "converged") if decision.freeze else ("round_limit" if out_of_rounds else None)
        stop = out_of_rounds or (end_stage is not None and self.stage == len(self.costs.stages) - 1)
        self.ended = stop
        return Verdict(
            end_stage=end_stage,
            stop=stop,
            evaluate=end_stage is not None or self.round % self.config.eval.every_rounds == 0,
            checkpoint=end_stage is not None or self.round % self.config.checkpoint.every_rounds == 0,
            perturbation=perturbation,
            slope=decision.slope,
        )

    def traffic(self, reports: Sequence[DeviceReport]) -> tuple[int, int]:
        """Return (bytes up, bytes down) of the round's devices, fp32; a frozen block is sent down once to a device."""
        cost = self.costs.stages[self.stage]
        up = cost.bytes_up * sum(report.failed is None for report in reports)
        down = 0
        for report in reports:
            held = self.frozen_held.get(report.device, 0)
            already = self.costs.stages[held].frozen_elements if held else 0
            down += cost.bytes_up + (cost.frozen_elements - already) * FLOAT_BYTES
            self.frozen_held[report.device] = self.stage
        self.bytes_total += up + down
        return up, down

    def advance(self) -> None:
        """Go to the next stage; the block just trained is frozen."""
        self.stage += 1
        self.stage_round = 0
        self.ran_out.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {
            "round": self.round,
            "stage": self.stage,
            "stage_round": self.stage_round,
            "ended": self.ended,
            "bytes_total": self.bytes_total,
            "ran_out": sorted(self.ran_out),
            "trained": sorted(self.trained),
            "frozen_held": sorted(self.frozen_held.items()),
            "peak_bytes": self.peak_bytes,
            "peak_sum_bytes": self.peak_sum_bytes,
            "device_rounds": self.device_rounds,
            "small_batch_rounds": self.small_batch_rounds,
            "pace": _plain("pace.policy", self.policy, self.pace.state_dict),
            "selector": _plain("select.name", self.config.select.name, self.selector.state_dict),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        plain = ("round", "stage", "stage_round", "ended", "bytes_total", "peak_bytes", "peak_sum_bytes")
        for name in (*plain, "device_rounds", "small_batch_rounds"):
            setattr(self, name, state[name])
        self.ran_out = set(state["ran_out"])
        self.trained = set(state["trained"])
        self.frozen_held = dict(state["frozen_held"])
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
