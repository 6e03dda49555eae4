"""Room for features: within both budgets, on a disk when memory is full, and none on a disk that is full."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.device import feature_store
from fedfreeze.device.feature_store import FeatureStore, check_folder
from fedfreeze.errors import StorageError


@given(st.integers(0, 4000), st.integers(0, 20_000), st.lists(st.integers(0, 900), max_size=30))
@settings(max_examples=60, deadline=None)
def test_budgets_are_held_and_no_two_arrays_share_room(memory: int, disk: int, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_store, "EXTENT_BYTES", 4096)
        store = FeatureStore(memory, Path("/tmp"), disk)
        arrays = [store.room((size, 1)) for size in sizes]
        for number, array in enumerate(arrays):
            if array is not None:
                array[...] = number
        for number, array in enumerate(arrays):
            if array is not None:
                assert (array == number).all()
        assert store.used_bytes <= memory
        assert store.used_disk_bytes <= disk
        assert bool(store.refused) == any(array is None for array in arrays)


def test_memory_first_then_the_disk_then_nothing(tmp_path: Path) -> None:
    store = FeatureStore(1000, tmp_path, 3000)
    assert [store.room((250,)) is not None for _ in range(5)] == [True, True, True, False, False]
    assert (store.used_bytes, store.used_disk_bytes) == (1000, 3000)
    assert FeatureStore(10).room((250,)) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_larger_than_an_extent_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "EXTENT_BYTES", 4096)
    store = FeatureStore(0, tmp_path, 100_000)
    small, large, after = store.room((10,)), store.room((5000,)), store.room((10,))
    assert small is not None
    assert large is not None
    assert after is not None
    large[:] = 1
    assert not small.any()
    assert not after.any()


def test_large_arrays_lose_nothing_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of an extent each: in extents that they shared, a third of the budget would be lost."""
    monkeypatch.setattr(feature_store, "EXTENT_BYTES", 4096)
    store = FeatureStore(0, tmp_path, 9 * 2800)
    assert all(store.room((700,)) is not None for _ in range(9))
    assert store.refused is None


def test_a_disk_is_left_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(feature_store, "RESERVED_BYTES", free)
    store = FeatureStore(0, tmp_path, 10**6)
    assert store.room((10,)) is None
    assert "MiB left, of which 1 GiB is not taken" in str(store.refused)


def test_a_full_disk_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def full(*arguments: int) -> None:
        asked.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = FeatureStore(0, tmp_path, 10**6)
    assert store.room((10,)) is None
    assert store.room((10,)) is None
    assert len(asked) == 1
    assert store.refused == f"{tmp_path}: No space left on device"


def test_a_folder_in_which_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    check_folder(tmp_path)
    with pytest.raises(StorageError, match=r"cannot write in \(cache.dir\) .*missing on .*: No such file"):
        check_folder(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        check_folder(tmp_path / "file")


def test_arrays_outlive_the_store(tmp_path: Path) -> None:
    array = FeatureStore(0, tmp_path, 10_000).room((100,))
    assert array is not None
    array[:] = 7
    assert np.array_equal(array, np.full(100, 7, dtype=np.float32))
