"""The lock of a run folder among containers of one kernel, which have names of their own, and among machines."""

import errno
import os
import time
from pathlib import Path

import pytest

from fedfreeze.errors import ConfigError
from fedfreeze.storage.lock import take
from fedfreeze.storage.run_folder import RunFolder
from tests.support.checks import assert_one_line
from tests.support.locked import HOST, NO_PID, config, lock

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
LATER = {"at": time.time() + 1e6}


@pytest.mark.parametrize(
    ("holder", "taken"),
    [
        ({"host": "container-2", "boot": BOOT, "pid": NO_PID}, True),  # killed, and started again under another name
        ({"host": "container-2", "boot": BOOT, "pid": 1}, True),  # of another space of pids: its number says nothing
        ({"host": "container-2", "boot": BOOT, "job": "4711"}, True),
        ({"host": "container-2", "boot": "other", "pid": NO_PID}, False),  # on another machine
        ({"host": "container-2", "boot": None}, False),
        ({"host": "container-2"}, False),  # of a version that did not note it
        ({"boot": "other"}, True),  # this machine was started anew, and pid and start are by chance those of a process
        ({"boot": "other", "at": 1.0}, True),
        ({"boot": "other", "pid": NO_PID} | LATER, False),  # another machine of the same name, alive after our start
        ({"boot": BOOT, "pid": NO_PID} | LATER, True),
    ],
)
def test_a_lock_of_this_kernel_is_the_kernels_to_tell(path, holder, taken):
    lock_path = lock(path, **holder)
    before = lock_path.read_text()
    folder = RunFolder(path)
    if taken:
        (notice,) = folder.open(config())
        assert f"on {holder.get('host', HOST)}, which is gone" in notice
        folder.close()
    else:
        with pytest.raises(ConfigError) as caught:
            folder.open(config())
        assert_one_line(caught.value, f"on {holder.get('host', HOST)}", f"delete {lock_path}")
        assert lock_path.read_text() == before


def test_a_container_of_this_kernel_that_lives_is_not_taken_over(path):
    descriptor = take(lock(path, host="container-2", boot=BOOT, pid=1), wait=False)
    with pytest.raises(ConfigError, match="in use by pid 1 on container-2"):
        RunFolder(path).open(config())
    os.close(descriptor)  # it is killed
    (notice,) = RunFolder(path).open(config())
    assert "took over the lock of pid 1 on container-2" in notice


def test_without_the_kernels_lock_a_container_of_another_name_is_refused(path, monkeypatch):
    lock_path = lock(path, host="container-2", boot=BOOT, pid=NO_PID)

    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ConfigError, match="delete "):
        RunFolder(path).open(config())
    assert lock_path.exists()
