"""The time model and the emulated clock: how long devices take and what they send; wall time is not looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfreeze.config.schema import TrainConfig
from fedfreeze.device.cost import Costs
from fedfreeze.fleet.devices import Fleet
from fedfreeze.messages import DeviceReport
from fedfreeze.units import FLOAT_BYTES


@dataclass(frozen=True)
class Work:
    """What each of some devices does; arrays in the order of the devices."""

    flops: np.ndarray
    """Floating-point operations."""
    bytes_down: np.ndarray
    bytes_up: np.ndarray


def seconds_of(fleet: Fleet, devices: Sequence[int] | np.ndarray, work: Work) -> np.ndarray:
    """Return the emulated seconds that each device takes: download, computing, upload, one after the other.

    [ours: E * n_i * FLOPs / speed_i + bytes down / down_i + bytes up / up_i; the paper has a time model of each stage,
    its form is not public]
    """
    index = np.asarray(devices, dtype=np.int64)
    return np.asarray(
        work.bytes_down / fleet.down_bytes_s[index]
        + work.flops / fleet.speed_flops[index]
        + work.bytes_up / fleet.up_bytes_s[index]
    )


@dataclass(frozen=True)
class Finish:
    """Who of the selected devices finishes in time, and when the server has what it needs."""

    in_time: list[int]
    late: dict[int, str]
    """Device -> why its work is left out."""
    seconds: float
    """Emulated seconds until then."""


def finish_of(devices: Sequence[int], seconds: np.ndarray, *, participants: int, deadline_s: float | None) -> Finish:
    """Return who takes part: the first `participants` to finish, before the deadline.

    It takes as long as the slowest of them, or until the deadline where that leaves fewer than could have been. Ties go
    to the smaller device number.
    """
    order = np.lexsort([np.asarray(devices, dtype=np.int64), seconds]).tolist()
    needed = min(participants, len(devices))
    in_time: list[int] = []
    late: dict[int, str] = {}
    for i in order:
        if len(in_time) == needed:
            late[devices[i]] = f"over-selection: {needed} others were faster"
        elif deadline_s is not None and seconds[i] > deadline_s:
            late[devices[i]] = f"deadline: it would take {seconds[i]:.1f} s, train.deadline_s is {deadline_s:g}"
        else:
            in_time.append(devices[i])
    length = float(seconds[order[needed - 1]]) if needed else 0.0
    if deadline_s is not None:
        length = min(length, deadline_s)
    return Finish(sorted(in_time), late, length)


class EmulatedClock:
    """Charges each round its time and its bytes. Its state is small and plain."""

    def __init__(self, fleet: Fleet, samples: Sequence[int], costs: Costs, train: TrainConfig, views: int = 1):
        """`views`: images of each sample, of all of which a device stores features (`train.prefix: stored`)."""
        self.fleet = fleet
        self.samples = np.asarray(samples, dtype=np.int64)
        self.costs = costs
        self.train = train
        self.views = views
        self.now_s = 0.0
        self.bytes_total = 0
        self.flops_total: float | None = 0.0
        """Floating-point operations of all devices until now; None: an older version, which began the run, did not
        count them."""
        self.frozen_held = np.zeros(len(fleet), dtype=np.int64)  # how many frozen blocks each device has downloaded
        self.features_held = np.zeros(len(fleet), dtype=bool)
        """Which devices have stored the features of this stage's frozen blocks."""
        self.worse_ways = np.zeros(len(fleet), dtype=np.int64)
        """By how many ways each device is past the one that was predicted to fit, as it ran out of memory by it."""
        self._frozen_elements = np.array([levels[-1].frozen_elements for levels in costs.levels])
        self._begin_round()
        self.enter_stage(0)

    def enter_stage(self, stage: int) -> None:
        """Note what each device does in a round of a stage."""
        self.stage = stage
        levels = self.costs.levels[stage]
        self.level = np.array([self.costs.level_of(stage, cap) for cap in self.fleet.memory_cap_bytes])
        caps = zip(self.level, self.fleet.memory_cap_bytes, strict=True)
        self._first_way = np.array([levels[level].way_for(cap) for level, cap in caps])
        self.features_held[:] = False
        self.worse_ways[:] = 0
        self._charge()

    def next_way(self, devices: Sequence[int]) -> list[int]:
        """Have devices that ran out of memory take the next of `train.fit`'s ways; return those that have none left."""
        last = len(self.costs.levels[self.stage][0].ways) - 1
        at_end = [device for device in devices if self.way[device] == last]
        self.worse_ways[[device for device in devices if device not in set(at_end)]] += 1
        self._charge()
        return at_end

    def _charge(self) -> None:
        """Note what a round of the stage takes each device, by its sub-model and its way."""
        levels = self.costs.levels[self.stage]
        self.way = self._first_way + self.worse_ways
        # a step's operations are in proportion to its samples
        step = np.array([[way.step_flops for way in cost.ways] for cost in levels], np.float64)[self.level, self.way]
        frozen, forward, sent, received = (
            np.array([getattr(cost, name) for cost in levels], dtype=np.float64)[self.level]
            for name in ("frozen_flops", "forward_flops", "bytes_up", "bytes_down")
        )
        stored = self.train.prefix == "stored"
        if stored:
            step = step - frozen
        self._step_flops = self.train.local_epochs * self.samples * step / self.train.batch_size
        self._filling_flops = stored * self.views * self.samples * frozen / self.train.batch_size
        self.forward_flops = self.samples * forward / self.train.batch_size
        self.model_bytes = sent.astype(np.int64)
        self._received_bytes = received.astype(np.int64)

    @property
    def train_flops(self) -> np.ndarray:
        """Floating-point operations of a round's training, of every device: of its steps, and of what it must store."""
        return self._step_flops + np.where(self.features_held, 0.0, self._filling_flops)

    def stores(self) -> np.ndarray:
        """Return which devices would run their frozen blocks in this round to store what they put out."""
        return np.asarray((self._filling_flops > 0) & ~self.features_held)

    def _begin_round(self) -> None:
        self.waited_s = 0.0
        self.probe_s = 0.0
        self.probed = 0
        self.round_s = 0.0
        self.bytes_up = 0
        self.bytes_down = 0
        self.flops = 0.0
        """Floating-point operations of this round: training of the devices that completed, and answers."""
        # devices that were sent this round's model before they were selected
        self._has_model = np.zeros(len(self.fleet), dtype=bool)

    def wait_for(self, devices: Sequence[int]) -> list[int]:
        """Return those of some devices that can be selected now; if there is none, wait for the first."""
        self._begin_round()
        self.waited_s = self.fleet.wait_s(self.now_s, devices)
        available = self.fleet.available(self.now_s + self.waited_s)
        return [device for device in devices if available[device]]

    def round_seconds(self) -> np.ndarray:
        """Return the emulated seconds that a round of the stage takes each device of the fleet."""
        everyone = np.arange(len(self.fleet))
        work = Work(self.train_flops, self._bytes_down(everyone), self.model_bytes)
        return seconds_of(self.fleet, everyone, work)

    def _bytes_down(self, devices: np.ndarray) -> np.ndarray:
        """A frozen block is sent once to a device that lacks it; the rest of the stage in every round."""
        missing = self._frozen_elements[self.stage] - self._frozen_elements[self.frozen_held[devices]]
        down = self._received_bytes[devices] + missing * FLOAT_BYTES
        return np.where(self._has_model[devices], 0, down)

    def probe(self, devices: Sequence[int], numbers: int) -> list[int]:
        """Charge some devices' telling of `numbers` figures each; return those that do it before the deadline."""
        index = np.asarray(devices, dtype=np.int64)
        up = np.full(len(index), numbers * FLOAT_BYTES)
        work = Work(self.forward_flops[index], self._bytes_down(index), up)
        seconds = seconds_of(self.fleet, index, work)
        finish = finish_of(devices, seconds, participants=len(devices), deadline_s=self.train.deadline_s)
        self.probe_s += finish.seconds
        self.probed += len(finish.in_time)
        self.bytes_up += len(finish.in_time) * numbers * FLOAT_BYTES
        self.flops += float(self.forward_flops[np.asarray(finish.in_time, dtype=np.int64)].sum())
        self._send_down(devices)
        return finish.in_time

    def finish(self, devices: Sequence[int], participants: int) -> Finish:
        """Return who of the selected takes part, and charge the time that it takes."""
        seconds = self.round_seconds()[np.asarray(devices, dtype=np.int64)]
        finish = finish_of(devices, seconds, participants=participants, deadline_s=self.train.deadline_s)
        self.round_s = finish.seconds
        return finish

    def end_round(self, reports: Sequence[DeviceReport]) -> None:
        """Charge the bytes of a round's devices and let its time pass."""
        self._send_down([report.device for report in reports])
        completed = np.array([report.device for report in reports if report.failed is None], dtype=np.int64)
        self.bytes_up += int(self.model_bytes[completed].sum())
        self.bytes_total += self.bytes_up + self.bytes_down
        self.flops += float(self.train_flops[completed].sum())
        self.features_held[completed] |= self._filling_flops[completed] > 0
        if self.flops_total is not None:
            self.flops_total += self.flops
        self.now_s += self.emulated_s

    def _send_down(self, devices: Sequence[int]) -> None:
        index = np.asarray(devices, dtype=np.int64)
        self.bytes_down += int(self._bytes_down(index).sum())
        self.frozen_held[index] = self.stage
        self._has_model[index] = True

    @property
    def emulated_s(self) -> float:
        """Emulated seconds of this round: waiting for a device, asking, training."""
        return self.waited_s + self.probe_s + self.round_s

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        held = {int(device): int(self.frozen_held[device]) for device in np.flatnonzero(self.frozen_held)}
        features = [int(device) for device in np.flatnonzero(self.features_held)]
        worse = {int(device): int(self.worse_ways[device]) for device in np.flatnonzero(self.worse_ways)}
        totals = {"now_s": self.now_s, "bytes_total": self.bytes_total, "flops_total": self.flops_total}
        return totals | {
            "frozen_held": sorted(held.items()),
            "features_held": features,
            "worse_ways": sorted(worse.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.now_s = state["now_s"]
        self.bytes_total = state["bytes_total"]
        self.flops_total = state.get("flops_total")
        self.frozen_held[:] = 0
        for device, blocks in state["frozen_held"]:
            self.frozen_held[device] = blocks
        self.features_held[:] = False
        self.features_held[state.get("features_held", [])] = True
        self.worse_ways[:] = 0
        for device, ways in state.get("worse_ways", []):  # an earlier version had one way
            self.worse_ways[device] = ways
        self._charge()
