"""Data: what the store holds, that it is written whole or not at all, damaged stores, and real CIFAR-10."""

import errno
import fcntl
import io
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfreeze.config.schema import DataConfig
from fedfreeze.data import store
from fedfreeze.data.sources import HuggingFace, Sample
from fedfreeze.data.store import Data, cache_folder, open_store, prepare
from fedfreeze.errors import ConfigError, DataError, ExitCode, FedfreezeError, StorageError
from tests.support.checks import assert_one_line

CIFAR10_CLASSES = 10

# --- scikit-learn's digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Data:
    return open_store(prepare(DataConfig(cache_dir=str(tmp_path_factory.mktemp("digits")))))


def test_digits_are_all_1797_samples_once(digits):
    from sklearn.datasets import load_digits

    real = load_digits()
    assert len(digits.train) + len(digits.test) == 1797
    assert len(digits.test) == 360
    assert digits.num_classes == 10
    assert digits.image_shape == (1, 8, 8)
    stored = sorted(
        (int(label), image.tobytes())
        for split in (digits.train, digits.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    # 0 to 16 become 0 to 255; level 8 lies half way, at 127.5, and becomes 128
    wanted = np.floor(real.data * 255 / 16 + 0.5).astype(np.uint8)
    assert stored == sorted((int(label), row.tobytes()) for row, label in zip(wanted, real.target, strict=True))


def test_digits_shapes_and_values(digits):
    for split in (digits.train, digits.test):
        assert split.images.shape == (len(split), 1, 8, 8)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert split.images.min() == 0
        assert split.images.max() == 255
        assert set(split.labels) == set(range(10))
        assert isinstance(split.images, np.memmap)
        assert not split.images.flags.writeable


def test_a_fifth_of_every_class_of_digits_is_test_data(digits):
    test, train = np.bincount(digits.test.labels), np.bincount(digits.train.labels)
    assert np.abs(test - (test + train) / 5).max() < 1


def test_mean_and_std_are_of_the_training_images(digits):
    pixels = np.asarray(digits.train.images, dtype=np.float64) / 255
    assert digits.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert digits.std == pytest.approx([pixels.std()], rel=1e-12)
    both = np.concatenate([digits.train.images, digits.test.images]) / 255
    assert digits.mean != pytest.approx([both.mean()], rel=1e-5)


@pytest.mark.parametrize("size", [3, 8, 20])
def test_digits_of_another_size(cache, digits, size):
    data = open_store(prepare(DataConfig(image_size=size, cache_dir=str(cache))))
    assert data.image_shape == (1, size, size)
    np.testing.assert_array_equal(data.train.labels, digits.train.labels)
    assert abs(data.mean[0] - digits.mean[0]) < 0.02
    if size == 8:
        np.testing.assert_array_equal(data.test.images, digits.test.images)


@pytest.mark.parametrize("key", ["subset", "revision", "image_column", "label_column"])
def test_digits_have_no_columns_and_no_subset(cache, key):
    with pytest.raises(ConfigError) as caught:
        prepare(DataConfig(cache_dir=str(cache), **{key: "small"}))
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 64
    assert_one_line(caught.value, f"data.{key}=small", "data.name=digits")


# --- the store: once, whole or not at all


class Colours:
    """A source of six colour images that counts how often it is decoded."""

    def __init__(self, during: Callable[[], None] = lambda: None):
        self.decoded = 0
        self.during = during

    def fingerprint(self) -> str:
        return "colours"

    def class_names(self) -> list[str] | None:
        return ["warm", "cold"]

    def splits(self) -> dict[str, Iterator[Sample]]:
        self.decoded += 1
        return {"train": self.samples(4, 1), "test": self.samples(2, 2)}

    def samples(self, count: int, seed: int) -> Iterator[Sample]:
        images = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 5), dtype=np.uint8)
        for index, image in enumerate(images):
            if index == count - 1 and seed == 2:
                self.during()  # all but the very last image are decoded
            yield image, index % 2


@pytest.fixture
def config(cache) -> DataConfig:
    return DataConfig(cache_dir=str(cache))


@pytest.fixture
def source(monkeypatch) -> Colours:
    colours = Colours()
    monkeypatch.setattr(store, "make_source", lambda config: colours)
    return colours


def test_prepare_decodes_once(config, cache, source):
    first = prepare(config)
    facts = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first.iterdir()}
    assert prepare(config) == first
    assert source.decoded == 1
    assert facts == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first.iterdir()}
    assert list(cache.iterdir()) == [first]


def test_the_store_holds_what_was_decoded(config, source):
    data = open_store(prepare(config))
    for split, count, seed in ((data.train, 4, 1), (data.test, 2, 2)):
        wanted = list(source.samples(count, seed))
        np.testing.assert_array_equal(split.images, [image for image, _ in wanted])
        assert split.labels.tolist() == [label for _, label in wanted]
    assert data.num_classes == 2
    assert data.class_names == ("warm", "cold")
    assert data.image_shape == (3, 4, 5)
    pixels = np.array([image for image, _ in source.samples(4, 1)], dtype=np.float64) / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-12)


def test_a_constant_channel_keeps_the_normalisation_finite(config, monkeypatch):
    class Constant(Colours):
        def samples(self, count: int, seed: int) -> Iterator[Sample]:
            for image, label in super().samples(count, seed):
                image[1] = 77
                yield image, label

    monkeypatch.setattr(store, "make_source", lambda config: Constant())
    data = open_store(prepare(config))
    assert data.mean[1] == pytest.approx(77 / 255)
    assert data.std[1] == pytest.approx(1 / 255)
    assert data.std[0] > 0.1


@pytest.mark.parametrize("error", [DataError("torn"), RuntimeError("our fault"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_behind(config, cache, source, error):
    def fail() -> None:
        assert len(list(cache.iterdir())) == 2  # it really is half way: the lock and the folder that fills
        raise error

    source.during = fail
    with pytest.raises(type(error)):
        prepare(config)
    assert list(cache.iterdir()) == []
    source.during = lambda: None
    assert len(open_store(prepare(config)).train) == 4


def test_losing_the_race_uses_the_winners_store(config, cache, source, monkeypatch):
    """On a file system without locks the rename decides."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    winners = []

    def another_process_is_faster() -> None:
        source.during = lambda: None
        winners.append(prepare(config))
        winners.append((winners[0] / "meta.json").stat().st_ino)

    source.during = another_process_is_faster
    folder = prepare(config)
    assert source.decoded == 2
    assert winners == [folder, (folder / "meta.json").stat().st_ino]
    assert list(cache.iterdir()) == [folder]
    assert len(open_store(folder).test) == 2


def test_the_store_can_be_read_by_whom_the_umask_allows(config, source):
    before = os.umask(0o022)
    try:
        folder = prepare(config)
    finally:
        os.umask(before)
    # data.cache_dir may be shared by a group
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_behind(config, cache, source, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError) as caught:
        prepare(config)
    assert caught.value.exit_code == ExitCode.STORAGE == 74
    assert_one_line(caught.value, cache, "No space left on device")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path, source):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(StorageError) as caught:
            prepare(DataConfig(cache_dir=str(path)))
        assert_one_line(caught.value, path.parent, "--data.cache_dir=FOLDER")
    assert source.decoded == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "fedfreeze"
    assert cache_folder(DataConfig(cache_dir="/scratch/mine")) == Path("/scratch/mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "fedfreeze"


def test_without_a_home_the_error_says_which_key_to_give(monkeypatch, tmp_path):
    """As in a container: the user id has no name, and HOME is not set."""

    def nobody(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(StorageError) as caught:
        prepare(DataConfig())
    assert_one_line(caught.value, "HOME is not set", f"user {os.getuid()}", "--data.cache_dir=FOLDER")
    assert len(open_store(prepare(DataConfig(cache_dir=str(tmp_path)))).train) == 1437
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "fedfreeze"


def test_preparing_needs_nothing_but_the_cache_folder(config, cache, source, tmp_path):
    prepare(config)
    assert list(tmp_path.iterdir()) == [cache]


DAMAGES = {
    "meta cut": lambda folder: os.truncate(folder / "meta.json", 20),
    "meta empty": lambda folder: os.truncate(folder / "meta.json", 0),
    "meta not a mapping": lambda folder: (folder / "meta.json").write_text("[]"),
    "meta without shape": lambda folder: (folder / "meta.json").write_text('{"num_classes": 2}'),
    "meta not text": lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\xfa"),
    "images cut": lambda folder: os.truncate(folder / "train.images.u8", 10),
    "images empty": lambda folder: os.truncate(folder / "test.images.u8", 0),
    "images gone": lambda folder: (folder / "test.images.u8").unlink(),
    "labels cut": lambda folder: os.truncate(folder / "train.labels.npy", 140),
    "labels empty": lambda folder: os.truncate(folder / "train.labels.npy", 0),
    "labels gone": lambda folder: (folder / "test.labels.npy").unlink(),
    "labels a pickle": lambda folder: (folder / "train.labels.npy").write_bytes(pickle.dumps([0, 1, 0, 1])),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_store_is_a_data_error_that_names_the_folder(config, source, damage):
    folder = prepare(config)
    damage(folder)
    with pytest.raises(DataError) as caught:
        open_store(folder)
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert_one_line(caught.value, folder, "delete that folder")


def test_a_store_without_its_meta_is_made_anew_or_named(config, cache, source):
    folder = prepare(config)
    (folder / "meta.json").unlink()
    try:
        assert len(open_store(prepare(config)).train) == 4
    except FedfreezeError as error:
        assert_one_line(error, cache)
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_source_without_samples(config, source, monkeypatch, split):
    streams = source.splits() | {split: iter(())}
    monkeypatch.setattr(source, "splits", lambda: streams)
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert_one_line(caught.value, f"split {split}", "no samples")


# --- real CIFAR-10


def rows_of(folder: Path, split: str) -> tuple[list[bytes], list[int]]:
    """Read a split without fedfreeze."""
    from pyarrow import parquet

    (file,) = folder.glob(f"{split}-*.parquet")
    table = parquet.read_table(file)
    return [image["bytes"] for image in table.column("img").slice(0, 40).to_pylist()], table["label"].to_pylist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_first_rows_of_cifar10(cifar10_folder, split):
    encoded, labels = rows_of(cifar10_folder, split)
    assert len(labels) == {"train": 50_000, "test": 10_000}[split]
    assert set(labels) == set(range(CIFAR10_CLASSES))
    samples = list(islice(HuggingFace(DataConfig(path=str(cifar10_folder))).splits()[split], 40))
    assert [label for _, label in samples] == labels[:40]
    for (image, _), data in zip(samples, encoded, strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (3, 32, 32)
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        for channel in range(3):
            np.testing.assert_array_equal(image[channel], pixels[:, :, channel])


@pytest.mark.slow
def test_all_of_cifar10(cifar10_folder, tmp_path_factory):
    data = open_store(prepare(DataConfig(path=str(cifar10_folder), cache_dir=str(tmp_path_factory.mktemp("cifar10")))))
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert data.test.images.shape == (10_000, 3, 32, 32)
    assert data.num_classes == CIFAR10_CLASSES
    assert np.bincount(data.train.labels).tolist() == [5_000] * CIFAR10_CLASSES
    assert np.bincount(data.test.labels).tolist() == [1_000] * CIFAR10_CLASSES
    for split, images in (("train", data.train), ("test", data.test)):
        assert images.labels.tolist() == rows_of(cifar10_folder, split)[1]
    # the well-known figures of the lossless original; these images went through JPEG
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-3)
    some = np.asarray(data.train.images[:500], dtype=np.float64) / 255
    assert np.abs(some.mean((0, 2, 3)) - data.mean).max() < 0.02
