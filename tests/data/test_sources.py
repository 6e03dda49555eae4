"""Local Parquet and the hub: what is found, and what is refused."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.sources import Digits, HuggingFace, fingerprint_key, make_source
from fedfreeze.data.store import open_store, prepare
from fedfreeze.errors import ConfigError, DataError, ExitCode, UnavailableError
from tests.support.checks import assert_one_line, pictures

# --- local Parquet


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "flowers"


@pytest.fixture
def local(folder, cache) -> DataConfig:
    return DataConfig(path=str(folder), cache_dir=str(cache))


@pytest.fixture
def write_split(folder, write_parquet) -> Callable[..., Path]:
    """Write a good split of the data set, or what the arguments make of it."""

    def write(split: str, images: list | None = None, labels: list | None = None, **options: object) -> Path:
        images = pictures(4) if images is None else images
        labels = [index % 2 for index in range(len(images))] if labels is None else labels
        return write_parquet(folder / f"{split}-00000-of-00001.parquet", images, labels, **options)

    return write


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_parquet_images_come_out_as_they_went_in(local, write_split, colour):
    train, test = pictures(5, colour=colour), pictures(3, colour=colour, seed=1)
    write_split("train", train, [2, 0, 1, 1, 0])
    write_split("test", test, [0, 2, 1])
    data = open_store(prepare(local))
    assert data.image_shape == (3 if colour else 1, 6, 5)
    assert data.num_classes == 3
    for split, images in ((data.train, train), (data.test, test)):
        wanted = np.stack(images)
        wanted = wanted.transpose(0, 3, 1, 2) if colour else wanted[:, None]
        np.testing.assert_array_equal(split.images, wanted)
    assert data.train.labels.tolist() == [2, 0, 1, 1, 0]
    assert data.test.labels.tolist() == [0, 2, 1]
    pixels = np.stack(train).reshape(-1, 3 if colour else 1) / 255
    assert data.mean == pytest.approx(pixels.mean(0), rel=1e-12)
    assert data.std == pytest.approx(pixels.std(0), rel=1e-12)


def test_files_of_a_split_are_read_in_the_order_of_their_names(local, folder, write_split, write_parquet):
    write_split("test")
    images = pictures(6)
    write_parquet(folder / "train-00001-of-00002.parquet", images[3:], [1, 0, 1])
    write_parquet(folder / "train-00000-of-00002.parquet", images[:3], [0, 0, 1])
    data = open_store(prepare(local))
    assert data.train.labels.tolist() == [0, 0, 1, 1, 0, 1]
    np.testing.assert_array_equal(data.train.images[:, 0], images)


@pytest.mark.parametrize(
    ("image_column", "label_column"), [("image", "label"), ("images", "labels"), ("img", "fine_label")]
)
def test_other_names_of_columns_are_found(local, write_split, image_column, label_column):
    for split in ("train", "test"):
        write_split(split, image_column=image_column, label_column=label_column)
    np.testing.assert_array_equal(open_store(prepare(local)).train.images[:, 0], pictures(4))


def test_columns_can_be_named(local, folder, write_split):
    for split in ("train", "test"):
        write_split(split, image_column="picture", label_column="class")
    named = replace(local, image_column="picture", label_column="class")
    data = open_store(prepare(named))
    np.testing.assert_array_equal(data.train.images[:, 0], pictures(4))
    assert data.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("key", "what"), [("image_column", "image"), ("label_column", "label")])
def test_a_named_column_that_is_not_there(local, folder, write_split, key, what):
    for split in ("train", "test"):
        write_split(split)  # the usual columns are there, but others were asked for
    assert_bad(replace(local, **{key: "scan"}), folder, f"no {what} column 'scan'", "found: img, label", f"data.{key}")


def test_a_named_column_wins_over_the_usual_ones(cache, monkeypatch, png):
    encoded = [png(image) for image in pictures(4)]
    row = [{"img": b"", "scan": data, "label": 0, "coarse": index % 2} for index, data in enumerate(encoded)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": row, "test": row[:2]})
    config = DataConfig(name="some/flowers", image_column="scan", label_column="coarse", cache_dir=str(cache))
    data = open_store(prepare(config))
    np.testing.assert_array_equal(data.train.images[:, 0], pictures(4))
    assert data.train.labels.tolist() == [0, 1, 0, 1]


def test_image_size_makes_one_size_of_many(local, write_split):
    images = [*pictures(2), *pictures(1, width=7), *pictures(1, height=40, width=90)]
    write_split("train", images)
    write_split("test", pictures(2, height=9))
    data = open_store(prepare(replace(local, image_size=4)))
    assert data.image_shape == (1, 4, 4)
    wanted = [ImageOps.fit(Image.fromarray(image), (4, 4), Image.Resampling.BILINEAR) for image in images]
    np.testing.assert_array_equal(data.train.images[:, 0], np.stack(wanted))


def test_a_grey_image_at_the_head_of_the_test_split_becomes_colour(local, write_split):
    write_split("train", pictures(2, colour=True))
    write_split("test", [*pictures(1), *pictures(1, colour=True)], [0, 1])
    data = open_store(prepare(local))
    np.testing.assert_array_equal(data.test.images[0], [pictures(1)[0]] * 3)
    np.testing.assert_array_equal(data.test.images[1], pictures(1, colour=True)[0].transpose(2, 0, 1))


def test_hub_metadata_in_the_files_is_understood(local, write_split):
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["rose", "tulip"]}}
    for split in ("train", "test"):
        write_split(
            split, pictures(4, colour=True), metadata={"huggingface": json.dumps({"info": {"features": features}})}
        )
    data = open_store(prepare(local))
    np.testing.assert_array_equal(data.test.images, np.stack(pictures(4, colour=True)).transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == [0, 1, 0, 1]


def test_a_grey_image_among_colour_ones_becomes_colour(local, write_split):
    images = [*pictures(2, colour=True), *pictures(1)]
    write_split("train", images, [0, 1, 0])
    write_split("test", pictures(2, colour=True))
    data = open_store(prepare(local))
    for channel in range(3):
        np.testing.assert_array_equal(data.train.images[2, channel], images[2])


def test_sixteen_bit_images_keep_their_contrast(local, write_split):
    deep = [np.linspace(0, 65535, 30).astype(np.uint16).reshape(6, 5) for _ in range(4)]
    write_split("train", deep)
    write_split("test", deep)
    # 65535 is white; what lies between must not all become white too
    np.testing.assert_allclose(open_store(prepare(local)).train.images[0, 0], deep[0] / 257, atol=1)


def test_a_validation_split_serves_where_there_is_no_test_split(local, write_split):
    write_split("train")
    write_split("validation", pictures(3, seed=5), [1, 0, 1])
    np.testing.assert_array_equal(open_store(prepare(local)).test.images[:, 0], pictures(3, seed=5))


def test_validation_files_are_not_mixed_into_the_test_split(local, write_split):
    # of the hub's splits, too, the first name alone counts
    write_split("train")
    write_split("test", pictures(2, seed=1))
    write_split("validation", pictures(3, seed=2))
    np.testing.assert_array_equal(open_store(prepare(local)).test.images[:, 0], pictures(2, seed=1))


@pytest.mark.parametrize("name", ["with space", "näh", "set[1]", "a*b", "100%"])
def test_folders_of_any_name(tmp_path, cache, write_parquet, name):
    for split in ("train", "test"):
        write_parquet(tmp_path / name / f"{split}.parquet", pictures(2), [0, 1])
    data = open_store(prepare(DataConfig(path=str(tmp_path / name), cache_dir=str(cache))))
    np.testing.assert_array_equal(data.train.images[:, 0], pictures(2))


def test_a_relative_path(tmp_path, cache, folder, write_split, monkeypatch):
    write_split("train")
    write_split("test")
    monkeypatch.chdir(tmp_path)
    data = open_store(prepare(DataConfig(path=folder.name, cache_dir=str(cache))))
    assert len(data.train) == 4


def test_the_store_follows_the_files(local, cache, write_split):
    write_split("train")
    test_file = write_split("test")
    first = prepare(local)
    assert prepare(local) == first
    write_split("train", pictures(6, seed=3))
    second = prepare(local)
    assert second != first
    np.testing.assert_array_equal(open_store(second).train.images[:, 0], pictures(6, seed=3))
    os.utime(test_file, ns=(1, 1))  # changed within its size
    assert prepare(local) not in (first, second)


def test_fingerprints(local, folder, write_split, tmp_path):
    write_split("train")
    key = fingerprint_key(make_source(local))
    assert key == fingerprint_key(make_source(local))
    write_split("test")
    assert fingerprint_key(make_source(local)) != key
    (folder / "README.md").write_text("not data")
    key = fingerprint_key(make_source(local))
    (folder / "README.md").write_text("not data either")
    assert fingerprint_key(make_source(local)) == key
    names = [fingerprint_key(HuggingFace(DataConfig(name=name))) for name in ("cifar10", "cifar100")]
    assert len({*names, key, fingerprint_key(Digits())}) == 4


@pytest.mark.parametrize("where", ["local", "hub", "digits"])
def test_what_changes_the_decoded_images_is_in_the_fingerprint(local, write_split, where):
    write_split("train")
    config = {"local": local, "hub": DataConfig(name="cifar100"), "digits": DataConfig()}[where]
    changes = [{}, {"image_size": 8}, {"image_size": 9}]
    changes += [{"image_column": "a"}, {"image_column": "b"}, {"label_column": "a"}] if where != "digits" else []
    changes += [{"subset": "a"}, {"subset": "b"}, {"revision": "a"}] if where == "hub" else []
    keys = [fingerprint_key(make_source(replace(config, **change))) for change in changes]
    assert len(set(keys)) == len(keys)
    assert fingerprint_key(make_source(replace(config, alpha=9.0))) == keys[0]


def test_path_wins_over_name(local):
    assert isinstance(make_source(DataConfig()), Digits)
    with pytest.raises(DataError, match="is not a folder"):
        make_source(DataConfig(name="digits", path=local.path))


# --- bad data sets: a DataError of one line that names the place


def assert_bad(config: DataConfig, *parts: object) -> None:
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert_one_line(caught.value, *parts)
    cache = Path(config.cache_dir or "")
    assert not cache.exists() or list(cache.iterdir()) == []


def test_missing_folder(local, folder):
    assert_bad(local, folder, "is not a folder")


def test_a_file_for_a_folder(local, folder):
    folder.write_text("")
    assert_bad(local, folder, "is not a folder")


def test_empty_folder(local, folder):
    folder.mkdir()
    (folder / "train.csv").write_text("")
    assert_bad(local, folder, "holds no .parquet file")


@pytest.mark.parametrize(("there", "missing"), [("train", "test"), ("test", "train")])
def test_missing_split(local, folder, write_split, there, missing):
    write_split(there)
    assert_bad(local, folder, f"no {missing} split", f"found: {there}", f"{missing}-*.parquet")


def test_files_of_no_split(local, folder, write_split):
    write_split("part")
    assert_bad(local, folder, "no train split", "found: none")


def test_no_image_column(local, folder, write_split):
    for split in ("train", "test"):
        write_split(split, image_column="picture")
    assert_bad(local, folder, "split train", "no image column", "img, image", "found: picture, label")


def test_no_label_column(local, folder, write_split):
    for split in ("train", "test"):
        write_split(split, label_column="class")
    assert_bad(local, folder, "split train", "no label column", "label, labels", "found: img, class")


def test_columns_that_differ_between_splits(local, folder, write_split):
    write_split("train")
    write_split("test", label_column="class")
    assert_bad(local, folder, "split test")


@pytest.mark.parametrize("length", [0, 3, 0.5, 0.99])
def test_truncated_parquet(local, folder, write_split, length):
    write_split("test")
    file = write_split("train", pictures(40))
    os.truncate(file, length if length in (0, 3) else int(file.stat().st_size * length))
    assert_bad(local, folder)


def test_flipped_bytes_in_parquet(local, folder, write_split):
    write_split("test")
    file = write_split("train", pictures(40))
    content = bytearray(file.read_bytes())
    content[-60:-40] = bytes(20)  # in the footer
    file.write_bytes(content)
    assert_bad(local, folder)


@pytest.mark.parametrize("kind", ["not an image", "empty", "cut", "none"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_image(local, folder, write_split, png, kind, split):
    whole = png(pictures(1, height=32, width=32)[0])
    broken = {"not an image": b"these are no pixels", "empty": b"", "cut": whole[: len(whole) // 2], "none": None}[kind]
    for name in ("train", "test"):
        write_split(name, pictures(2) + ([broken] if name == split else []) + pictures(1))
    assert_bad(local, folder, f"split {split}, row 3")


def test_broken_image_that_the_reader_decodes(local, folder, write_split):
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["rose", "tulip"]}}
    for split in ("train", "test"):
        write_split(
            split,
            [*pictures(2), b"these are no pixels", *pictures(1)],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
    assert_bad(local, folder, "split train, row 3", "check or fetch the files again")


def test_mixed_sizes(local, write_split):
    write_split("train", [*pictures(2), *pictures(1, width=7)])
    write_split("test")
    assert_bad(local, "split train, row 3", "(1, 6, 7)", "(1, 6, 5)", "data.image_size")


def test_sizes_that_differ_between_splits(local, write_split):
    write_split("train")
    write_split("test", pictures(2, height=8))
    assert_bad(local, "split test, row 1", "(1, 8, 5)", "(1, 6, 5)")


def test_negative_label(local, write_split):
    write_split("train", labels=[0, 1, 0, -1])
    write_split("test")
    assert_bad(local, "split train, row 4", "label -1")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["rose", "tulip"], "not a whole number"),
        ([0.0, 1.0], "not a whole number"),
        ([False, True], "not a whole number"),
        ([[0], [1]], "not a whole number"),
        ([None, 1], "missing"),
    ],
    ids=["text", "float", "bool", "list", "missing"],
)
def test_label_that_is_no_whole_number(local, folder, write_split, labels, says):
    write_split("train", pictures(2), labels)
    write_split("test")
    assert_bad(local, folder, "split train, row 1", f"label {labels[0]!r}", says)


@pytest.mark.parametrize(("labels", "missing"), [([1, 2, 1, 2], 0), ([0, 2, 0, 2], 1), ([0, 1, 1, 9], 2)])
def test_a_class_without_training_samples(local, write_split, labels, missing):
    write_split("train", labels=labels)
    write_split("test", pictures(1), [missing])
    assert_bad(
        local, "split train", f"no sample of class {missing}", f"renumber the labels 0 to {len(set(labels)) - 1}"
    )


def test_test_label_unknown_to_train(local, write_split):
    write_split("train")
    write_split("test", pictures(3), [0, 7, 1])
    assert_bad(local, "split test", "label 7", "0 to 1")


def test_single_class(local, write_split):
    write_split("train", labels=[0, 0, 0, 0])
    write_split("test", labels=[0, 0, 0, 0])
    assert_bad(local, "split train", "single class")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_rows(local, write_split, split):
    for name in ("train", "test"):
        write_split(name, [] if name == split else None)
    assert_bad(local, f"split {split}")


def test_a_link_that_leads_nowhere(local, folder, write_split):
    # caches of the hub are full of links; moved without what they point to, nothing can be read
    write_split("train")
    write_split("test")
    (folder / "train-00001-of-00002.parquet").symlink_to(folder / "gone.parquet")
    assert_bad(local, folder)


# --- the hub, without a network


def test_a_hub_that_cannot_be_reached_names_the_way_out(cache, monkeypatch):
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert_bad(DataConfig(name="someone/flowers", cache_dir=str(cache)), "someone/flowers", "--data.path=FOLDER")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {},
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']",
            "give one of them as data.subset",
        ),
        ({"subset": "c"}, "BuilderConfig 'c' not found. Available: ['a', 'b']", "give one of them as data.subset"),
        (
            {"revision": "v9"},
            "Revision 'v9' doesn't exist for dataset 'some/flowers' on the Hub.",
            "check data.revision",
        ),
    ],
)
def test_hub_errors_name_the_key_that_helps(cache, monkeypatch, options, message, hint):
    def fail(*_: object, **__: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr("datasets.load_dataset", fail)
    config = DataConfig(name="some/flowers", cache_dir=str(cache), **options)
    assert_bad(
        config, "some/flowers", message.split("\n")[0], f"; {'check' if options.get('revision') else 'give'}", hint
    )


def test_subset_and_revision_reach_the_hub(cache, monkeypatch):
    import datasets

    asked = []

    def load(path: str, **options: object) -> dict[str, object]:
        asked.append((path, options))
        return {}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert_bad(DataConfig(name="some/flowers", subset="small", revision="v2", cache_dir=str(cache)), "no train split")
    assert asked == [("some/flowers", {"name": "small", "revision": "v2", "streaming": True})]


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_a_folder_has_no_subset_or_revision(local, cache, write_split, key):
    write_split("train")
    write_split("test")
    with pytest.raises(ConfigError) as caught:
        prepare(replace(local, **{key: "small"}))
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 64
    assert_one_line(caught.value, f"data.{key}=small", "data.path=")
    assert not cache.exists()


def test_hub_splits_are_found_by_their_names(cache, monkeypatch, png):
    import datasets

    def rows(count: int, seed: int) -> list[dict[str, object]]:
        images = pictures(count, seed=seed)
        return [{"image": {"bytes": png(image)}, "label": index % 2} for index, image in enumerate(images)]

    asked = []

    def load(name: str, **options: object) -> dict[str, list[dict[str, object]]]:
        asked.append((name, options))
        return {"validation": rows(2, 1), "train": rows(4, 2), "test": rows(3, 3)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_store(prepare(DataConfig(name="someone/flowers", cache_dir=str(cache))))
    assert asked == [("someone/flowers", {"streaming": True})]
    np.testing.assert_array_equal(data.train.images[:, 0], pictures(4, seed=2))
    np.testing.assert_array_equal(data.test.images[:, 0], pictures(3, seed=3))


def test_without_the_package_the_error_says_what_to_install(local, write_split, monkeypatch):
    write_split("train")
    write_split("test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError, match="pip install datasets") as caught:
        prepare(local)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE == 69
