"""Asks this rank's devices before a round: each alone under its cap, or many small ones by one forward pass."""

from collections.abc import Callable, Hashable, MutableMapping, Sequence

import numpy as np
import torch

from fedfreeze.data.batches import plain_batches
from fedfreeze.data.store import Data
from fedfreeze.device.cap import DeviceOutOfMemoryError, MemoryCap
from fedfreeze.device.probe import LOSSES, Probe
from fedfreeze.messages import ProbePlan
from fedfreeze.network.stage import Stage


class Asker:
    """Asks devices at the stage's global values; made anew for each time that devices are asked.

    A step of a kind (batch shape, settings) that was counted before, and fits the device's cap, runs uncounted, as all
    steps do (MemoryCap.step). So once each of a group's kinds has been counted, alone and under the cap of the device
    that is the first to have it, the group is asked by one forward pass over all its samples. The bits of an answer may
    depend on who is in the group, and on nothing else. [ours]
    """

    def __init__(
        self,
        probe: Probe,
        cap: MemoryCap,
        data: Data,
        parts: Sequence[np.ndarray],
        device: torch.device,
        *,
        batch_size: int,
        kind: tuple[Hashable, ...],
        peaks: MutableMapping[Hashable, int],
        begin: Callable[[np.ndarray], None],
        check: Callable[[], None],
    ):
        """`batch_size`: samples of a device's own step. `kind`: what steps have in common besides their samples.

        `peaks`: bytes of the kinds counted before; what is counted here is added. `begin` loads the values that the
        device of some samples starts from; `check` is called between devices and raises what must end the round.
        """
        self.probe = probe
        self.cap = cap
        self.data = data
        self.parts = parts
        self.device = device
        self.batch_size = batch_size
        self.kind = kind
        self.peaks = peaks
        self.begin = begin
        self.check = check

    def ask(self, plan: ProbePlan, rank: int, *, together: bool) -> torch.Tensor:
        """Ask this rank's devices; return a row for each device of the plan, zero for those of other ranks.

        A row is 1 (it answered), mean loss, mean squared loss, signature; float32, on the host. A device does not
        answer that has no memory for it or no samples, or whose loss is not a number. `together`: ask groups by one
        pass, not device by device.
        """
        table = torch.zeros(sum(len(group.devices) for group in plan.groups), 1 + LOSSES + self.probe.numbers)
        end = 0
        for group in plan.groups:
            first, end = end, end + len(group.devices)
            if group.rank == rank:
                rows = [self.parts[device] for device in group.devices]
                if together and len(rows) > 1 and all(map(len, rows)):
                    answered, answers = self._by_one_pass(rows, group.cap_bytes)
                else:
                    answered, answers = self._one_by_one(rows, group.cap_bytes)
                answered &= np.isfinite(answers).all(axis=1)
                table[first:end, 0] = torch.from_numpy(answered)
                table[first:end, 1:] = torch.from_numpy(np.where(answered[:, None], answers, 0))
        return table

    def _one_by_one(self, rows: Sequence[np.ndarray], caps: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return who of some devices answered, and the answers (devices, numbers)."""
        answers = np.zeros((len(rows), LOSSES + self.probe.numbers), dtype=np.float32)
        answered = np.zeros(len(rows), dtype=bool)
        for number, (samples, cap_bytes) in enumerate(zip(rows, caps, strict=True)):
            answer = self._alone(samples, cap_bytes) if len(samples) else None
            if answer is not None:
                answered[number], answers[number] = True, answer
        return answered, answers

    def _alone(self, samples: np.ndarray, cap_bytes: int | None) -> np.ndarray | None:
        self.check()
        self.begin(samples)
        batches = plain_batches(self.data, samples, self.batch_size, self.device)
        try:
            with self.cap.device(cap_bytes, (*self.kind, len(samples))) as memory:
                return self.probe.ask(memory, self.kind, batches)
        except DeviceOutOfMemoryError:
            return None

    def _is_held(self, samples: np.ndarray, cap_bytes: int | None) -> bool:
        """Tell whether a device's cap holds its steps; count those of a kind that was not counted or does not fit."""
        whole, rest = divmod(len(samples), self.batch_size)
        for length in [self.batch_size] * (whole > 0) + [rest] * (rest > 0):
            peak = self.peaks.get((*self.kind, length))
            if peak is not None and (cap_bytes is None or peak <= cap_bytes):
                continue
            try:
                with self.cap.device(cap_bytes) as memory:
                    self.probe.ask(memory, self.kind, plain_batches(self.data, samples[:length], length, self.device))
            except DeviceOutOfMemoryError:
                return False
            self.peaks[(*self.kind, length)] = memory.peak_bytes
        return True

    def _by_one_pass(self, rows: Sequence[np.ndarray], caps: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `_one_by_one` does."""
        self.check()
        self.begin(rows[0])
        held = np.array([self._is_held(samples, cap) for samples, cap in zip(rows, caps, strict=True)])
        # those that are not held, too: who is in a pass must not depend on what this rank has counted
        joined = np.concatenate(rows)
        ((images, labels),) = plain_batches(self.data, joined, len(joined), self.device)
        return held, self.probe.ask_together(images, labels, [len(samples) for samples in rows])


def samples_stay_apart(stage: Stage, data: Data, device: torch.device) -> bool:
    """Tell whether what a stage puts out for a sample in eval mode does not depend on which others are beside it.

    A network of a user's own may normalise over the batch also then. Tried on the first three training samples, so
    that every rank finds the same.
    """
    ((images, _),) = plain_batches(data, np.arange(min(3, len(data.train))), 3, device)
    stage.eval()
    with torch.no_grad():
        among_three, among_two = stage(images)[:2], stage(images[:2])
    return bool(torch.allclose(among_three, among_two, rtol=1e-3, atol=1e-4))
