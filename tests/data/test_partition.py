"""Partitions: every sample goes to exactly one device, and each partition spreads as it says."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.partition import PARTITIONS, partition

TEN_CLASSES = np.repeat(np.arange(10), 100)
NAMES = ["iid", "dirichlet", "shards"]


def spread(name: str, devices: int, labels=TEN_CLASSES, seed: int = 0, **options) -> list[np.ndarray]:
    return partition(np.asarray(labels), devices, DataConfig(partition=name, **options), seed)


def class_counts(parts: list[np.ndarray], labels=TEN_CLASSES) -> np.ndarray:
    """Return devices x classes."""
    return np.array([np.bincount(labels[part], minlength=10) for part in parts])


def test_every_partition_of_the_configuration_is_tested_here():
    assert sorted(PARTITIONS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    devices=st.integers(1, 80),
    seed=st.integers(0, 2**32),
    alpha=st.sampled_from([1e-300, 1e-4, 0.1, 1.0, 100.0, 1e12]),
    shards=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_goes_to_exactly_one_device(name, labels, devices, seed, alpha, shards):
    parts = spread(name, devices, labels, seed, alpha=alpha, shards_per_device=shards)
    assert len(parts) == devices
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part in parts:
        assert np.issubdtype(part.dtype, np.integer)
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_partition(name):
    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(spread(name, 7, seed=1), spread(name, 7, seed=1))
    assert not same(spread(name, 7, seed=1), spread(name, 7, seed=2))


@pytest.mark.parametrize("name", NAMES)
def test_one_device_gets_everything(name):
    (part,) = spread(name, 1)
    assert np.array_equal(part, np.arange(1000))


@pytest.mark.parametrize("devices", [1, 3, 7, 999, 1000, 1003])
def test_iid_is_even(devices):
    sizes = [len(part) for part in spread("iid", devices)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_mixes_the_classes():
    counts = class_counts(spread("iid", 4))
    # 25 of each class expected on each device, sd about 4.1
    assert counts.min() > 5
    assert counts.max() < 50
    assert len(np.unique(counts)) > 3


def test_small_alpha_gives_each_class_to_few_devices_and_large_alpha_to_all_alike():
    few = class_counts(spread("dirichlet", 10, alpha=1e-3))
    assert np.median(few.max(axis=0)) >= 95
    even = class_counts(spread("dirichlet", 10, alpha=1e6))
    assert even.min() >= 9
    assert even.max() <= 11
    middle = class_counts(spread("dirichlet", 10, alpha=0.5))
    assert even.max() < np.median(middle.max(axis=0)) < np.median(few.max(axis=0))


def test_an_alpha_at_which_every_draw_underflows_gives_whole_classes_to_seeded_devices():
    counts = class_counts(spread("dirichlet", 10, alpha=1e-300))
    assert (np.sort(counts, axis=0)[-1] == 100).all()
    assert len(np.unique(counts.argmax(axis=0))) > 1


@pytest.mark.parametrize("alpha", [1e300, 1e307, 1.7e308])
def test_an_alpha_at_which_the_sum_of_the_draws_overflows_gives_even_shares(alpha):
    """It is the limit of large alpha; all samples on one device would be that of a small one."""
    counts = class_counts(spread("dirichlet", 10, alpha=alpha))
    assert (counts == 10).all()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("iid", {}, "2bd391f2689bcbfd"),
        ("dirichlet", {"alpha": 0.01}, "7dc291003db527df"),
        ("dirichlet", {"alpha": 1e-6}, "423a0e3faa6cc0db"),
        ("dirichlet", {"alpha": 1e6}, "733ec55839e24810"),
        ("shards", {}, "4baef48109772a00"),
        ("shards", {"shards_per_device": 20}, "6993114a1c8b2f28"),
    ],
)
def test_partitions_are_those_that_earlier_versions_made(name, options, expected):
    labels = np.random.default_rng(0).integers(0, 10, 3000)
    digest = hashlib.sha256()
    for part in spread(name, 500, labels, **options):
        digest.update(np.int64(len(part)).tobytes() + part.astype(np.int64).tobytes())
    assert digest.hexdigest()[:16] == expected


@pytest.mark.parametrize("name", NAMES)
def test_as_many_devices_as_samples(name):
    """100,000 devices: with an array for each device and class it would take minutes and gigabytes."""
    labels = np.random.default_rng(0).integers(0, 50, 100_000)
    parts = spread(name, 100_000, labels, alpha=0.01)
    assert len(parts) == 100_000
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100_000))


def test_dirichlet_shares_follow_the_draw():
    """The variance of a share is (1/n)(1 - 1/n) / (n alpha + 1)."""
    devices, alpha = 10, 0.5
    shares = np.concatenate([class_counts(spread("dirichlet", devices, seed=s, alpha=alpha)) for s in range(30)]) / 100
    assert shares.mean() == pytest.approx(0.1)
    assert shares.var() == pytest.approx(0.1 * 0.9 / (devices * alpha + 1), rel=0.15)


def test_shards_give_each_device_few_classes_and_even_sizes():
    # 20 shards of 50: each lies within one class, so a device with two shards has at most two classes
    counts = class_counts(spread("shards", 10, shards_per_device=2))
    assert (counts.sum(axis=1) == 100).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()
    assert set(np.unique(counts)) <= {0, 50, 100}
    one = class_counts(spread("shards", 10, shards_per_device=1))
    assert sorted(one.argmax(axis=1)) == list(range(10))
    assert (one.max(axis=1) == 100).all()


@pytest.mark.parametrize(
    ("name", "options"), [("iid", {}), ("shards", {"shards_per_device": 1}), ("dirichlet", {"alpha": 1e6})]
)
def test_samples_are_mixed_within_a_class(name, options):
    """Samples of a class that come in some order in the data must not go to devices by that order."""
    for part in spread(name, 2, np.zeros(1000, dtype=int), **options):
        assert 400 < len(part) < 600
        # 499.5 expected, sd of the mean about 9
        assert 440 < part.mean() < 560


def test_shards_do_not_need_sorted_labels():
    labels = np.tile(np.arange(10), 100)
    counts = class_counts(spread("shards", 10, labels, shards_per_device=1), labels)
    assert (counts.max(axis=1) == 100).all()


def test_labels_need_not_be_consecutive():
    labels = np.array([7, 7, -1, 1000, -1, 7])
    for name in NAMES:
        assert sorted(np.concatenate(spread(name, 3, labels)).tolist()) == list(range(6))
