"""The cap on a GPU: the caching allocator reserves no more than a device may have, beside what the emulator holds."""

import gc
import math
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from fedfreeze.device.cap import DeviceMemory, DeviceOutOfMemoryError, MemoryCap
from fedfreeze.errors import UnavailableError
from fedfreeze.units import MIB

# How the allocator asks for memory (torch's c10/core/AllocatorConfig.h): what is under 1 MiB shares segments of 2 MiB,
# what is under 10 MiB such of 20, and larger requests have segments of their own, in steps of 2 MiB.
SEGMENT_BYTES = 2 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
_SMALL_BYTES = 1 * MIB
_SHARED_SEGMENT_BYTES = 20 * MIB


class CudaFractionCap(MemoryCap):
    """GPU: the allocator's limit for the process, by the per-process memory fraction.

    It counts reserved segments, so rounding (2 and 20 MiB steps) and fragmentation count; the CUDA context and NCCL's
    buffers do not. What the emulator itself has allocated comes on top of each device's cap; what is free in segments
    that both share counts as the device's.
    """

    name = "cuda_memory_fraction"

    def __init__(self, device: torch.device):
        super().__init__()
        self.cuda_device = device
        self.total_bytes = torch.cuda.get_device_properties(device).total_memory
        self.emulator_bytes = 0
        self._fitted: dict[Hashable, int] = {}
        """The reserved peak of devices that were measured from a clean start and fitted, by kind and cap."""

    def begin_stage(self) -> None:
        """See MemoryCap."""
        self._known_peaks.clear()
        self._fitted.clear()
        torch.cuda.synchronize(self.cuda_device)
        torch.cuda.empty_cache()
        self.emulator_bytes = torch.cuda.memory_allocated(self.cuda_device)

    @contextmanager
    def on_top(self) -> Iterator[None]:
        """See MemoryCap."""
        gc.collect()  # what goes inside must have gone before
        before = torch.cuda.memory_allocated(self.cuda_device)
        yield
        gc.collect()
        torch.cuda.synchronize(self.cuda_device)
        self.emulator_bytes += torch.cuda.memory_allocated(self.cuda_device) - before

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
            try:
                yield memory
            except torch.OutOfMemoryError as error:
                raise self._card_full(error) from None
            return
        torch.cuda.synchronize(self.cuda_device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.cuda_device)
        if cap_bytes is not None:
            self._limit(self.emulator_bytes + cap_bytes)
            # the limit is only asked at the next reservation: what is held already must be checked here
            held = torch.cuda.memory_reserved(self.cuda_device) - self.emulator_bytes
            if held > cap_bytes:
                self._limit(None)
                raise DeviceOutOfMemoryError("load", held, cap_bytes)
        # counted anew, as tensors live a moment longer where they are: a peak must not depend on who came before
        counted, self._known_peaks = self._known_peaks, {}
        try:
            yield memory
        except DeviceOutOfMemoryError:
            raise
        except torch.OutOfMemoryError as error:
            if cap_bytes is None or self._is_card_full(str(error), self.emulator_bytes + cap_bytes):
                raise self._card_full(error) from None
            reserved = torch.cuda.max_memory_reserved(self.cuda_device) - self.emulator_bytes
            raise DeviceOutOfMemoryError(_cuda_request(str(error)), reserved, cap_bytes) from None
        else:
            if kind is not None:
                self._fitted[(kind, cap_bytes)] = self._peak()
        finally:
            self._known_peaks = counted | self._known_peaks
            torch.cuda.synchronize(self.cuda_device)
            memory.peak_bytes = self._peak()
            self._limit(None)

    def _peak(self) -> int:
        return max(0, torch.cuda.max_memory_reserved(self.cuda_device) - self.emulator_bytes)

    def _limit(self, allowed_bytes: int | None) -> None:
        """Have the allocator reserve no more than this for the process; None: all that there is."""
        fraction = 1.0 if allowed_bytes is None else fraction_of(allowed_bytes, self.total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self.cuda_device)

    def _card_full(self, error: torch.OutOfMemoryError) -> UnavailableError:
        return UnavailableError(
            f"the memory of {self.cuda_device} is not enough ({_cuda_request(str(error))}); start fewer ranks on this "
            "GPU, see what else runs on it, or lower train.batch_size or model.width"
        )

    def _is_card_full(self, message: str, allowed_bytes: int) -> bool:
        """Tell whether a request failed that the limit would have let through: the card is full, not the device."""
        asked = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
        if asked is None:
            return False
        unit = {"bytes": 1, "KiB": 1024, "MiB": MIB, "GiB": 1024 * MIB}[asked[2]]
        needed = segment_of(math.ceil((float(asked[1]) + 0.01) * unit))  # it is told with two digits
        return torch.cuda.memory_reserved(self.cuda_device) + needed <= allowed_bytes


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


def segment_of(request_bytes: int) -> int:
    """Return the bytes of the segment that the allocator reserves for a request, where none has room for it."""
    if request_bytes <= _SMALL_BYTES:
        return SEGMENT_BYTES
    if request_bytes < OWN_SEGMENT_BYTES:
        return _SHARED_SEGMENT_BYTES
    return -(-request_bytes // SEGMENT_BYTES) * SEGMENT_BYTES


def _cuda_request(message: str) -> str:
    """Return what the allocator says it was asked for, as the operation's name is not known there."""
    start = message.find("Tried to allocate")
    return "an allocation" if start < 0 else message[start:].split(".  ")[0].split(". ")[0].lower()
