"""The cap on a CPU by reserved segments: each device is held to what a GPU's caching allocator would reserve."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch

from fedfreeze.device.cap import DeviceMemory, MemoryCap
from fedfreeze.device.reserved import DeviceSegments, Held, StepRecord, recorded
from fedfreeze.network.stage import LocalTrainer


class SegmentCap(MemoryCap):
    """CPU, `fleet.accounting: cuda_segments`: an allocator of its own, from a clean start, for each device. [ours]

    A step of a kind that was counted before runs uncounted; its allocations are put through the device's allocator
    before, as they depend on the kind alone. A device of a kind that was measured under the same cap, and fitted, has
    that one's peak. The words of a refusal are those of the cap on a GPU, whichever of these found it.
    """

    name = "cuda_segments"
    counts_enforce = True

    def __init__(self, device: torch.device | None = None):
        super().__init__(device)
        self._records: dict[Hashable, StepRecord] = {}
        self._fitted: dict[Hashable, tuple[int, int]] = {}
        """The reserved and the tensor peak of devices that were measured and fitted, by kind and cap."""
        self._holds: Held | None = None
        self._segments: DeviceSegments | None = None
        """Those of the device at work, where it is measured."""
        self._is_known = False
        """Whether the peak of the device at work is known."""

    def begin_stage(self) -> None:
        """See MemoryCap."""
        self._records.clear()
        self._fitted.clear()
        self._holds = None

    def holds(self, trainer: LocalTrainer) -> None:
        """See MemoryCap."""
        self._holds = Held(trainer)

    @contextmanager
    def device(self, cap_bytes: int | None, kind: Hashable = None) -> Iterator[DeviceMemory]:
        """See MemoryCap."""
        memory = DeviceMemory(cap_bytes)
        known = None if kind is None else self._fitted.get((kind, cap_bytes))
        if known is not None:
            self._is_known = True
            try:
                yield memory
            finally:
                self._is_known = False
                memory.peak_bytes, memory.tensor_peak_bytes = known
            return
        segments = self._segments = DeviceSegments(self._holds, cap_bytes)
        try:
            yield memory
            if kind is not None:
                self._fitted[(kind, cap_bytes)] = segments.peak_bytes, memory.tensor_peak_bytes
        finally:
            self._segments = None
            memory.peak_bytes = segments.peak_bytes

    def step(
        self,
        memory: DeviceMemory,
        kind: Hashable,
        held: Callable[[], Iterable[torch.Tensor]],
        run: Callable[[], torch.Tensor],
        shortened: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See MemoryCap."""
        segments, record = self._segments, self._records.get(kind)
        if segments is None:
            assert self._is_known
            return (shortened or run)()
        if record is None:
            result, record = recorded(run, lambda: list(held()), self._holds, segments)
            self._records[kind] = record
        else:
            segments.step(record)
            result = (shortened or run)()
        memory.tensor_peak_bytes = max(memory.tensor_peak_bytes, record.tensor_bytes)
        return result
