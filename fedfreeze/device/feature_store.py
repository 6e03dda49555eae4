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

# The disk is asked for this much at a time: one mapping and one open file each.
EXTENT_BYTES = 256 * 2**20
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
        self.refused = False
        """Whether something was asked for that found no room."""
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
            self.refused = True
            return None
        return np.frombuffer(found, dtype=np.float32).reshape(shape)

    def _on_disk(self, needed: int) -> memoryview | None:
        """Return some bytes of the disk; None: its budget is used up, or it is full."""
        if self._extent is None or self._extent_used + needed > len(self._extent):
            size = max(needed, min(EXTENT_BYTES, self.disk_bytes - self.used_disk_bytes))
            if not needed or self.used_disk_bytes + size > self.disk_bytes:
                return None
            try:
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    # a page that finds the disk full later would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                    self._extent = mmap.mmap(file.fileno(), size)
            except OSError:
                self.disk_bytes = self.used_disk_bytes  # it is full: do not ask again
                return None
            self._extent_used = 0
            self.used_disk_bytes += size
        begin = self._extent_used
        self._extent_used += -(-needed // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return memoryview(self._extent)[begin : begin + needed]


def check_folder(folder: Path) -> None:
    """Raise StorageError where nothing can be written in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise storage_error("write in (cache.dir)", folder, error) from None
