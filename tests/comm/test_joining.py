"""The start of the ranks: who is missing or does not fit is told, in bounded time, and a signal ends the waiting."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fedfreeze.comm.joining import watched
from tests.support.launching import ENVIRONMENT, Process, command, needs_mpirun, run, start, write_config
from tests.support.local_slurm import free_ports

FEW = {"train": {"rounds": 3}, "pace": {"policy": "fixed"}}


def as_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    return ENVIRONMENT | {name: str(number) for name, number in numbers.items()} | {"MASTER_PORT": str(port)}


def start_rank(rank: int, world_size: int, port: int, *arguments: str) -> Process:
    return start([sys.executable, "-m", "fedfreeze", "run", *arguments], as_rank(rank, world_size, port))


def ends(process: Process, timeout_s: float = 60) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def test_ranks_with_different_settings_are_told_apart(tmp_path: Path) -> None:
    """They would train into one model, and nobody would know what it is."""
    config, [port] = write_config(tmp_path, **FEW), free_ports(1)
    tail = [str(config), "--run-dir", str(tmp_path / "run")]
    ranks = [start_rank(0, 2, port, *tail), start_rank(1, 2, port, *tail, "--train.batch_size=8")]
    found = [ends(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [64, 64]
    told = "".join(err for _, _, err in found)
    assert told.count("\n") == 1, told
    assert "rank 1 on " in told
    assert "train.batch_size was 16 and is now 8" in told
    assert "start all ranks with the same command" in told
    assert not (tmp_path / "run").exists()


def test_a_rank_that_counts_otherwise(tmp_path: Path) -> None:
    config, [port] = write_config(tmp_path, **FEW), free_ports(1)
    tail = [str(config), "--run-dir", str(tmp_path / "run"), "--comm.join_s=6"]
    ranks = [start_rank(0, 2, port, *tail), start_rank(1, 3, port, *tail)]
    found = [ends(rank) for rank in ranks]
    assert [code for code, _, _ in found] == [76, 76]
    assert "the others count 2 and 3 ranks" in found[0][2]


def test_a_port_where_somebody_else_listens_in_silence(tmp_path: Path) -> None:
    """torch's own waiting for an answer has no end."""
    config = write_config(tmp_path, **FEW)
    with socket.create_server(("127.0.0.1", 0), backlog=8) as other:
        port = other.getsockname()[1]
        rank = start_rank(1, 2, port, str(config), "--run-dir", str(tmp_path / "run"), "--comm.join_s=2")
        code, _, err = ends(rank)
    assert code == 76
    assert "did not come together within 2 s (comm.join_s)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_waiting(number: signal.Signals, code: int, tmp_path: Path) -> None:
    config, [port] = write_config(tmp_path, **FEW), free_ports(1)
    rank = start_rank(0, 2, port, str(config), "--run-dir", str(tmp_path / "run"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until it serves the store
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(rank.pid, number)
    found, _, err = ends(rank)
    assert found == code
    assert "Traceback" not in err
    assert number != signal.SIGINT or err == ""  # whoever pressed Ctrl-C knows
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_mpirun
def test_mpirun_takes_a_run_that_is_done_for_done(tmp_path: Path) -> None:
    """MPI must be ended in order on every good way out, also where there was nothing to do, and with one rank."""
    pytest.importorskip("mpi4py")
    config = write_config(tmp_path, **FEW)
    for ranks in (1, 2):  # the second finds it finished
        arguments = command(config, tmp_path / "run", "--comm.transport=mpi", ranks=ranks, by="mpirun")
        result = run(arguments)
        assert (result.returncode, result.stderr) == (0, ""), ranks
    assert "is finished already" in result.stdout


def watch_of(body: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with `watched` around, in a process that it may end."""
    code = "import ctypes, os, signal, threading, time\nfrom fedfreeze.comm.joining import watched\n"
    return run([sys.executable, "-c", code + textwrap.dedent(body)], timeout_s=60)


def test_a_call_into_c_that_never_returns_is_ended() -> None:
    done = watch_of(
        """
        with watched(1, 2, 0.1):
            ctypes.PyDLL(None).sleep(50)  # holds on to nothing, and hears nothing
        """.replace("PyDLL", "CDLL")
    )
    assert done.returncode == 76
    assert done.stderr.startswith("fedfreeze: error: rank 1 of 2 on ")


def test_what_comes_in_time_is_left_alone() -> None:
    with watched(0, 2, 60, leave=lambda code: pytest.fail(str(code))):
        time.sleep(0.1)
    assert signal.set_wakeup_fd(-1) == -1
