"""Labels by device: the file, the picture, and where they are too many."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.partition import partition
from fedfreeze.data.partition_summary import draw_partition, summarise
from fedfreeze.data.store import Data, Split
from fedfreeze.errors import ConfigError
from tests.support.checks import assert_one_line

LABELS = np.array([0, 1, 2, 0, 0, 2])
PARTS = [np.array([0, 3, 5]), np.array([], dtype=np.int64), np.array([1, 2, 4])]


def data(labels: np.ndarray = LABELS, classes: int = 4) -> Data:
    split = Split(np.zeros((len(labels), 1, 2, 2), np.uint8), labels)
    return Data(split, split, classes, (0.0,), (1.0,))


def test_counts_and_lines_of_each_device() -> None:
    summary = summarise(PARTS, data())
    assert summary.samples.tolist() == [3, 0, 3]
    assert summary.labels.tolist() == [2, 0, 3]
    rows = list(csv.DictReader(io.StringIO(summary.csv([1.5, None, 2.0]))))
    assert rows[0] == {
        "device": "0",
        "memory_cap_mib": "1.5",
        "samples": "3",
        "labels": "2",
        "label_0": "2",
        "label_1": "0",
        "label_2": "1",
        "label_3": "0",
    }
    assert [row["memory_cap_mib"] for row in rows] == ["1.5", "", "2.0"]
    assert sum(int(row[f"label_{i}"]) for row in rows for i in range(4)) == len(LABELS)


@pytest.mark.parametrize("config", [DataConfig(alpha=a) for a in (0.01, 1e-6)] + [DataConfig(partition="shards")])
def test_every_sample_and_every_device_stands_in_the_file_once(config: DataConfig) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1437)
    summary = summarise(partition(labels, 500, config, 0), data(labels, 10))
    rows = list(csv.DictReader(io.StringIO(summary.csv([1.0] * 500))))
    assert [int(row["device"]) for row in rows] == list(range(500))
    assert sum(int(row["samples"]) for row in rows) == 1437
    for label in range(10):
        assert sum(int(row[f"label_{label}"]) for row in rows) == (labels == label).sum()
    for row in rows:
        counts = [int(row[f"label_{label}"]) for label in range(10)]
        assert (int(row["samples"]), int(row["labels"])) == (sum(counts), np.count_nonzero(counts))


def test_many_classes_are_told_by_device_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fedfreeze.data.partition_summary._MOST_CELLS", 11)
    summary = summarise(PARTS, data())
    assert summary.counts is None
    assert summary.csv([1.0, 2.0, 3.0]).splitlines()[:2] == ["device,memory_cap_mib,samples,labels", "0,1.0,3,2"]
    with pytest.raises(ConfigError) as caught:
        draw_partition(summary, tmp_path / "p.png")
    assert_one_line(caught.value, "too many to draw")


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_picture(ending: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "new" / f"partition.{ending}"
    draw_partition(summarise(PARTS, data()), path)
    assert path.read_bytes().startswith(begins)
    assert len(path.read_bytes()) > 2000
