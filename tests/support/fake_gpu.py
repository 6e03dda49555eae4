"""A GPU's caching allocator as far as the caps see it, in place of torch.cuda's functions; no GPU is there."""

from collections.abc import Callable

import pytest
import torch

from fedfreeze.device import cuda_cap
from fedfreeze.units import MIB

FUNCTIONS = (
    "memory_snapshot",
    "synchronize",
    "empty_cache",
    "memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
    "get_device_properties",
)


def segment_of(request_bytes: int) -> int:
    """Return the bytes of the segment that the allocator reserves for a request, where none has room for it."""
    if request_bytes <= MIB:
        return 2 * MIB
    if request_bytes < 10 * MIB:
        return 20 * MIB
    return -(-request_bytes // (2 * MIB)) * 2 * MIB


class FakeGpu:
    """Every request has a segment of its own, which stays reserved when it is freed, until the cache is emptied."""

    def __init__(self, total_bytes: int = 1000 * MIB, others_bytes: int = 0):
        self.total_memory = total_bytes
        self.others_bytes = others_bytes
        """What other processes hold."""
        self.live: list[int] = []
        self.cached: list[int] = []
        self.peak_bytes = 0
        self.limit_bytes = total_bytes
        self.calls: list[str] = []
        self.observers: list[Callable[..., None]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in FUNCTIONS:

            def called(*arguments: object, name: str = name) -> object:
                self.calls.append(name)
                return getattr(self, name)(*arguments)

            monkeypatch.setattr(torch.cuda, name, called)
        monkeypatch.setattr(cuda_cap, "warm_cublas", lambda device: None)
        monkeypatch.setattr(cuda_cap, "_attached", False)
        monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", self.observers.append, raising=False)

    def take(self, request_bytes: int) -> None:
        """Allocate, as the allocator does: from what is cached, else a segment, else with the cache given back."""
        segment = segment_of(request_bytes)
        if segment in self.cached:
            self.cached.remove(segment)
        elif not self._fits(segment):
            self.cached.clear()
            if not self._fits(segment):
                for observer in self.observers:
                    observer(0, segment, self.limit_bytes, 0)
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {request_bytes / MIB:.2f} MiB. GPU 0 has a total capacity"
                )
        self.live.append(segment)
        self.peak_bytes = max(self.peak_bytes, self.memory_reserved())

    def _fits(self, segment: int) -> bool:
        reserved = self.memory_reserved() + segment
        return reserved <= self.limit_bytes and reserved + self.others_bytes <= self.total_memory

    def free(self) -> None:
        """Free what was allocated last."""
        self.cached.append(self.live.pop())

    def synchronize(self, device: object = None) -> None:
        return

    def empty_cache(self) -> None:
        self.cached.clear()

    def memory_snapshot(self) -> list[dict[str, object]]:
        return []

    def memory_allocated(self, device: object = None) -> int:
        return sum(self.live)

    def memory_reserved(self, device: object = None) -> int:
        return sum(self.live) + sum(self.cached)

    def max_memory_reserved(self, device: object = None) -> int:
        return self.peak_bytes

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self.peak_bytes = self.memory_reserved()

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        self.limit_bytes = int(fraction * self.total_memory)

    def get_device_properties(self, device: object = None) -> "FakeGpu":
        return self
