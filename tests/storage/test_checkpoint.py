"""Checkpoints: whole or not at all, torn ones are noticed, nothing is unpickled, only what is needed is kept."""

import builtins
import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfreeze.errors import DataError, ExitCode, StorageError
from fedfreeze.storage import checkpoint
from fedfreeze.storage.checkpoint import weight_bytes
from tests.support.checkpoints import (
    assert_is,
    cut_weights,
    flip_byte,
    no_state,
    open_folder,
    rewrite_content,
    rounds_in,
    save,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test may see it as an error to clean up after."""


def test_round_trip(folder):
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 3)
    assert notices == []


def test_nothing_there_is_no_checkpoint(tmp_path):
    store, notices = open_folder(tmp_path / "checkpoints")
    assert store.load_newest() is None
    assert notices == []
    assert list(tmp_path.iterdir()) == []  # looking creates nothing


def test_what_a_removal_that_was_broken_off_has_left_goes_when_the_run_goes_on(folder):
    """Ended between its two files, at the last checkpoint of a run: nothing is saved after that."""
    left = folder / "round-000000"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half of it is gone")
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 3)
    assert notices == []
    assert not left.exists()


def test_without_updates(tmp_path):
    store, _ = open_folder(tmp_path)
    store.save(1, {"w": torch.ones(2)}, {}, [])
    found = open_folder(tmp_path)[0].load_newest()
    assert found is not None
    assert found.updates == []
    assert found.state == {}


def test_files_are_safetensors_and_json_only(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "weights.safetensors",
        "state.json",
        *(f"round-{n:06d}.safetensors" for n in (1, 2, 3)),
    }
    for path in files:
        content = path.read_bytes()
        header = content if path.suffix == ".json" else content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert isinstance(json.loads(header), dict)


def test_weight_bytes_say_nothing_of_the_run():
    first, again = (weight_bytes({"w": torch.arange(6.0).reshape(2, 3)}) for _ in range(2))
    assert first == again
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert header == {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


# --- written whole or not at all


class FailingDisk:
    """Fails at the n-th step that touches the disk; a file that fails is left half-written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, fail_at: int):
        self.error, self.fail_at, self.steps = error, fail_at, 0
        write_bytes = Path.write_bytes

        def half_write(path: Path, content: bytes) -> int:
            if self.fails():
                write_bytes(path, content[: len(content) // 2])
                raise self.error
            return write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", half_write)
        for owner, name in ((Path, "mkdir"), (Path, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))
        monkeypatch.setattr(checkpoint, "open", self.wrap(builtins.open), raising=False)

    def fails(self) -> bool:
        self.steps += 1
        return self.error is not None and self.steps == self.fail_at

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.fails():
                if kwargs.get("ignore_errors") and isinstance(self.error, OSError):
                    return None
                raise self.error
            return function(*args, **kwargs)

        return wrapped


def count_steps(tmp_path: Path) -> int:
    store, _ = open_folder(tmp_path / "counted")
    save(store, 1)
    save(store, 2)
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, None, 0)
        save(store, 3)
    return disk.steps


@pytest.mark.parametrize("kind", ["disk full", "killed"])
def test_a_failure_at_any_step_leaves_a_whole_newest_checkpoint(tmp_path, kind):
    steps = count_steps(tmp_path)
    assert steps > 12  # else the test has lost sight of the steps
    found_rounds = []
    for step in range(1, steps + 1):
        path = tmp_path / f"step-{step}"
        store, _ = open_folder(path)
        save(store, 1)
        save(store, 2)
        error = OSError(errno.ENOSPC, "No space left on device") if kind == "disk full" else Killed()
        raised = None
        with pytest.MonkeyPatch.context() as patch:
            FailingDisk(patch, error, step)
            try:
                save(store, 3)
            except (StorageError, Killed) as caught:
                raised = caught
        if isinstance(raised, StorageError):
            assert raised.exit_code == ExitCode.STORAGE == 74
            assert "No space left" in str(raised)
            assert str(path) in str(raised)
            assert "\n" not in str(raised)
            assert not list(path.glob(".round-*"))  # a full disk is not left fuller
        else:
            assert (kind == "killed") == (raised is not None), f"step {step}"

        again, notices = open_folder(path)
        found = again.load_newest()
        assert notices == [], f"step {step} left a torn checkpoint under its final name"
        number = found.state["round"]
        assert_is(found, number)
        found_rounds.append(number)

        if raised is None:  # what could not be swept out of the way was not needed
            assert number == 3

        # the run goes on from there, and what the failure left does not stay
        for later in range(number + 1, 5):
            save(again, later)
        last, notices = open_folder(path)
        assert_is(last.load_newest(), 4)
        assert notices == []
        assert rounds_in(path) == ["round-000003", "round-000004"]
    assert set(found_rounds) == {2, 3}


def test_files_are_on_disk_before_the_checkpoint_has_its_name(folder, monkeypatch):
    events: list[str] = []
    rename = Path.rename

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    store, _ = open_folder(folder)
    store.load_newest()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(store, 4)
    done = events.index("rename to round-000004")
    before = events[:done]
    assert before.index("sync .round-000004.safetensors.tmp") < before.index("rename to round-000004.safetensors")
    assert {"sync weights.safetensors", "sync state.json"} <= set(before)
    assert "sync checkpoints" in events[done:]


def test_a_save_can_be_tried_again_after_the_disk_was_full(tmp_path):
    for step in range(1, count_steps(tmp_path) + 1):
        path = tmp_path / f"step-{step}"
        store, _ = open_folder(path)
        save(store, 1)
        save(store, 2)
        with pytest.MonkeyPatch.context() as patch:
            FailingDisk(patch, OSError(errno.ENOSPC, "No space left on device"), step)
            with contextlib.suppress(StorageError):
                save(store, 3)
        save(store, 3)
        again, notices = open_folder(path)
        found = again.load_newest()
        assert notices == [], f"step {step}"
        assert_is(found, 3)


# --- torn checkpoints


def empty_weights(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 0)


def flip_weights(path: Path) -> None:
    flip_byte(path / "weights.safetensors")


def flip_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    assert "3.1" in text
    (path / "state.json").write_text(text.replace("3.1", "4.1"))


def no_weights(path: Path) -> None:
    (path / "weights.safetensors").unlink()


def nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def newest_update(path: Path) -> Path:
    return path.parent / "updates" / f"{path.name}.safetensors"


def no_update(path: Path) -> None:
    newest_update(path).unlink()


def flip_update(path: Path) -> None:
    flip_byte(newest_update(path))


def cut_update(path: Path) -> None:
    os.truncate(newest_update(path), 20)


TEARS = [
    cut_weights,
    empty_weights,
    flip_weights,
    flip_state,
    no_weights,
    no_state,
    nothing,
    no_update,
    flip_update,
    cut_update,
]


@pytest.mark.parametrize("tear", TEARS, ids=lambda tear: tear.__name__)
def test_a_torn_newest_falls_back_to_the_one_before_with_a_notice(folder, tear):
    tear(folder / "round-000003")
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 2)
    assert len(notices) == 1
    assert "round-000003" in notices[0]
    assert "torn" in notices[0]
    assert "\n" not in notices[0]


GARBAGE = [b"", b"{", b"\0" * 300, b"\xff\xfe\xfa", b"[]", b"null", b'"text"', b"{}", b'{"content": 5, "digest": "x"}']


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_for_a_state_falls_back(folder, garbage):
    (folder / "round-000003" / "state.json").write_bytes(garbage)
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 2)
    assert len(notices) == 1


@pytest.mark.parametrize("tear", TEARS, ids=lambda tear: tear.__name__)
def test_after_a_fallback_rounds_done_again_overwrite(folder, tear):
    tear(folder / "round-000003")
    store, _ = open_folder(folder)
    store.load_newest()
    save(store, 3, salt=9)  # other values than before, so that what was torn cannot pass for it
    again, notices = open_folder(folder)
    assert_is(again.load_newest(), 3, salt=9)
    assert notices == []
    assert rounds_in(folder) == ["round-000002", "round-000003"]


def test_a_torn_newer_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    store, _ = open_folder(tmp_path)
    save(store, 2)
    save(store, 5)
    cut_weights(tmp_path / "round-000005")
    # checkpoint.every_rounds may differ on resume, so rounds 3 and 4 may be saved now
    store, _ = open_folder(tmp_path)
    assert_is(store.load_newest(), 2)
    save(store, 3)
    cut_weights(tmp_path / "round-000003")
    store, _ = open_folder(tmp_path)
    assert_is(store.load_newest(), 2)


def test_all_torn_is_an_error_that_names_the_folder(folder):
    cut_weights(folder / "round-000002")
    no_state(folder / "round-000003")
    store, notices = open_folder(folder)
    with pytest.raises(DataError) as caught:
        store.load_newest()
    assert caught.value.exit_code == ExitCode.BAD_DATA == 65
    assert str(folder) in str(caught.value)
    assert "2 checkpoints" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ["round-000003" in notices[0], "round-000002" in notices[1]] == [True, True]


def test_an_update_that_both_need_tears_both(folder):
    (folder / "updates" / "round-000002.safetensors").unlink()
    with pytest.raises(DataError):
        open_folder(folder)[0].load_newest()


def test_a_newer_format_is_an_error_and_no_reason_to_fall_back(folder):
    rewrite_content(folder / "round-000003", lambda content: content.update(version=checkpoint.VERSION + 1))
    store, notices = open_folder(folder)
    with pytest.raises(DataError, match=f"format {checkpoint.VERSION + 1}") as caught:
        store.load_newest()
    assert "round-000003" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert notices == []


# --- no pickle is ever read


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def write_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(marker)))


def write_torch_archive(path: Path, marker: Path) -> None:
    torch.save({"w": Trap(marker)}, path)


@pytest.mark.parametrize("write", [write_pickle, write_torch_archive])
def test_a_pickle_in_place_of_weights_is_torn_and_not_executed(folder, tmp_path, write):
    newest = folder / "round-000003"
    weights = newest / "weights.safetensors"
    write(weights, tmp_path / "executed")
    # with the right digest, so that it is the reader and not the digest that must refuse
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    rewrite_content(newest, lambda content: content.update(weights_digest=digest))
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 2)
    assert len(notices) == 1
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_place_of_an_update_is_torn_and_not_executed(folder, tmp_path):
    newest = folder / "round-000003"
    path = newest_update(newest)
    write_pickle(path, tmp_path / "executed")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite_content(newest, lambda content: content["updates"][-1].__setitem__(1, digest))
    store, notices = open_folder(folder)
    assert_is(store.load_newest(), 2)
    assert len(notices) == 1
    assert not (tmp_path / "executed").exists()


def test_the_trap_would_spring(tmp_path):
    # else the two tests above could not fail
    write_pickle(tmp_path / "trap", tmp_path / "executed")
    pickle.loads((tmp_path / "trap").read_bytes())
    assert (tmp_path / "executed").is_dir()
