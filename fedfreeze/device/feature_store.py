"""Room for arrays in memory, and on a local disk when that is full; each has its budget."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from fedfreeze.errors import storage_error
from fedfreeze.units import FLOAT_BYTES

# The disk is asked for this much at a time, one mapping and one open file each; what is larger than a part of it has a
# mapping of its own, as its rest would be lost.
EXTENT_BYTES = 256 * 2**20
_LARGE_PART = 8
# A disk that others need, too, such as for checkpoints, is left this much.
RESERVED_BYTES = 2**30
_ALIGNED_BYTES = 64


class FeatureStore:
    """Gives out float32 arrays until its budgets are used up.

    On disk they lie in files without a name, which go when the process does, however it ends.
    """

    def __init__(self, budget_bytes: int, folder: Path | None = None, disk_bytes: int = 0):
        """`folder` None: memory alone."""
        self.budget_bytes = budget_bytes
        self.folder = folder
        self.disk_bytes = disk_bytes if folder is not None else 0
        self.used_bytes = 0
        """Of memory."""
        self.used_disk_bytes = 0
        self.refused: str | None = None
        """Why something that was asked for found no room; None: all did."""
        self._extent: mmap.mmap | None = None
        self._extent_used = 0

    def room(self, shape: Sequence[int]) -> np.ndarray | None:
        """Return an array without values; None: there is no room left for it."""
        needed = prod(shape) * FLOAT_BYTES
        if self.used_bytes + needed <= self.budget_bytes:
            self.used_bytes += needed
            return np.empty(shape, dtype=np.float32)
        found = self._on_disk(needed)
        if found is None:
            self.refused = self.refused or "the budget is used up"
            return None
        return np.frombuffer(found, dtype=np.float32).reshape(shape)

    def _on_disk(self, needed: int) -> memoryview | None:
        """Return some bytes of the disk; None: its budget is used up, or it is full."""
        if not needed:
            return None
        if needed * _LARGE_PART > EXTENT_BYTES:
            own = self._mapping(needed)
            return None if own is None else memoryview(own)[:needed]
        if self._extent is None or self._extent_used + needed > len(self._extent):
            extent = self._mapping(max(needed, min(EXTENT_BYTES, self.disk_bytes - self.used_disk_bytes)))
            if extent is None:
                return None
            self._extent, self._extent_used = extent, 0
        begin = self._extent_used
        self._extent_used += -(-needed // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return memoryview(self._extent)[begin : begin + needed]

    def _mapping(self, size: int) -> mmap.mmap | None:
        """Return so many bytes of a file without a name; None: there is no room for it."""
        if self.folder is None or self.used_disk_bytes + size > self.disk_bytes:
            return None
        try:
            disk = os.statvfs(self.folder)
            free = disk.f_bavail * disk.f_frsize
            if free < size + RESERVED_BYTES:
                self._disk_is_full(f"{self.folder} has {free // 2**20} MiB left, of which 1 GiB is not taken")
                return None
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # a page that finds the disk full later would end the process
                os.posix_fallocate(file.fileno(), 0, size)
                found = mmap.mmap(file.fileno(), size)
        except OSError as error:
            self._disk_is_full(f"{self.folder}: {error.strerror or error}")
            return None
        self.used_disk_bytes += size
        return found

    def _disk_is_full(self, reason: str) -> None:
        self.refused = reason
        self.disk_bytes = self.used_disk_bytes  # it is not asked again


def check_folder(folder: Path) -> None:
    """Raise StorageError where nothing can be written in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise storage_error("write in (cache.dir)", folder, error) from None
