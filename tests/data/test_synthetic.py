"""Synthetic images: shape, balance, the same bits every time, something to learn, and little memory."""

import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.config.schema import DataConfig
from fedfreeze.data import synthetic
from fedfreeze.data.sources import fingerprint_key, make_source
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.errors import ConfigError, ExitCode
from tests.support.checks import assert_one_line


def made(cache: Path, **options: object) -> Data:
    return open_store(prepare(DataConfig(name="synthetic", cache_dir=str(cache), **options)))


@pytest.mark.parametrize("shape", [[3, 32, 32], [1, 8, 8], [1, 7, 30], [5, 3, 2], [2, 1, 1]])
def test_shape_number_and_balance(cache, shape):
    data = made(cache, synthetic_shape=shape, synthetic_samples=60, synthetic_classes=7)
    assert data.image_shape == tuple(shape)
    assert data.num_classes == 7
    assert data.train.labels.tolist() == [index % 7 for index in range(60)]
    assert data.test.labels.tolist() == [index % 7 for index in range(12)]


def test_defaults(cache):
    data = made(cache)
    assert data.train.images.shape == (10_000, 3, 32, 32)
    assert data.test.images.shape == (2_000, 3, 32, 32)
    assert np.bincount(data.train.labels).tolist() == [1_000] * 10
    assert np.bincount(data.test.labels).tolist() == [200] * 10


def test_the_same_bits_every_time_and_other_images_in_every_place(cache, tmp_path):
    options = {"synthetic_shape": [1, 6, 6], "synthetic_samples": 40, "synthetic_classes": 2}
    first, second = made(cache, **options), made(tmp_path / "other", **options)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.images, second.test.images)
    images = [image.tobytes() for split in (first.train, first.test) for image in split.images]
    assert len(set(images)) == 48  # the test images are not among the training images


@pytest.mark.parametrize("chunk_bytes", [100, 10])
def test_chunks_differ_from_each_other(monkeypatch, chunk_bytes):
    monkeypatch.setattr(synthetic, "CHUNK_BYTES", chunk_bytes)
    config = DataConfig(name="synthetic", synthetic_shape=[1, 5, 5], synthetic_samples=10, synthetic_classes=2)
    samples = list(make_source(config).splits()["train"])  # in chunks of 4, 4 and 2, or one by one
    assert [label for _, label in samples] == [0, 1] * 5
    assert len({image.tobytes() for image, _ in samples}) == 10


@pytest.mark.parametrize(("shape", "classes"), [([3, 32, 32], 10), ([1, 16, 9], 20)])
def test_a_nearest_class_mean_tells_the_classes_apart(cache, shape, classes):
    data = made(cache, synthetic_shape=shape, synthetic_samples=600, synthetic_classes=classes)
    train = data.train.images.reshape(600, -1).astype(np.float64)
    test = data.test.images.reshape(120, -1).astype(np.float64)
    means = np.stack([train[data.train.labels == label].mean(0) for label in range(classes)])
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == data.test.labels).mean() > 0.9
    # but images of a class are far from equal: their noise is as strong as the patterns are
    assert np.stack([train[data.train.labels == label].std(0) for label in range(classes)]).mean() > 25


def test_no_pixel_wraps_around(cache):
    data = made(cache, synthetic_samples=100)
    low, high = data.train.images.min(), data.train.images.max()
    assert low < 20
    assert 230 < high <= 254
    # a wrapped sum would fold bright cells over dark ones and spread the noise of a cell over all levels
    own = data.train.images[data.train.labels == 3].astype(int)
    assert (own.max(0) - own.min(0)).max() <= 127


def test_large_images_stream():
    config = DataConfig(name="synthetic", synthetic_shape=[3, 2_000, 3_000], synthetic_samples=50)
    tracemalloc.start()
    try:
        shapes = [image.shape for image, _ in islice(make_source(config).splits()["train"], 7)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shapes == [(3, 2_000, 3_000)] * 7
    assert peak < 5 * 18e6  # all fifty would take 900 MB


def test_the_store_takes_large_images_in_blocks(cache):
    options = {"synthetic_shape": [1, 2_000, 3_000], "synthetic_samples": 10, "synthetic_classes": 2}
    tracemalloc.start()
    try:
        data = made(cache, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 110e6  # two chunks of 30 MB; the float64 sums of a whole image would add 96 MB
    levels = np.bincount(np.asarray(data.train.images).ravel(), minlength=256) / data.train.images.size
    mean = (levels * np.arange(256)).sum()
    assert data.mean == pytest.approx([mean / 255], rel=1e-12)
    assert data.std == pytest.approx([np.sqrt((levels * (np.arange(256) - mean) ** 2).sum()) / 255], rel=1e-9)


def test_fingerprints():
    def key(**options: object) -> str:
        return fingerprint_key(make_source(DataConfig(name="synthetic", **options)))

    assert key() == key(alpha=3.0)
    others = [key(synthetic_shape=[1, 32, 32]), key(synthetic_samples=5_000), key(synthetic_classes=5)]
    assert len({key(), *others}) == 4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"synthetic_samples": 10, "synthetic_classes": 11}, ["data.synthetic_samples=10", "synthetic_classes=11"]),
        ({"image_size": 8}, ["data.image_size=8", "data.synthetic_shape"]),
        ({"subset": "plain"}, ["data.subset=plain", "data.name=synthetic"]),
        ({"revision": "main"}, ["data.revision=main", "data.name=synthetic"]),
        ({"image_column": "picture"}, ["data.image_column=picture", "data.name=synthetic"]),
        ({"label_column": "class"}, ["data.label_column=class", "data.name=synthetic"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_contradictions(cache, options, parts):
    with pytest.raises(ConfigError) as caught:
        made(cache, **options)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 64
    assert_one_line(caught.value, *parts)
    assert not cache.exists()


def test_a_sample_a_class_is_enough(cache):
    assert made(cache, synthetic_samples=11, synthetic_classes=11).num_classes == 11
