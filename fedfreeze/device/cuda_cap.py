"""The cap on a GPU: the caching allocator reserves no more than a device may have, beside what the emulator holds."""

import gc
import math
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from fedfreeze.device.cap import DeviceMemory, DeviceOutOfMemoryError, MemoryCap
from fedfreeze.errors import UnavailableError
from fedfreeze.units import MIB

# How the allocator asks for memory (torch's c10/core/AllocatorConfig.h): what is up to 1 MiB shares segments of 2 MiB,
# what is under 10 MiB such of 20, and larger requests have segments of their own, in steps of 2 MiB.
SEGMENT_BYTES = 2 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
_SMALL_BYTES = 1 * MIB


class CudaFractionCap(MemoryCap):
    """GPU: the allocator's limit for the process, by the per-process memory fraction.

    It counts reserved segments, so rounding (2 and 20 MiB steps) and fragmentation count; the CUDA context and NCCL's
    buffers do not. What the emulator itself has allocated comes on top of each device's cap. A device finds no room in
    segments that were there before its stage: their gaps are filled.
    """

    name = "cuda_memory_fraction"

    def __init__(self, device: torch.device):
        super().__init__()
        self.cuda_device = device
        self.total_bytes = torch.cuda.get_device_properties(device).total_memory
        self.emulator_bytes = 0
        self._filling: list[torch.Tensor] = []
        self._held_to_bytes: int | None = None
        """The cap of the device at work, in bytes."""
        self._fitted: dict[Hashable, int] = {}
        """The reserved peak of devices that were measured from a clean start and fitted, by kind and cap."""
        self._one_failed = False
        warm_cublas(device)
        watch_refusals(self)

    def begin_stage(self) -> None:
        """See MemoryCap."""
        self._known_peaks.clear()
        self._fitted.clear()
        self._filling.clear()
        gc.collect()  # what the stage before has left would count as the emulator's
        torch.cuda.synchronize(self.cuda_device)
        torch.cuda.empty_cache()
        self._filling = fill_gaps(self.cuda_device)
        self.emulator_bytes = torch.cuda.memory_reserved(self.cuda_device)

    @contextmanager
    def on_top(self) -> Iterator[None]:
        """See MemoryCap."""
        gc.collect()  # what goes inside must have gone before
        before = torch.cuda.memory_allocated(self.cuda_device)
        yield
        gc.collect()
        torch.cuda.synchronize(self.cuda_device)
        grown = torch.cuda.memory_allocated(self.cuda_device) - before
        # constants that the first stage alone makes must not tell it from a later one; they are less than a segment
        self.emulator_bytes += grown - grown % SEGMENT_BYTES

    @contextmanager
    def device(self, cap_bytes: int | None, kind: Hashable = None) -> Iterator[DeviceMemory]:
        """See MemoryCap. Raises UnavailableError where the card itself is full.

        A device of a kind that was measured under the same cap, and fitted, runs without limit, and nothing waits for
        the GPU: what the allocator keeps from the devices before need not be given back.
        """
        memory = DeviceMemory(cap_bytes)
        known = None if kind is None else self._fitted.get((kind, cap_bytes))
        if known is not None:
            memory.peak_bytes = known
            yield memory
            return
        if self._one_failed:
            gc.collect()  # the pass that it broke off may still be held by its error
            self._one_failed = False
        torch.cuda.synchronize(self.cuda_device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.cuda_device)
        if cap_bytes is not None:
            # the limit is only asked at the next reservation: what is held already must be checked here
            held = torch.cuda.memory_reserved(self.cuda_device) - self.emulator_bytes
            if held > cap_bytes:
                raise DeviceOutOfMemoryError("load", held, cap_bytes)
            self._limit(self.emulator_bytes + cap_bytes)
        self._held_to_bytes = cap_bytes
        # counted anew, as tensors live a moment longer where they are: a peak must not depend on who came before
        counted, self._known_peaks = self._known_peaks, {}
        try:
            yield memory
            if kind is not None:
                self._fitted[(kind, cap_bytes)] = self._peak()
        except DeviceOutOfMemoryError:
            self._one_failed = True
            raise
        finally:
            self._held_to_bytes = None
            self._known_peaks = counted | self._known_peaks
            torch.cuda.synchronize(self.cuda_device)
            memory.peak_bytes = self._peak()
            self._limit(None)

    def refuse(self, request_bytes: int) -> None:
        """Raise what a request means that the allocator refuses: DeviceOutOfMemoryError, or UnavailableError."""
        needed = torch.cuda.memory_reserved(self.cuda_device) - self.emulator_bytes + request_bytes
        cap_bytes = self._held_to_bytes
        if cap_bytes is not None and needed > cap_bytes:
            raise DeviceOutOfMemoryError(f"an allocation of {request_bytes / MIB:.2f} MiB", needed, cap_bytes)
        raise UnavailableError(
            f"the memory of {self.cuda_device} is not enough ({request_bytes / MIB:.2f} MiB more were asked for); "
            "start fewer ranks on this GPU, see what else runs on it, or lower train.batch_size or model.width"
        )

    def _peak(self) -> int:
        return max(0, torch.cuda.max_memory_reserved(self.cuda_device) - self.emulator_bytes)

    def _limit(self, allowed_bytes: int | None) -> None:
        """Have the allocator reserve no more than this for the process; None: all that there is."""
        fraction = 1.0 if allowed_bytes is None else fraction_of(allowed_bytes, self.total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self.cuda_device)


_watching: "weakref.WeakValueDictionary[int, CudaFractionCap]" = weakref.WeakValueDictionary()
_attached = False


def watch_refusals(cap: CudaFractionCap) -> None:
    """Have a cap say what it means when the allocator refuses memory on its card; the last one made for it does.

    torch's own error would not do: cuDNN takes it for an advice and tries its next kernel, with less memory and other
    bits, which then stays for all devices after; or says that it found no kernel at all.
    """
    global _attached
    _watching[cap.cuda_device.index or 0] = cap
    if not _attached:
        torch._C._cuda_attach_out_of_memory_observer(_refused)  # type: ignore[attr-defined]
        _attached = True


def _refused(index: int, request_bytes: int, *_: int) -> None:
    """Raise what a refusal means, out of the allocator and through whichever library asked it; see watch_refusals."""
    cap = _watching.get(index)
    if cap is not None:
        cap.refuse(request_bytes)


def warm_cublas(device: torch.device) -> None:
    """Have cuBLAS set its memory aside, in segments of its own, in this thread and in the one of backward passes."""
    ones = torch.ones(16, 16, device=device, requires_grad=True)
    functional.linear(ones, ones, ones[0]).sum().backward()
    torch.cuda.synchronize(device)


def fill_gaps(device: torch.device) -> list[torch.Tensor]:
    """Take all that is free in reserved segments, to hold it."""
    found = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != (device.index or 0):
            continue
        for block in segment["blocks"]:
            left = block["size"] if block["state"] == "inactive" else 0
            if segment["segment_type"] == "large":
                pieces = [left] if left > _SMALL_BYTES else []  # who asks for less is never given it
            else:
                pieces = [min(_SMALL_BYTES, left - begin) for begin in range(0, left, _SMALL_BYTES)]
            found += [torch.empty(size, dtype=torch.uint8, device=device) for size in pieces]
    return found


def fraction_of(allowed_bytes: int, total_bytes: int) -> float:
    """Return the least fraction that torch, which multiplies and cuts, turns into as many bytes again; 1 at most.

    Rounded down, a device would fail under a cap of exactly its peak.
    """
    if allowed_bytes >= total_bytes:
        return 1.0
    fraction = allowed_bytes / total_bytes
    while int(fraction * total_bytes) < allowed_bytes:
        fraction = math.nextafter(fraction, 1.0)
    return fraction
