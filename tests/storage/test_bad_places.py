"""Run folders and disks that cannot serve: one line, nothing half-written, and the run goes on once they can."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.config.file import dump_config, load_config
from fedfreeze.storage import checkpoint
from fedfreeze.storage.run_folder import RunFolder
from tests.support.in_process import Outcome, assert_refused, note
from tests.support.launching import metrics
from tests.support.tiny_runs import assert_no_leftovers, assert_same, go, leftovers

# --- run folders


def another_seed(folder: Path) -> None:
    (folder / "run").mkdir()
    other = load_config(str(folder / "small.yaml"), ["seed=3"])
    (folder / "run" / "config.yaml").write_text(dump_config(other))


def in_the_way(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "run" / name).mkdir(parents=True)


FOLDERS: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...], str]] = {
    "a run folder of another configuration": (
        another_seed,
        64,
        ("run folder run holds another run: seed was 3 and is now 0", "use another --run-dir or --name"),
        "",
    ),
    "a damaged config.yaml": (
        lambda folder: (folder / "run").mkdir() or (folder / "run/config.yaml").write_text("seed: [\n"),
        64,
        ("config.yaml is not YAML", "delete the run folder or use another --run-dir"),
        "",
    ),
    "checkpoints without config.yaml": (in_the_way("checkpoints/round-000001"), 64, ("but no config.yaml",), ""),
    "a file in place of the folder": (
        lambda folder: (folder / "run").touch(),
        74,
        ("cannot use run folder run", "choose another folder"),
        "",
    ),
    "a link that leads nowhere": (
        lambda folder: (folder / "run").symlink_to("nowhere/deep"),
        74,
        ("cannot use run folder run", "choose another folder"),
        "",
    ),
    "a link to itself": (
        lambda folder: (folder / "run").symlink_to("run"),
        74,
        ("cannot use run folder run", "choose another folder"),
        "",
    ),
    "a folder in place of the lock": (in_the_way("lock"), 74, ("cannot use run folder run", "Is a directory"), ""),
    "a folder in place of config.yaml": (in_the_way("config.yaml"), 64, ("config.yaml cannot be read",), ""),
    "a lock of another host": (
        lambda folder: (
            (folder / "run").mkdir()
            or (folder / "run/lock").write_text(
                json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": None})
            )
        ),
        64,
        ("locked by pid 1 on elsewhere", "delete run/lock"),
        "",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_folder_that_cannot_serve(name: str, here: Path) -> None:
    prepare, code, says, _ = FOLDERS[name]
    prepare(here)
    outcome = go(here)
    note(name, "--run-dir run", outcome.code, outcome.err)
    assert_refused(outcome, code, *says)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "partition.csv", "model.safetensors", "checkpoints"])
def test_something_in_the_way_in_the_run_folder(name: str, here: Path, whole: Path) -> None:
    """One line that names it; once it is out of the way, the run goes on."""
    if name == "checkpoints":
        (here / "run").mkdir()
        (here / "run" / name).touch()
    else:
        in_the_way(f"{name}/inner")(here)
    outcome = go(here)
    note(f"something in place of {name}", "--run-dir run", outcome.code, outcome.err)
    assert_no_leftovers(here)
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 74, name)
    shutil.rmtree(here / "run" / name) if name != "checkpoints" else (here / "run" / name).unlink()
    assert go(here).code == 0
    assert_same(here / "run", whole)


def test_a_run_folder_in_use_by_a_living_run(here: Path) -> None:
    held = RunFolder(here / "run")
    held.open(load_config(str(here / "small.yaml")))
    outcome = go(here)
    note("a run folder in use", "--run-dir run", outcome.code, outcome.err)
    assert_refused(outcome, 64, f"in use by pid {os.getpid()}", "wait for it or use --run-dir")
    held.close()
    assert not (here / "run").exists()


# --- disks


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    """Mount small file systems in memory; gone after the test."""
    mounted: list[Path] = []

    def make(place: Path, options: str) -> Path:
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode != 0:
            pytest.skip("mounting is not permitted here")
        mounted.append(place)
        return place

    yield make
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk but for some bytes."""
    file = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with contextlib.suppress(OSError):
        while True:
            os.write(file, bytes(4096))
    os.close(file)
    size = (disk / "filler").stat().st_size
    os.truncate(disk / "filler", max(0, size - size % 4096 - leave))


def assert_disk_full(outcome: Outcome, case: str, path: str) -> None:
    note(case, f"--run-dir {path}", outcome.code, outcome.err)
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 74, path, "No space left", "free space")


def test_a_read_only_disk(here: Path, mount: Callable[..., Path]) -> None:
    mount(here / "disk", "ro")
    for run_dir in ("disk", "disk/deep/run"):
        outcome = go(here, run_dir)
        note("a read-only disk", f"--run-dir {run_dir}", outcome.code, outcome.err)
        assert_refused(outcome, 74, f"cannot use run folder {run_dir}", "Read-only file system", "another folder")


def test_a_cache_on_a_full_disk(here: Path, mount: Callable[..., Path]) -> None:
    for leave in (0, 8192, 65536):
        disk = mount(here / f"disk{leave}", "size=1m")
        fill(disk, leave)
        outcome = go(here, "run", f"--data.cache_dir=disk{leave}/cache")
        note("cache_dir on a full disk", f"--data.cache_dir=disk{leave}/cache", outcome.code, outcome.err)
        assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 74, f"disk{leave}/cache", "No space left")
        assert [path for path in (disk / "cache").glob("**/*") if path.is_file()] == []
        assert not (here / "run").exists()
        assert list((disk / "cache").glob("*")) == []
    (disk / "filler").unlink()
    assert go(here, "run", f"--data.cache_dir=disk{leave}/cache").code == 0


def test_a_disk_that_is_full_from_the_start(here: Path, whole: Path, mount: Callable[..., Path]) -> None:
    disk = mount(here / "disk", "size=1m")
    fill(disk)
    outcome = go(here, "disk/deep/run")
    assert_disk_full(outcome, "disk full at the start", "disk/deep/run")
    (disk / "filler").unlink()
    assert go(here, "disk/deep/run").code == 0
    assert_same(disk / "deep" / "run", whole)


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(here: Path, mount: Callable[..., Path]) -> None:
    fill(mount(here / "disk", "size=1m"))
    assert go(here, "disk/deep/run").changed == []


@pytest.mark.parametrize("leave", [1, 2, 3, 5, 8, 12])
def test_a_disk_that_fills_up_somewhere(leave: int, here: Path, whole: Path, mount: Callable[..., Path]) -> None:
    """So many pages are left; wherever that ends, the run goes on once there is space, to the same bits."""
    disk = mount(here / "disk", "size=1m")
    fill(disk, leave * 4096)
    outcome = go(here, "disk/run")
    assert_disk_full(outcome, f"disk full after {leave} pages", "disk/run")
    left = metrics(disk / "run")
    (disk / "filler").unlink()
    again = go(here, "disk/run")
    assert (again.code, again.err) == (0, "")
    assert len(left) <= len(metrics(disk / "run"))
    assert_same(disk / "run", whole)


@pytest.mark.parametrize("inodes", [3, 5, 8, 11, 14])
def test_a_disk_without_room_for_names(inodes: int, here: Path, whole: Path, mount: Callable[..., Path]) -> None:
    disk = mount(here / "disk", f"size=1m,nr_inodes={inodes}")
    outcome = go(here, "disk/run")
    assert_disk_full(outcome, f"no more than {inodes} inodes", "disk/run")
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
    again = go(here, "disk/run")
    assert (again.code, again.err) == (0, "")
    assert_same(disk / "run", whole)


FULL_AT = {
    "checkpoint": (checkpoint.CheckpointStore, "save"),
    "metrics": (RunFolder, "append_metrics"),
    "deployment": (RunFolder, "write_model"),
}


@pytest.mark.parametrize("when", FULL_AT)
def test_a_disk_that_is_full_at(
    when: str, here: Path, whole: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount(here / "disk", "size=1m")
    owner, name = FULL_AT[when]
    original, calls = getattr(owner, name), []

    def filled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if when == "deployment" else 4):
            fill(disk)
            if when == "metrics":  # the file has room to the end of its page
                file = disk / "run" / "metrics.jsonl"
                length = file.stat().st_size
                os.truncate(file, length)
                with open(file, "ab") as end:
                    end.write(b" " * (-length % 4096 - 100))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, filled)
    outcome = go(here, "disk/run")
    assert_disk_full(outcome, f"disk full at {when}", "disk/run")
    left = leftovers(disk)
    assert not (disk / "run" / "model.safetensors").exists()
    (disk / "filler").unlink()
    again = go(here, "disk/run")
    assert (again.code, again.err) == (0, "")
    assert_same(disk / "run", whole)
    assert left == []
