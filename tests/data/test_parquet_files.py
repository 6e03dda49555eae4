"""Which Parquet files count: one data set, each part once, nobody's leftovers; and the names of its classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.parquet_files import parquet_files, split_files
from fedfreeze.data.sources import make_source
from fedfreeze.data.store import open_store, prepare
from fedfreeze.errors import DataError, ExitCode
from tests.support.checks import assert_one_line, pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "flowers"


@pytest.fixture
def put(folder, write_parquet) -> Callable[..., Path]:
    """Write a good file under a name; each name has images of its own."""

    def write(name: str, count: int = 4, **options: object) -> Path:
        images = pictures(count, seed=sum(name.encode()))
        return write_parquet(folder / name, images, [index % 2 for index in range(count)], **options)

    return write


@pytest.fixture
def config(folder, cache) -> DataConfig:
    return DataConfig(path=str(folder), cache_dir=str(cache))


def assert_bad(config: DataConfig, *parts: object) -> None:
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert_one_line(caught.value, f"data {config.path}", *parts)
    assert len(str(caught.value)) < 700
    assert list(Path(config.cache_dir or "").iterdir()) == []


# --- several data sets


def test_two_data_sets_in_a_folder_are_refused_and_one_can_be_named(config, folder, put, cache):
    for name, count in (("full", 40), ("small", 10)):
        put(f"{name}/train-00000-of-00001.parquet", count)
        put(f"{name}/test-00000-of-00001.parquet", 4)
    assert_bad(config, "several data sets", "full/t", "small/t", f"--data.path={folder / 'full'}")
    named = DataConfig(path=str(folder / "full"), cache_dir=str(cache))
    assert len(open_store(prepare(named)).train) == 40


@pytest.mark.parametrize(
    "names",
    [
        ("full/train-0.parquet", "small/test-0.parquet"),
        ("train.parquet", "test.parquet", "backup/train.parquet"),
        ("snapshots/abc/train.parquet", "snapshots/abc/test.parquet", "snapshots/def/train.parquet"),
        ("a/train/train-0.parquet", "a/test/test-0.parquet", "b/train/train-0.parquet"),
        ("en/data/train-0.parquet", "fr/data/train-0.parquet", "fr/data/test-0.parquet"),
    ],
)
def test_data_sets_that_mix_are_refused(config, put, names):
    for name in names:
        put(name)
    itself = any("/" not in name for name in names)
    assert_bad(config, "several data sets", names[0], "take the others out" if itself else "--data.path=")


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.parquet", "train-1.parquet", "test-0.parquet"),
        ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"),
        ("train/train-0.parquet", "train/train-1.parquet", "test/test-0.parquet"),
        ("data/Train/train_a.parquet", "data/Train/train_b.parquet", "data/validation/val.parquet"),
        (
            "train-00000-of-00002-0123456789abcdef.parquet",
            "train-00001-of-00002-fedcba9876543210.parquet",
            "test.parquet",
        ),
        ("train-1.parquet", "train-10.parquet", "test.parquet"),
        (
            "train-0-3b241101-e2bb-4255-8caf-4136c566a962.parquet",
            "train-1-3b241101-e2bb-4255-8caf-4136c566a963.parquet",
            "test.parquet",
        ),
    ],
)
def test_the_parts_of_one_data_set_are_read_together(config, put, names):
    for name in names:
        put(name)
    data = open_store(prepare(config))
    assert (len(data.train), len(data.test)) == (8, 4)


def test_another_validation_split_does_not_make_it_several(config, put):
    for name in ("data/train.parquet", "data/test.parquet", "extra/validation.parquet"):
        put(name)
    assert len(open_store(prepare(config)).test) == 4


# --- parts that are not of one series, or there twice


@pytest.mark.parametrize(
    "names",
    [
        ("train-full.parquet", "train-small.parquet"),
        ("train_full-00000-of-00001.parquet", "train_small-00000-of-00001.parquet"),
        ("train.parquet", "train-00000-of-00001.parquet"),
        ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-0.parquet", "train-0 copy.parquet"),
        ("train.parquet", "train (1).parquet"),
        ("train.parquet", "train-backup.parquet"),
    ],
)
def test_files_that_are_not_of_one_series_are_refused(config, put, names):
    for name in (*names, "test.parquet"):
        put(name)
    assert_bad(config, "not parts of one data set", *names[:2], "train-0.parquet, train-1.parquet")


def test_a_part_twice_is_refused(config, put, folder):
    put("test.parquet")
    put("train-00000-of-00002-0123456789abcdef.parquet")
    twin = put("train-00000-of-00002-fedcba9876543210.parquet")  # uploaded again
    assert_bad(config, "the same part twice", "train-00000-of-00002-0", "train-00000-of-00002-f")
    twin.unlink()
    first = put("train-00000-of-00002-0123456789abcdef.parquet")
    shutil.copy(first, folder / "train-00001-of-00002-0123456789abcdef.parquet")
    assert_bad(config, "the same part twice", first.name)


def test_parts_without_rows_may_look_alike(config, put):
    put("test.parquet")
    put("train-0.parquet")
    put("train-1.parquet", 0)
    put("train-2.parquet", 0)
    assert len(open_store(prepare(config)).train) == 4


def test_a_file_with_other_columns_is_named(config, put):
    put("test.parquet")
    put("train-0.parquet")
    put("train-1.parquet", image_column="thumbnail")
    assert_bad(config, "train-0.parquet has the columns img, label", "train-1.parquet has thumbnail, label", "take out")


# --- what is nobody's data


def test_hidden_files_and_leftovers_are_not_read(config, folder, put):
    put("train.parquet")
    put("test.parquet")
    kept = parquet_files(folder)
    for name in (
        ".cache/train.parquet",
        ".ipynb_checkpoints/train-checkpoint.parquet",
        "_temporary/0/train-0.parquet",
        "._train.parquet",
        ".train.parquet",
    ):
        put(name)
    (folder / "train.parquet.crc").write_text("")
    (folder / "train-7.parquet").mkdir()
    assert parquet_files(folder) == kept
    assert len(open_store(prepare(config)).train) == 4


def test_a_hidden_folder_may_hold_the_data_set(tmp_path, cache, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / ".data" / f"{split}.parquet", pictures(2), [0, 1])
    assert len(open_store(prepare(DataConfig(path=str(tmp_path / ".data"), cache_dir=str(cache)))).train) == 2


def test_files_of_other_names_are_not_read(config, folder, put):
    for name in ("train.parquet", "test.parquet", "metadata.parquet", "training.parquet", "holdout/rest.parquet"):
        put(name)
    assert {split: [file.name for file in files] for split, files in split_files(folder).items()} == {
        "train": ["train.parquet"],
        "test": ["test.parquet"],
    }


def test_a_table_beside_image_folders_does_not_hide_them(config, folder, put, png):
    for split in ("train", "test"):
        for number, name in enumerate(("rose", "tulip")):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "a.png").write_bytes(png(pictures(1, seed=number)[0]))
    put("metadata.parquet")
    assert open_store(prepare(config)).class_names == ("rose", "tulip")


# --- the names of classes


def features(*names: str) -> dict[str, str]:
    columns = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def test_names_of_classes_come_from_the_metadata_of_the_hub(config, put):
    put("train.parquet", metadata=features("rose", "tulip", "never"))
    put("test.parquet", metadata=features("rose", "tulip"))
    data = open_store(prepare(config))
    assert data.class_names == ("rose", "tulip")
    assert data.num_classes == 2


@pytest.mark.parametrize("metadata", [None, {"pandas": "{}"}, features("alone")])
def test_without_a_name_for_each_class_there_are_none(config, put, metadata):
    put("train.parquet", metadata=metadata)
    put("test.parquet")
    assert open_store(prepare(config)).class_names is None


def test_splits_that_number_their_classes_differently_are_refused(config, put):
    put("train.parquet", metadata=features("rose", "tulip"))
    put("test.parquet", metadata=features("tulip", "rose"))
    assert_bad(config, "label 0 is 'rose' in train.parquet and 'tulip' in test.parquet", "alike")


def test_names_of_the_hub(cache, monkeypatch, png):
    import datasets

    class Rows(list):  # type: ignore[type-arg]
        @property
        def features(self) -> dict[str, object]:
            return {"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "tulip"])}

    rows = Rows({"image": {"bytes": png(image)}, "label": index % 2} for index, image in enumerate(pictures(4)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows, "test": rows})
    config = DataConfig(name="some/flowers", cache_dir=str(cache))
    data = open_store(prepare(config))
    assert data.class_names == ("rose", "tulip")
    np.testing.assert_array_equal(data.train.images[:, 0], pictures(4))
    assert make_source(config).class_names() is None  # before the splits are read
