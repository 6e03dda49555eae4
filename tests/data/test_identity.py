"""What a store is: the same digest for the same content, another for any other, and no reading of large ones again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.config.schema import DataConfig
from fedfreeze.data import identity
from fedfreeze.data.identity import Identity, content_digest, identify, is_same
from fedfreeze.data.store import prepare
from fedfreeze.errors import DataError, ExitCode
from tests.support.checkpoints import flip_byte
from tests.support.checks import assert_one_line


@pytest.fixture(scope="module")
def decoded(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    shape = {"synthetic_shape": [1, 3, 4], "synthetic_samples": 20, "synthetic_classes": 2}
    return prepare(DataConfig(name="synthetic", cache_dir=str(cache), **shape))


@pytest.fixture
def store(decoded, tmp_path) -> Path:
    return shutil.copytree(decoded, tmp_path / decoded.name)


def other_labels(store: Path) -> None:
    labels = np.load(store / "test.labels.npy")
    np.save(store / "test.labels.npy", labels[::-1].copy())


def other_shape(store: Path) -> None:
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta | {"image_shape": [1, 4, 3]}))


def test_the_digest_is_of_the_content_alone(store, decoded):
    first = identify(decoded)
    assert first.intact
    for file in store.iterdir():
        os.utime(file, ns=(1, 1))
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta, indent=4))
    assert identify(store) == identify(store.rename(store.with_name("elsewhere"))) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda store: flip_byte(store / "train.images.u8", 0),
        lambda store: flip_byte(store / "train.images.u8"),
        lambda store: flip_byte(store / "test.images.u8", 5),
        other_labels,
        other_shape,
    ],
    ids=["first pixel", "last pixel", "test pixel", "labels", "shape"],
)
def test_any_other_content_has_another_digest(store, decoded, change):
    change(store)
    found = identify(store)
    assert found.digest != identify(decoded).digest
    assert not found.intact


def test_a_large_store_is_read_only_where_its_files_have_changed(store, decoded, monkeypatch):
    monkeypatch.setattr(identity, "_READ_ANYWAY_BYTES", 0)
    whole = identify(decoded)
    copied = identify(store)  # other times of change, where they are not kept
    assert copied == whole
    monkeypatch.setattr(identity, "content_digest", lambda folder: pytest.fail("it was read"))
    assert identify(decoded) == whole
    monkeypatch.undo()
    monkeypatch.setattr(identity, "_READ_ANYWAY_BYTES", 0)
    flip_byte(store / "train.images.u8")
    assert identify(store).digest != whole.digest


@pytest.mark.parametrize("name", ["meta.json", "train.images.u8", "test.labels.npy"])
def test_a_store_that_lacks_a_file_is_damaged(store, name):
    (store / name).unlink()
    with pytest.raises(DataError) as caught:
        identify(store)
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert_one_line(caught.value, store, "delete that folder")


def test_what_a_checkpoint_recorded_is_held_against_the_content(store):
    ours = identify(store)
    assert is_same(ours.digest, store, ours)
    assert not is_same("0" * 64, store, ours)
    for foreign in (None, 3, "v1-0123456789abcdef", "v2-../../elsewhere"):
        assert not is_same(foreign, store, ours)


def test_the_name_of_a_store_of_the_version_before(store):
    ours = identify(store)
    same = f"v2-{store.name.partition('-')[2]}"
    assert is_same(same, store, ours)  # of the same files, and nothing tells otherwise
    assert not is_same(same, store, Identity(ours.digest, intact=False))
    assert not is_same("v2-0123456789abcdef", store, ours)
    for name in (same, "v2-0123456789abcdef"):  # the store itself is there: its content decides
        old = shutil.copytree(store, store.parent / name)
        assert is_same(name, store, ours)
        flip_byte(old / "test.images.u8")
        assert not is_same(name, store, ours)
    assert content_digest(store) == ours.digest == Identity(ours.digest, intact=True).digest
