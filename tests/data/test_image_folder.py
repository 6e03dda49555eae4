"""Image folders: what comes out of real files, how sizes are made equal, and a one-line error for every bad folder."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.huggingface import HuggingFace
from fedfreeze.data.image_folder import ImageFolder, in_order
from fedfreeze.data.sources import fingerprint_key, make_source
from fedfreeze.data.store import open_store, prepare
from fedfreeze.errors import ConfigError, DataError, ExitCode
from tests.support.checks import assert_one_line, pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "flowers"


@pytest.fixture
def config(folder, cache) -> Callable[..., DataConfig]:
    return lambda **options: DataConfig(path=str(folder), cache_dir=str(cache), **options)


@pytest.fixture
def save(folder) -> Callable[..., Path]:
    """Write pixels as an image file, its format by the suffix."""

    def write(name: str, pixels: np.ndarray, **options: object) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, **options)
        return file

    return write


@pytest.fixture
def flowers(save) -> dict[str, np.ndarray]:
    """Write a good data set of two classes; return its pixels by name."""
    names = ["train/rose/a.png", "train/rose/b.png", "train/tulip/c.png", "test/rose/d.png", "test/tulip/e.png"]
    images = dict(zip(names, pictures(5), strict=True))
    for name, pixels in images.items():
        save(name, pixels)
    return images


# --- what comes out


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize(("height", "width"), [(6, 5), (1, 1), (1, 33), (127, 3)])
def test_images_come_out_as_they_went_in(config, save, colour, height, width):
    images = pictures(6, colour=colour, height=height, width=width)
    # written in another order than that of the names
    names = ["train/b/2.png", "train/b/10.png", "train/c/x.png", "train/A/x.png", "test/c/x.png", "test/A/x.png"]
    for name, pixels in zip(names, images, strict=True):
        save(name, pixels)
    data = open_store(prepare(config()))
    assert data.image_shape == (3 if colour else 1, height, width)
    assert data.num_classes == 3
    assert data.train.labels.tolist() == [0, 1, 1, 2]  # A, b, b, c
    assert data.test.labels.tolist() == [0, 2]
    for split, order in ((data.train, [3, 1, 0, 2]), (data.test, [5, 4])):
        wanted = np.stack([images[index] for index in order])
        wanted = wanted.transpose(0, 3, 1, 2) if colour else wanted[:, None]
        np.testing.assert_array_equal(split.images, wanted)


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "validation"), ("train", "Val")])
def test_names_of_splits(config, save, train, test):
    for name, pixels in zip([f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/1.png"], pictures(3), strict=True):
        save(name, pixels)
    data = open_store(prepare(config()))
    assert data.train.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(data.test.images[0, 0], pictures(3)[2])


def test_the_test_split_wins_over_a_validation_split(config, save, flowers):
    save("val/rose/a.png", pictures(1, seed=9)[0])
    assert len(open_store(prepare(config())).test) == 2


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "gif", "tif", "tiff", "pgm", "jpg", "JPEG", "webp", "ppm"])
def test_formats(config, flowers, folder, save, suffix):
    flat = np.full((6, 5), 100, dtype=np.uint8)
    (folder / "train/tulip/c.png").unlink()
    save(f"train/tulip/x.{suffix}", np.stack([flat] * 3, 2) if suffix in ("webp", "ppm") else flat)
    data = open_store(prepare(config()))
    assert data.train.labels.tolist() == [0, 0, 1]
    assert np.abs(data.train.images[2].astype(int) - 100).max() <= 2


def test_other_and_hidden_files_do_not_count(config, flowers, folder):
    for name in ("README.md", "train/notes.txt", "train/rose/Thumbs.db", "train/rose/.hidden.png", ".DS_Store"):
        (folder / name).write_text("no image")
    (folder / "train/.ipynb_checkpoints").mkdir()
    data = open_store(prepare(config()))
    assert data.train.labels.tolist() == [0, 0, 1]


def test_images_further_down_count_for_their_class(config, flowers, save):
    save("train/rose/images/0.png", pictures(1, seed=4)[0])
    data = open_store(prepare(config()))
    assert data.train.labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(data.train.images[2, 0], pictures(1, seed=4)[0])


def test_links_are_followed(config, flowers, folder, tmp_path):
    (folder / "train/tulip").rename(tmp_path / "elsewhere")
    (folder / "train/tulip").symlink_to(tmp_path / "elsewhere")
    (folder / "test/rose/f.png").symlink_to(tmp_path / "elsewhere/c.png")
    data = open_store(prepare(config()))
    assert data.train.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(data.test.images[1, 0], flowers["train/tulip/c.png"])


@pytest.mark.parametrize("where", ["train/rose/b.png", "test/tulip/e.png"])
def test_one_image_in_colour_makes_all_colour(config, flowers, save, where):
    colour = pictures(1, colour=True, seed=3)[0]
    save(where, colour)
    data = open_store(prepare(config()))
    stored = data.train.images[1] if "train" in where else data.test.images[1]
    np.testing.assert_array_equal(stored, colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(data.train.images[0], np.stack([flowers["train/rose/a.png"]] * 3))


def test_sixteen_bit_grey_keeps_its_contrast_among_grey_and_colour(config, flowers, save):
    deep = np.linspace(0, 65535, 30).astype(np.uint16).reshape(6, 5)
    save("train/rose/a.png", deep)
    np.testing.assert_allclose(open_store(prepare(config())).train.images[0, 0], deep / 257, atol=1)
    save("test/rose/d.png", pictures(1, colour=True)[0])
    np.testing.assert_allclose(open_store(prepare(config())).train.images[0], [deep / 257] * 3, atol=1)


def test_photographs_stand_upright(config, flowers, save):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: a quarter turn clockwise sets it up
    lying = pictures(1, height=5, width=6, seed=8)[0]
    save("train/rose/a.png", lying, exif=exif)
    np.testing.assert_array_equal(open_store(prepare(config())).train.images[0, 0], np.rot90(lying, -1))


def test_a_test_split_may_lack_classes(config, flowers, folder):
    (folder / "test/rose/d.png").unlink()
    (folder / "test/rose").rmdir()
    data = open_store(prepare(config()))
    assert data.test.labels.tolist() == [1]  # one image is enough, and keeps the number of its class
    assert data.num_classes == 2


@pytest.mark.parametrize("name", ["with space", "näh", "set[1]", "a*b", "100%"])
def test_folders_of_any_name(tmp_path, cache, flowers, folder, name):
    (folder / "train/rose").rename(folder / "train" / name)
    (folder / "test/rose").rename(folder / "test" / name)
    folder.rename(tmp_path / name)
    data = open_store(prepare(DataConfig(path=str(tmp_path / name), cache_dir=str(cache))))
    assert sorted(data.train.labels.tolist()) in ([0, 0, 1], [0, 1, 1])


@pytest.mark.parametrize("path", [".", "./", "../flowers"])
def test_a_relative_path(cache, folder, flowers, monkeypatch, path):
    monkeypatch.chdir(folder)
    data = open_store(prepare(DataConfig(path=path, cache_dir=str(cache))))
    np.testing.assert_array_equal(data.train.images[2, 0], flowers["train/tulip/c.png"])


def test_parquet_wins(config, flowers, folder, write_parquet):
    assert isinstance(make_source(config()), ImageFolder)
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", pictures(4, seed=6), [0, 1, 2, 1])
    assert isinstance(make_source(config()), HuggingFace)
    np.testing.assert_array_equal(open_store(prepare(config())).train.images[:, 0], pictures(4, seed=6))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (list(map(str, range(12))), list(map(str, range(12)))),
        (["1", "10", "2", "3"], ["1", "2", "3", "10"]),
        (["00", "01", "10", "2"], ["00", "01", "2", "10"]),
        (["-1", "-2", "0", "1"], ["-2", "-1", "0", "1"]),
        (["1", "10", "2", "unknown"], ["1", "10", "2", "unknown"]),
        (["rose", "Tulip", "lily10", "lily2"], ["Tulip", "lily10", "lily2", "rose"]),
    ],
)
def test_classes_are_numbered_in_a_sensible_order_the_same_in_both_splits(config, save, names, order):
    assert in_order(names) == in_order(names[::-1]) == order
    images = dict(zip(names, pictures(len(names), seed=5), strict=True))
    for name in names:
        save(f"train/{name}/a.png", images[name])
    for name in names[1:]:  # the test split lacks a class
        save(f"test/{name}/a.png", images[name])
    data = open_store(prepare(config()))
    assert data.class_names == tuple(order)
    assert data.train.labels.tolist() == list(range(len(names)))
    for split in (data.train, data.test):
        for image, label in zip(split.images, split.labels, strict=True):
            np.testing.assert_array_equal(image[0], images[order[label]])
    assert sorted(data.test.labels) == [index for index, name in enumerate(order) if name != names[0]]


# --- data.image_size


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_image_size_scales_and_crops_to_the_middle(config, save, flowers, colour, size):
    shapes = [(6, 5), (31, 7), (7, 31), (1, 40)]
    images = [pictures(1, height=height, width=width, colour=colour)[0] for height, width in shapes]
    for index, pixels in enumerate(images):
        save(f"train/rose/odd{index}.png", pixels)
    data = open_store(prepare(config(image_size=size)))
    assert data.image_shape == (3 if colour else 1, size, size)
    for index, pixels in enumerate(images):
        wanted = np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BILINEAR))
        wanted = wanted.transpose(2, 0, 1) if colour else wanted[None]
        np.testing.assert_array_equal(data.train.images[2 + index], wanted)


def test_the_crop_keeps_the_middle_and_the_proportions(config, flowers, save):
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    save("train/rose/a.png", wide)
    np.testing.assert_array_equal(open_store(prepare(config(image_size=8))).train.images[0, 0], np.full((8, 8), 200))


def test_sizes_that_differ_name_both_files_and_the_way_out(config, flowers, save):
    save("test/rose/d.png", pictures(1, width=7)[0])
    assert_bad(config(), "test/rose/d.png", "(1, 6, 7)", "train/rose/a.png", "(1, 6, 5)", "data.image_size")
    assert open_store(prepare(config(image_size=6))).image_shape == (1, 6, 6)


# --- the decoded store follows the files


def test_fingerprints(config, flowers, folder, save):
    def key(**options: object) -> str:
        return fingerprint_key(make_source(config(**options)))

    keys = [key()]
    assert key() == keys[0]
    assert key(alpha=3.0) == keys[0]
    (folder / "train/rose/notes.txt").write_text("not data")
    assert key() == keys[0]
    keys += [key(image_size=8), key(image_size=9)]
    os.utime(folder / "test/rose/d.png", ns=(1, 1))  # changed within its size
    keys.append(key())
    (folder / "train/rose/b.png").rename(folder / "train/rose/z.png")  # another order
    keys.append(key())
    (folder / "train/rose/z.png").rename(folder / "train/tulip/z.png")  # another class
    keys.append(key())
    save("train/tulip/new.png", pictures(1)[0])
    keys.append(key())
    assert len(set(keys)) == len(keys) == 7


def test_the_store_follows_the_files(config, flowers, save):
    first = prepare(config())
    assert prepare(config()) == first
    save("train/rose/a.png", pictures(1, seed=7)[0])
    second = prepare(config())
    assert second != first
    np.testing.assert_array_equal(open_store(second).train.images[0, 0], pictures(1, seed=7)[0])


# --- bad folders: an error of one line that names the place


def assert_bad(config: DataConfig, *parts: object) -> None:
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert_one_line(caught.value, config.path, *parts)
    assert len(str(caught.value)) < 500
    cache = Path(config.cache_dir or "")
    assert not cache.exists() or list(cache.iterdir()) == []


EXPECTED = ("train-*.parquet", "train/CLASS/*.png", "test/CLASS/*.png")


def test_no_folder_and_an_empty_folder_name_both_forms(config, folder):
    assert_bad(config(), "is not a folder", *EXPECTED)
    folder.mkdir()
    assert_bad(config(), "no .parquet file", "found: nothing", *EXPECTED)


def test_classes_without_splits(config, save):
    for index, pixels in enumerate(pictures(12)):
        save(f"flower{index:02}/a.png", pixels)
    assert_bad(config(), "no train folder", "found: flower00, flower01", "flower07 and 4 more", *EXPECTED)


@pytest.mark.parametrize(("gone", "there"), [("train", "test"), ("test", "train")])
def test_a_missing_split(config, flowers, folder, gone, there):
    (folder / gone).rename(folder / "unseen")
    assert_bad(config(), f"no {gone} folder", f"found: {there}, unseen", *EXPECTED)


def test_a_file_for_a_split(config, flowers, folder):
    (folder / "test").rename(folder / "unseen")
    (folder / "test").write_text("")
    assert_bad(config(), "no test folder")


def test_two_folders_for_one_split(config, flowers, save):
    save("Train/rose/a.png", pictures(1)[0])
    assert_bad(config(), "Train and train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_without_class_folders(config, flowers, folder, split):
    (folder / split).rename(folder / "unseen")
    (folder / split).mkdir()
    assert_bad(config(), f"{split} holds no class folders", f"{split}/CLASS/*.png")
    (folder / "unseen" / "rose" / ("a.png" if split == "train" else "d.png")).rename(folder / split / "a.png")
    assert_bad(config(), f"{split} holds images but no class folders", f"{split}/CLASS/*.png")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_a_class_folder_without_images(config, flowers, folder, split, content):
    for file in (folder / split / "tulip").iterdir():
        file.unlink()
    if content is not None:
        (folder / split / "tulip" / content).write_text("")
    assert_bad(config(), f"{split}/tulip holds no image")


def test_a_test_class_that_train_lacks(config, flowers, save):
    save("test/lily/a.png", pictures(1)[0])
    assert_bad(config(), "test has the class lily", "train lacks")


def test_a_single_class(config, save):
    save("train/rose/a.png", pictures(1)[0])
    save("test/rose/a.png", pictures(1)[0])
    assert_bad(config(), "single class, rose")


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "head only"])
@pytest.mark.parametrize("name", ["train/rose/a.png", "train/tulip/c.png", "test/tulip/e.png"])
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_a_broken_image(config, flowers, save, name, kind, colour):
    if colour:  # then the heads of few files are read before their pixels are
        save("train/rose/a.png", pictures(1, colour=True)[0])
    file = save(name, pictures(1, height=32, width=32, colour=colour)[0])
    whole = file.read_bytes()
    content = {"text": b"no pixels\n", "empty": b"", "cut": whole[: len(whole) // 2], "head only": whole[:40]}
    file.write_bytes(content[kind])
    says = "it is no image of a known format" if kind in ("text", "empty") else ""
    assert_bad(config(image_size=6), f"{name}: {says}", "check or fetch the file again")


def test_an_image_of_floating_point_numbers(config, flowers, save):
    save("train/rose/b.tiff", np.ones((6, 5), dtype=np.float32))
    assert_bad(config(), "train/rose/b.tiff", "floating-point")


def test_grey_levels_beyond_sixteen_bits(config, flowers, save):
    save("train/rose/b.tiff", np.full((6, 5), 70_000, dtype=np.int32))
    assert_bad(config(), "train/rose/b.tiff", "0 to 65535")


def test_a_link_that_leads_nowhere(config, flowers, folder):
    (folder / "train/rose/gone.png").symlink_to(folder / "gone.png")
    assert_bad(config(), "train/rose/gone.png", "No such file")


def test_a_file_that_goes_after_it_was_listed(config, flowers, folder, monkeypatch):
    before = ImageFolder.splits

    def lose(source: ImageFolder) -> object:
        streams = before(source)
        (folder / "test/tulip/e.png").unlink()
        return streams

    monkeypatch.setattr(ImageFolder, "splits", lose)
    assert_bad(config(), "test/tulip/e.png: No such file")


@pytest.mark.parametrize("name", ["train/rose/a.png", "train/rose", "train", ""])
def test_what_may_not_be_read(config, flowers, folder, name):
    (folder / name).chmod(0)
    try:
        if os.access(folder / name, os.R_OK):
            pytest.skip("this user may read everything")
        assert_bad(config(), name, "Permission denied")
    finally:
        (folder / name).chmod(0o700)


def test_a_folder_that_cannot_be_listed(config, flowers, folder, monkeypatch):
    listed = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("train/tulip"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_bad(config(), "train/tulip cannot be read: Permission denied")


@pytest.mark.parametrize("key", ["subset", "revision", "image_column", "label_column"])
def test_contradictions(config, flowers, cache, key):
    with pytest.raises(ConfigError) as caught:
        prepare(config(**{key: "plain"}))
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 64
    assert_one_line(caught.value, f"data.{key}=plain", "data.path=")
    assert not cache.exists()
