"""Memory caps that hold: tensor bytes counted under the operations on CPU; cuda_cap.py has those on a GPU."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedfreeze.network.stage import LocalTrainer
from fedfreeze.units import MIB

GRANULE_BYTES = 512  # CUDA's caching allocator rounds every request up to this; counting so keeps both comparable


class DeviceOutOfMemoryError(torch.OutOfMemoryError):
    """An emulated device ran into its memory cap; names the operation, the bytes and the cap."""

    def __init__(self, operation: str, needed_bytes: int, cap_bytes: int):
        self.operation = operation
        self.needed_bytes = needed_bytes
        self.cap_bytes = cap_bytes
        super().__init__(
            f"memory cap: {operation} needs {needed_bytes / MIB:.2f} MiB, the cap is {cap_bytes / MIB:.2f} MiB"
        )


class StorageListener(Protocol):
    """Is told of each storage that a counter sees, in the order in which they come and go."""

    def created(self, key: int, size_bytes: int) -> None:
        """A storage of so many bytes, not rounded, is there; `key` is its own until it is freed."""

    def freed(self, key: int) -> None:
        """A storage is gone. Must not raise: it is called while Python lets go of it."""

    def check(self, operation: str) -> None:
        """An operation has ended. May raise DeviceOutOfMemoryError."""


class TensorByteCounter(TorchDispatchMode):
    """Counts the bytes of live tensor storages that were adopted or created inside, and raises above a cap.

    Each storage counts once, however many tensors view it, from its creation until Python and autograd have let go of
    it. Works the same under FakeTensorMode, where nothing is allocated: that is how the cost model predicts. Not seen:
    kernels' scratch memory and the interpreter.
    """

    def __init__(self, cap_bytes: int | None = None, listener: StorageListener | None = None):
        super().__init__()
        self.cap_bytes = cap_bytes
        self.listener = listener
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own hook: nothing is compiled here, and to keep its compiler out torch would import all of it."""
        return False

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that exist already. Raises DeviceOutOfMemoryError."""
        for tensor in tensors:
            self._count(tensor)
        self._check("load")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._count(out)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        self._check(str(func))
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":  # shapes that are asked for on the way; it holds nothing
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // GRANULE_BYTES) * GRANULE_BYTES
        if size == 0:
            return

        def freed(_: Any, key: int = key, size: int = size) -> None:
            if self._alive.pop(key, None) is not None:
                self.live_bytes -= size
                if self.listener is not None:
                    self.listener.freed(key)

        self._alive[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.listener is not None:
            self.listener.created(key, storage.nbytes())

    def _check(self, operation: str) -> None:
        if self.cap_bytes is not None and self.live_bytes > self.cap_bytes:
            raise DeviceOutOfMemoryError(operation, self.live_bytes, self.cap_bytes)
        if self.listener is not None:
            self.listener.check(operation)


def count_peak(step: Callable[[], Any], held: Iterable[torch.Tensor], cap_bytes: int | None = None) -> int:
    """Run a step and return its peak of live tensor bytes, `held` included. Raises DeviceOutOfMemoryError."""
    counter = TensorByteCounter(cap_bytes)
    counter.adopt(held)
    with counter:
        step()
    return counter.peak_bytes


class DeviceMemory:
    """The memory of one emulated device while it trains."""

    def __init__(self, cap_bytes: int | None):
        self.cap_bytes = cap_bytes
        self.peak_bytes = 0
        """Largest use of what the cap governs: tensor bytes on CPU, reserved bytes on a GPU."""
        self.tensor_peak_bytes = 0
        """Largest sum of live tensor bytes, on either."""


class MemoryCap(ABC):
    """One interface for both ways to hold a device to its cap; one object a rank."""

    name: str
    """What enforces, as summary.json says it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._known_peaks: dict[Hashable, int] = {}

    @contextmanager
    @abstractmethod
    def device(self, cap_bytes: int | None, kind: Hashable = None) -> Iterator[DeviceMemory]:
        """Emulate one device inside; `cap_bytes` None: no cap, measure only. Raises DeviceOutOfMemoryError.

        `kind` tells devices apart whose memory may differ (stage, number of samples); None: it is measured in any case.
        """

    @abstractmethod
    def begin_stage(self) -> None:
        """Note what the process holds before any tensor of the stage's device is made; it comes on top of each cap."""

    def holds(self, trainer: LocalTrainer) -> None:
        """Note what the devices that follow hold between steps, where what is counted does not tell. [nothing here]"""
        return

    @contextmanager
    def on_top(self) -> Iterator[None]:
        """Have what is allocated inside, and stays, come on top of each cap: it is the emulator's, or a library's."""
        yield

    def step(
        self,
        memory: DeviceMemory,
        kind: Hashable,
        held: Callable[[], Iterable[torch.Tensor]],
        run: Callable[[], torch.Tensor],
        shortened: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run one training step of a device and note its peak. Raises DeviceOutOfMemoryError.

        `shortened` gives the same bits with less work and memory than the device has; it runs where nothing is counted.

        `kind` tells steps apart whose memory may differ (stage, batch shape, settings). Counting costs time in every
        operation, so a step of a kind that was counted before, and fits, runs uncounted and reuses the peak.
        """
        known = self._known_peaks.get(kind)
        if known is not None and (memory.cap_bytes is None or not self.counts_enforce or known <= memory.cap_bytes):
            result = (shortened or run)()
        else:
            counter = TensorByteCounter(memory.cap_bytes if self.counts_enforce else None)
            counter.adopt(held())
            with counter:
                result = run()
            known = self._known_peaks[kind] = counter.peak_bytes
        memory.tensor_peak_bytes = max(memory.tensor_peak_bytes, known)
        return result

    counts_enforce = False
    """Whether counted tensor bytes are what the cap governs."""


class CountedCap(MemoryCap):
    """CPU: the cap is on live tensor bytes, checked after every operation."""

    name = "tensor_bytes"
    counts_enforce = True

    @contextmanager
    def device(self, cap_bytes: int | None, kind: Hashable = None) -> Iterator[DeviceMemory]:
        """See MemoryCap."""
        memory = DeviceMemory(cap_bytes)
        try:
            yield memory
        finally:
            memory.peak_bytes = memory.tensor_peak_bytes

    def begin_stage(self) -> None:
        """See MemoryCap. On CPU only what a step adopts is counted, so there is nothing to note."""


def enforcer_name(device: torch.device, accounting: str = "tensor_bytes") -> str:
    """Return what holds devices to their caps on a compute device, as summary.json says it."""
    return _enforcer(device, accounting).name


def make_cap(device: torch.device, accounting: str = "tensor_bytes") -> MemoryCap:
    """Return the enforcer for a compute device; `accounting`: `fleet.accounting`, which counts on a CPU alone."""
    return _enforcer(device, accounting)(device)


def _enforcer(device: torch.device, accounting: str) -> type[MemoryCap]:
    # imported here: they build on what stands above
    if device.type != "cpu":
        from fedfreeze.device.cuda_cap import CudaFractionCap

        return CudaFractionCap
    if accounting == "cuda_segments":
        from fedfreeze.device.segment_cap import SegmentCap

        return SegmentCap
    return CountedCap
