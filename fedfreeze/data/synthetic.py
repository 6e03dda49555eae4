"""Synthetic images of any shape and number, for benchmarks: a pattern a class, under noise."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.decode import Sample
from fedfreeze.errors import ConfigError
from fedfreeze.seeds import numpy_generator

GRID = 4  # cells of a pattern along height and width
LEVELS = 128  # of the pattern and of the noise each: their sum fits 8 bits, and neither hides the other
CHUNK_BYTES = 2**25  # drawn at once; an image that is larger is a chunk of its own


class Synthetic:
    """Images drawn anew from fixed seeds, the same for every seed of the run; sample i is of class i % classes."""

    def __init__(self, config: DataConfig):
        """Take shape and numbers. Raises ConfigError if a class would be left without a sample."""
        self.shape = tuple(config.synthetic_shape)
        self.samples = config.synthetic_samples
        self.classes = config.synthetic_classes
        if self.samples < self.classes:
            raise ConfigError(
                f"data.synthetic_samples={self.samples} leaves some of data.synthetic_classes={self.classes} empty; "
                "give at least one sample a class"
            )

    def fingerprint(self) -> str:
        """See Source."""
        return json.dumps(["synthetic-1", self.shape, self.samples, self.classes])

    def class_names(self) -> list[str] | None:
        """See Source."""
        return None

    def splits(self) -> dict[str, Iterator[Sample]]:
        """See Source."""
        return {"train": self._stream("train", self.samples), "test": self._stream("test", self.samples // 5)}

    def _stream(self, split: str, count: int) -> Iterator[Sample]:
        channels, height, width = self.shape
        grid = min(GRID, height), min(GRID, width)
        shape = (self.classes, channels, *grid)
        patterns = numpy_generator(0, "synthetic patterns").integers(0, LEVELS, shape, dtype=np.uint8)
        columns = np.arange(width) * grid[1] // width
        bands = np.searchsorted(np.arange(height) * grid[0] // height, np.arange(grid[0] + 1))
        chunk = max(1, CHUNK_BYTES // math.prod(self.shape))
        for start in range(0, count, chunk):
            labels = np.arange(start, min(start + chunk, count)) % self.classes
            noise = numpy_generator(0, f"synthetic noise {split}", start)
            size = len(labels) * math.prod(self.shape)
            words = noise.integers(0, 2**64, -(-size // 8), dtype=np.uint64)  # eight pixels at a time, for speed
            images = words.view(np.uint8)[:size].reshape(-1, *self.shape)
            images %= LEVELS
            rows = patterns[labels][:, :, :, columns]
            for row, (top, bottom) in enumerate(pairwise(bands)):
                images[:, :, top:bottom] += rows[:, :, row, None]
            yield from zip(images, labels.tolist(), strict=True)
