"""The partition at a glance: which labels each device has, as a CSV file and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedfreeze.data.partition import Partition
from fedfreeze.data.store import Data
from fedfreeze.errors import ConfigError, UnavailableError, storage_error

_PICTURE_FORMATS = (".png", ".svg", ".pdf")
_MOST_CELLS = 4_000_000  # of devices x labels; what is larger is told by device alone


@dataclass(frozen=True)
class PartitionSummary:
    """What each device has; all arrays int64."""

    samples: np.ndarray
    """Samples of each device."""
    labels: np.ndarray
    """Different labels of each device."""
    counts: np.ndarray | None
    """Samples of each label (devices, classes); None where that is too large to look at."""

    def csv(self, memory_cap_mib: Sequence[float | None]) -> str:
        """Return a line a device: number, cap in MiB (empty: none), samples, labels, and samples of each label."""
        classes = 0 if self.counts is None else self.counts.shape[1]
        lines = [",".join(["device", "memory_cap_mib", "samples", "labels", *(f"label_{i}" for i in range(classes))])]
        for device, cap in enumerate(memory_cap_mib):
            row = [] if self.counts is None else self.counts[device].tolist()
            facts = [device, "" if cap is None else cap, self.samples[device], self.labels[device], *row]
            lines.append(",".join(str(fact) for fact in facts))
        return "\n".join(lines) + "\n"


def summarise(parts: Partition, data: Data) -> PartitionSummary:
    """Count samples and labels of each device."""
    devices, classes = len(parts), data.num_classes
    samples = np.array([len(rows) for rows in parts], dtype=np.int64)
    owners = np.repeat(np.arange(devices), samples)
    # only the pairs of device and label that there are: devices x classes may be far more
    pairs, numbers = np.unique(owners * classes + data.train.labels[np.concatenate(parts)], return_counts=True)
    counts = None
    if devices * classes <= _MOST_CELLS:
        counts = np.zeros((devices, classes), dtype=np.int64)
        counts.flat[pairs] = numbers
    return PartitionSummary(samples, np.bincount(pairs // classes, minlength=devices), counts)


def draw_partition(summary: PartitionSummary, path: Path) -> None:
    """Draw the labels of each device as a heat map (devices by labels, shade: samples), and samples a device beside it.

    Raises ConfigError for another file ending and for too many devices and labels to draw, UnavailableError without
    matplotlib, StorageError.
    """
    if path.suffix.lower() not in _PICTURE_FORMATS:
        raise ConfigError(f"--partition-picture: {path} must end in {', '.join(_PICTURE_FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError("a picture needs matplotlib; pip install matplotlib") from None
    counts = summary.counts
    if counts is None:
        raise ConfigError(f"--partition-picture: more than {_MOST_CELLS} devices x labels are too many to draw")
    devices, classes = counts.shape
    figure = Figure(figsize=(min(14.0, 4.5 + 0.25 * classes), min(10.0, 2.5 + 0.09 * devices)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    image = heat.imshow(counts, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0)
    heat.set(xlabel="label", ylabel="device", title="samples of each label")
    _whole_ticks(heat.xaxis)
    _whole_ticks(heat.yaxis)
    bars.barh(np.arange(devices), summary.samples, height=0.8, color="0.35")
    bars.set(xlabel="samples", title="all labels")
    figure.colorbar(image, ax=bars, label="samples of one label")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise storage_error("write", path, error) from None


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
