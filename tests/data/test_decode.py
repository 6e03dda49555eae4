"""Grey or in colour is decided over a whole data set, whatever forms its images have."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.huggingface import HuggingFace
from fedfreeze.data.store import open_store, prepare
from tests.support.checks import pictures


@pytest.fixture
def local(tmp_path, cache) -> DataConfig:
    return DataConfig(path=str(tmp_path / "flowers"), cache_dir=str(cache))


@pytest.fixture
def write_split(tmp_path, write_parquet) -> Callable[..., Path]:
    """Write a split of images, by turns of class 0 and 1 where no labels are given."""

    def write(split: str, images: list | None = None, labels: list | None = None) -> Path:
        images = pictures(4) if images is None else images
        return write_parquet(
            tmp_path / "flowers" / f"{split}-0.parquet", images, labels or [index % 2 for index in range(len(images))]
        )

    return write


def encoded(mode: str, seed: int) -> bytes:
    """Return a PNG image of a mode of Pillow; in colour, where it has any."""
    pixels = pictures(1, colour=mode in ("RGB", "RGBA", "P"), seed=seed)[0]
    deep = pixels.astype(np.uint16) * 257
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
@pytest.mark.parametrize("place", ["train 3", "train 0", "test 0", "test 3"])
def test_one_image_in_colour_anywhere_makes_all_colour(local, write_split, mode, place):
    images = {split: [encoded(mode, seed) for seed in range(4)] for split in ("train", "test")}
    split, _, row = place.partition(" ")
    colour = pictures(1, colour=True, seed=9)[0]
    images[split][int(row)] = colour
    for name, these in images.items():
        write_split(name, these)
    data = open_store(prepare(local))
    assert data.image_shape == (3, 6, 5)
    stored = {"train": data.train.images, "test": data.test.images}
    np.testing.assert_array_equal(stored[split][int(row)], colour.transpose(2, 0, 1))
    for name, these in stored.items():
        for index, image in enumerate(these):
            if (name, index) != (split, int(row)):
                grey = np.asarray(Image.open(io.BytesIO(images[name][index])))
                grey = {"1": grey.astype(np.uint8) * 255, "LA": grey[..., 0] if grey.ndim == 3 else grey}.get(
                    mode, grey
                )
                wanted = (grey.astype(int) >> 8).astype(np.uint8) if mode == "I;16" else grey
                np.testing.assert_array_equal(image, [wanted] * 3)
    # the statistics are of the images as they are stored, and each counts once
    assert data.mean == pytest.approx((data.train.images / 255).mean((0, 2, 3)), rel=1e-12)


@pytest.mark.parametrize("modes", ["RGB L P", "L RGBA L", "P P P", "1 L I;16 RGB", "L 1 I;16 LA"])
def test_modes_that_mix_come_out_as_in_image_folders(tmp_path, cache, local, write_split, modes):
    images = [encoded(mode, seed) for seed, mode in enumerate(modes.split())]
    labels = [0, *[1] * (len(images) - 1)]
    for split in ("train", "test"):
        write_split(split, images, labels)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = tmp_path / "folder" / split / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
    parquet = open_store(prepare(local))
    folder = open_store(prepare(replace(local, path=str(tmp_path / "folder"))))
    assert parquet.image_shape[0] == (1 if modes == "L 1 I;16 LA" else 3)
    np.testing.assert_array_equal(parquet.train.images, folder.train.images)
    np.testing.assert_array_equal(parquet.test.images, folder.test.images)
    assert parquet.mean == folder.mean


def test_a_grey_set_is_decoded_once(local, write_split, monkeypatch):
    """Only a set whose first images alone are grey is read a second time."""
    asked = []
    before = HuggingFace.splits
    monkeypatch.setattr(HuggingFace, "splits", lambda source: asked.append(1) or before(source))
    for test, times in ((pictures(2), 1), (pictures(2, colour=True), 2)):
        asked.clear()
        write_split("train")
        write_split("test", test)
        prepare(local)
        assert len(asked) == times
