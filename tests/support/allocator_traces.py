"""Traces of a real allocator: what an H200 reserved for two and a half batches of each stage, and in which order."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedfreeze.device.segments import Block, SegmentAllocator, SegmentLimitError
from tests.support.checks import ROOT

_STEP_BYTES = 2 * 2**20
FILE = ROOT / "benchmarks" / "results" / "allocator_h200.json.gz"


@dataclass(frozen=True)
class Trace:
    """One stage: the segments before it, and each action [name, address, bytes] in its order."""

    name: str
    """method/model/width/batch/stage"""
    before: list[dict[str, Any]]
    actions: list[tuple[str, int, int]]
    emulator: int
    """Bytes that are not the device's."""
    max_reserved: int
    peak: int
    """The device's: `max_reserved` less the emulator's."""
    tensor: int

    @property
    def addresses(self) -> list[int]:
        """Where each allocation lay."""
        return [address for action, address, _ in self.actions if action == "alloc"]

    @cached_property
    def _at_once(self) -> set[int]:
        """Which actions belong to what an operation takes for itself: allocated, and at once freed again."""
        found: set[int] = set()
        for i, (action, address, _) in enumerate(self.actions[:-1]):
            if action == "alloc" and self.actions[i + 1][:2] == ("free_requested", address):
                found |= {i, i + 1, i + 2}
        return found

    @property
    def largest_workspace(self) -> int:
        """The most that an operation took for itself, in bytes."""
        taken = (size for i, (action, _, size) in enumerate(self.actions) if action == "alloc" and i in self._at_once)
        return max(taken, default=0)

    def least_cap(self) -> int:
        """Return the least bytes, in steps of 2 MiB, with which the device's trace passes in the model."""
        for cap_bytes in range(self.tensor // _STEP_BYTES * _STEP_BYTES, self.peak, _STEP_BYTES):
            try:
                self.replayed(at_its_addresses=False, limit_bytes=self.emulator + cap_bytes)
            except SegmentLimitError:
                continue
            return cap_bytes
        return self.peak

    def replayed(
        self, *, at_its_addresses: bool, workspaces: bool = True, limit_bytes: int | None = None
    ) -> tuple[SegmentAllocator, list[int]]:
        """Return the model's allocator after the trace, and the address that it gave each allocation.

        `workspaces`: with what operations took for themselves alone. Raises SegmentLimitError.
        """
        given: list[int] = []
        coming = iter(self._segments())
        allocator = SegmentAllocator(limit_bytes, placed=(lambda _: next(coming)) if at_its_addresses else None)
        live: dict[int, Block] = {}
        for number, segment in enumerate(sorted(self.before, key=lambda each: int(each["address"]))):
            address = segment["address"] if at_its_addresses else -(2**50) + number * 2**40
            blocks = allocator.take_up(
                [(size, state == "inactive") for size, _, state in segment["blocks"]],
                address,
                small=segment["type"] == "small",
            )
            live |= {segment["address"] + block.address - address: block for block in blocks}
        for i, (action, address, size) in enumerate(self.actions):
            if i in self._at_once and not workspaces:
                continue
            if action == "alloc":
                live[address] = allocator.alloc(size)
                given.append(live[address].address)
            elif action == "free_completed":
                allocator.free(live.pop(address))
        return allocator, given

    def _segments(self) -> Iterator[int]:
        yield from (address for action, address, _ in self.actions if action == "segment_alloc")


def _read() -> list[Trace]:
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        found = json.load(file)
    return [
        Trace(
            name,
            entry["before"],
            [(action, address, size) for action, address, size in entry["trace"]],
            entry["emulator"],
            entry["max_reserved"],
            entry["peak"],
            entry["tensor"],
        )
        for name, entry in found.items()
    ]


TRACES = _read()
