"""The run folder: who may use it, what it leaves behind, and what a full disk does to it."""

import errno
import json
import os
import time
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
import yaml

from fedfreeze.config.file import config_values, make_config
from fedfreeze.errors import ConfigError, ExitCode, StorageError
from fedfreeze.storage import files
from fedfreeze.storage.run_folder import RunFolder
from tests.support.checks import assert_one_line
from tests.support.locked import HOST, NO_PID, config, lock, start_of

FULL = OSError(errno.ENOSPC, "No space left on device")

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


# --- the lock


def test_the_lock_says_who_holds_it(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder = RunFolder(path)
    assert folder.open(config()) == []
    holder = json.loads((path / "lock").read_text())
    assert abs(holder.pop("at") - time.time()) < 60
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    facts = {"host": HOST, "pid": os.getpid(), "started": start_of(os.getpid()), "job": "4711", "boot": boot}
    assert holder == facts
    folder.claim(config())
    folder.close()
    assert sorted(file.name for file in path.iterdir()) == ["config.yaml"]


def test_a_folder_in_use_by_a_live_process_is_refused_and_its_lock_stays(path):
    holder = RunFolder(path)
    holder.open(config())
    before = (path / "lock").read_text()
    other = RunFolder(path)
    with pytest.raises(ConfigError) as caught:
        other.open(config())
    assert caught.value.exit_code == ExitCode.BAD_CONFIG == 64
    assert_one_line(caught.value, path, "in use", f"pid {os.getpid()}", HOST)
    other.close()
    assert (path / "lock").read_text() == before
    holder.close()
    assert other.open(config()) == []
    other.close()


def test_a_folder_in_use_by_another_live_process_is_refused(path):
    parent = os.getppid()
    lock(path, pid=parent, started=start_of(parent))
    with pytest.raises(ConfigError, match=f"in use by pid {parent}"):
        RunFolder(path).open(config())


@pytest.mark.parametrize(
    "holder",
    [{"pid": NO_PID, "started": "12345"}, {"started": "1"}, {"pid": NO_PID, "started": None}],
    ids=["stale pid", "reused pid", "gone when it locked"],
)
def test_a_stale_lock_is_taken_over_with_a_notice(path, holder):
    lock_path = lock(path, **holder)
    folder = RunFolder(path)
    (notice,) = folder.open(config())
    assert "took over" in notice
    assert str(holder.get("pid", os.getpid())) in notice
    assert "\n" not in notice
    mine = json.loads(lock_path.read_text())
    assert (mine["pid"], mine["started"]) == (os.getpid(), start_of(os.getpid()))
    with pytest.raises(ConfigError, match="in use"):  # it is a real lock again
        RunFolder(path).open(config())
    folder.close()
    assert not lock_path.exists()


def test_a_lock_of_another_host_is_refused_and_the_file_to_delete_is_named(path):
    lock_path = lock(path, host="node-17", pid=42, job="4711")
    before = lock_path.read_text()
    folder = RunFolder(path)
    with pytest.raises(ConfigError) as caught:
        folder.open(config())
    assert_one_line(caught.value, "node-17", "pid 42", "4711", f"delete {lock_path}")
    folder.close()
    assert lock_path.read_text() == before
    lock_path.unlink()
    assert folder.open(config()) == []


@pytest.mark.parametrize("content", [b'{"host": "nod', b"\0" * 40, b"\xff\xfe"])
def test_a_half_written_lock_is_taken_over(path, content):
    path.mkdir()
    (path / "lock").write_bytes(content)
    folder = RunFolder(path)
    (notice,) = folder.open(config())
    assert "took over" in notice
    assert json.loads((path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["null", "[]", "7"])
def test_a_lock_that_is_no_lock_is_taken_over(path, content):
    path.mkdir()
    (path / "lock").write_text(content)
    (notice,) = RunFolder(path).open(config())
    assert "took over" in notice


def _try_to_hold(path: Path, barrier: Barrier, held: Event, results: Queue) -> None:
    folder = RunFolder(path)
    barrier.wait()
    try:
        folder.open(config())
        results.put(True)
        held.wait()  # until all have tried: two of them must not hold it at a time
        folder.close()
    except ConfigError:
        results.put(False)


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_processes_exactly_one_holds_the_folder(path, stale):
    fork = get_context("fork")
    for _ in range(20):
        path.mkdir(exist_ok=True)
        if stale:
            lock(path, pid=NO_PID)
        barrier, held, results = fork.Barrier(4), fork.Event(), fork.Queue()
        processes = [fork.Process(target=_try_to_hold, args=(path, barrier, held, results)) for _ in range(4)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=30) for _ in processes]
        held.set()
        for process in processes:
            process.join()
        assert sorted(outcomes) == [False, False, False, True]


def test_closing_twice_does_not_take_anothers_lock(begun):
    first, second = RunFolder(begun), RunFolder(begun)
    first.open(config())
    first.close()
    second.open(config())
    first.close()
    assert (begun / "lock").exists()


# --- whose run it is


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"train": {"rounds": 7}}, "train.rounds was 100 and is now 7"),
        ({"fleet": {"memory_cap_mib": [64.0, 128.0]}}, "fleet.memory_cap_mib was None and is now [64.0"),
        ({"method": {"name": "fedavg"}}, "method.name was 'smartfreeze' and is now 'fedavg'"),
        ({"name": "second"}, "name was 'trial' and is now 'second'"),
    ],
)
def test_another_configuration_is_refused_with_key_and_both_values(begun, values, difference):
    before = (begun / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun).open(config(**values))
    assert_one_line(caught.value, begun, difference)
    assert (begun / "config.yaml").read_bytes() == before
    assert not (begun / "lock").exists()


def test_comm_and_checkpoint_may_differ(begun):
    folder = RunFolder(begun)
    changed = config(comm={"timeout_s": 5.0}, checkpoint={"every_rounds": 9, "keep": 4})
    assert folder.open(changed) == []
    folder.claim(changed)
    folder.close()
    assert yaml.safe_load((begun / "config.yaml").read_text())["checkpoint"]["every_rounds"] == 9


def test_a_difference_beside_what_may_differ_is_still_refused(begun):
    with pytest.raises(ConfigError, match=r"train\.batch_size was 32 and is now 16"):
        RunFolder(begun).open(config(comm={"timeout_s": 5.0}, train={"batch_size": 16}))


def test_config_yaml_is_enough_to_repeat_the_run(path):
    ours = config(
        seed=5,
        fleet={"devices": 3, "memory_cap_mib": [8.5, 16.0, 1e20]},
        train={"learning_rate": 1e-5, "participants": 2},
        pace={"max_rounds": None},
    )
    folder = RunFolder(path)
    folder.open(ours)
    folder.claim(ours)
    read = yaml.safe_load((path / "config.yaml").read_text())
    assert read == config_values(ours)
    assert make_config(read) == ours
    folder.close()
    assert RunFolder(path).open(ours) == []


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [1\n", b"\xff\xfe\xfa", b"text"])
def test_a_damaged_config_yaml_is_refused(begun, content):
    (begun / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun).open(config())
    assert_one_line(caught.value, begun / "config.yaml", "delete the run folder or use another --run-dir")
    assert not (begun / "lock").exists()


def test_checkpoints_without_a_configuration_are_refused(path):
    (path / "checkpoints" / "round-000003").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        RunFolder(path).open(config())
    assert not (path / "lock").exists()


# --- nothing left behind


def test_a_run_that_turns_out_impossible_leaves_nothing_behind(path):
    folder = RunFolder(path)
    folder.open(config())
    assert [file.name for file in path.iterdir()] == ["lock"]
    folder.close()
    assert not path.exists()


def test_a_folder_with_other_files_is_left_as_it_was(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    folder = RunFolder(path)
    folder.open(config())
    folder.close()
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_missing_parents_are_made(tmp_path):
    path = tmp_path / "runs" / "deep" / "trial"
    folder = RunFolder(path)
    folder.open(config())
    folder.claim(config())
    folder.close()
    assert (path / "config.yaml").is_file()


# --- metrics


def test_metrics_append_one_json_object_a_line(path):
    folder = RunFolder(path)
    folder.open(config())
    assert folder.metrics_bytes() == 0
    records = [{"kind": "round", "round": 1, "failed": {"3": "näh\nx"}}, {"kind": "round", "accuracy": None}]
    for record in records:
        folder.append_metrics(record)
    lines = folder.metrics_path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records
    assert folder.metrics_bytes() == folder.metrics_path.stat().st_size > 0


def test_metrics_after_the_checkpoint_are_cut(path):
    folder = RunFolder(path)
    folder.open(config())
    folder.append_metrics({"round": 1})
    length = folder.metrics_bytes()
    folder.append_metrics({"round": 2})
    with open(folder.metrics_path, "a") as file:
        file.write('{"round": 3, "los')  # a kill in the middle of a line
    folder.cut_metrics(length)
    folder.append_metrics({"round": 2, "again": True})
    assert folder.metrics_path.read_text() == '{"round": 1}\n{"round": 2, "again": true}\n'


def test_cutting_never_lengthens(path):
    folder = RunFolder(path)
    folder.open(config())
    folder.append_metrics({"round": 1})
    folder.cut_metrics(10_000)
    assert folder.metrics_path.read_text() == '{"round": 1}\n'
    folder.cut_metrics(0)
    assert folder.metrics_path.read_bytes() == b""


def test_cutting_what_is_not_there_creates_nothing(path):
    path.mkdir()
    RunFolder(path).cut_metrics(0)
    assert list(path.iterdir()) == []


def test_not_a_number_is_never_written(path):
    folder = RunFolder(path)
    folder.open(config())
    folder.append_metrics({"round": 1})
    folder.write_summary({"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append_metrics({"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_summary({"loss": float("inf")})
    assert folder.metrics_path.read_text() == '{"round": 1}\n'
    assert folder.read_summary() == {"loss": 1.0}


# --- summary and model, whole or not at all


def test_summary_round_trip(path):
    folder = RunFolder(path)
    folder.open(config())
    assert folder.read_summary() is None
    folder.write_summary({"status": "running", "exit_code": None})
    folder.write_summary({"status": "finished", "exit_code": 0, "host": "näh"})
    assert folder.read_summary() == {"status": "finished", "exit_code": 0, "host": "näh"}
    assert sorted(file.name for file in path.iterdir()) == ["lock", "summary.json"]


@pytest.mark.parametrize("content", [b"", b'{"status": "fin', b"[]", b"null", b"\xff\xfe"])
def test_a_summary_that_is_not_whole_is_none(path, content):
    path.mkdir()
    (path / "summary.json").write_bytes(content)
    assert RunFolder(path).read_summary() is None


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_file(path, step):
    folder = RunFolder(path)
    folder.open(config())
    folder.write_summary({"status": "running"})
    folder.write_model(b"old weights")

    def fail(*_: object) -> None:
        raise FULL

    with pytest.MonkeyPatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", fail)
        elif step == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(files, "open", fail, raising=False)
        for write, target in (
            (lambda: folder.write_summary({"status": "finished"}), folder.summary_path),
            (lambda: folder.write_model(b"new weights"), folder.model_path),
        ):
            with pytest.raises(StorageError) as caught:
                write()
            assert_one_line(caught.value, target, "No space left on device", HOST)
    assert folder.read_summary() == {"status": "running"}
    assert folder.model_path.read_bytes() == b"old weights"
    folder.write_summary({"status": "finished"})
    assert folder.read_summary() == {"status": "finished"}


# --- disk errors


@needs_full
def test_a_full_disk_is_a_storage_error_wherever_it_is_met(path):
    folder = RunFolder(path)
    folder.open(config())
    for name in ("metrics.jsonl", ".config.yaml.tmp", ".summary.json.tmp", ".model.safetensors.tmp"):
        (path / name).symlink_to("/dev/full")
    for write in (
        lambda: folder.append_metrics({"round": 1}),
        lambda: folder.claim(config()),
        lambda: folder.write_summary({"status": "running"}),
        lambda: folder.write_model(b"weights"),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.exit_code == ExitCode.STORAGE == 74
        assert_one_line(caught.value, path, "No space left on device", HOST)
    assert folder.read_summary() is None
    assert not folder.model_path.exists()


def test_metrics_that_cannot_be_cut_are_a_storage_error(path, monkeypatch):
    folder = RunFolder(path)
    folder.open(config())
    folder.append_metrics({"round": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "truncate", fail)
    with pytest.raises(StorageError) as caught:
        folder.cut_metrics(0)
    assert_one_line(caught.value, folder.metrics_path, "Read-only file system")


@pytest.mark.parametrize("step", ["mkdir", "create lock", "write lock"])
def test_a_full_disk_when_opening_is_a_storage_error_and_blocks_nobody(path, step):
    def fail(*_: object, **__: object) -> None:
        raise FULL

    folder = RunFolder(path)
    with pytest.MonkeyPatch.context() as patch:
        owner, name = {"mkdir": (Path, "mkdir"), "create lock": (os, "open"), "write lock": (os, "pwrite")}[step]
        patch.setattr(owner, name, fail)
        with pytest.raises(StorageError) as caught:
            folder.open(config())
    assert caught.value.exit_code == 74
    assert_one_line(caught.value, path, "No space left on device")
    folder.close()
    RunFolder(path).open(config())  # when there is space again
    assert json.loads((path / "lock").read_text())["pid"] == os.getpid()


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError) as caught:
            RunFolder(path).open(config())
        assert_one_line(caught.value, path)
    assert (tmp_path / "file").read_text() == "mine"
