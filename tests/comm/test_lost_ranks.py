"""A rank that dies or hangs in a round: the others notice, name it and leave with 76; the run goes on to its bits."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.launching import (
    ENVIRONMENT,
    command,
    is_gone,
    needs_mpirun,
    ranks_of,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
    write_config,
)

RANKS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    return write_config(folder, train={"rounds": 16, "local_epochs": 3}, pace={"policy": "fixed"})


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The undisturbed run."""
    assert run(command(config, config.parent / "whole", ranks=2)).returncode == 0
    return config.parent / "whole"


def case(by: str, victim: int, number: signal.Signals, *marks: pytest.MarkDecorator) -> object:
    transport = "mpi" if by.endswith("mpi") else "torch"
    by = by.removesuffix(" mpi")
    if by == "mpirun":
        marks = (*marks, needs_mpirun)
    return pytest.param(by, transport, victim, number, marks=marks, id=f"{by} {transport} rank {victim} {number.name}")


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("by", "transport", "victim", "number"),
    [
        case("mpirun mpi", 1, KILL, SLOW),
        case("srun 2", 0, KILL),
        case("torchrun", 2, KILL, SLOW),
        case("torchrun", 0, KILL, SLOW),
        case("mpirun", 1, KILL, SLOW),
        case("mpirun mpi", 0, KILL, SLOW),
        case("srun 2", 1, KILL, SLOW),
        case("srun 2", 2, STOP, SLOW),
        case("srun 2", 0, STOP, SLOW),
        case("mpirun mpi", 1, STOP, SLOW),
        case("mpirun", 0, STOP, SLOW),
        case("torchrun", 1, STOP, SLOW),
    ],
)
def test_a_lost_rank_is_named_by_the_others(
    by: str,
    transport: str,
    victim: int,
    number: signal.Signals,
    config: Path,
    whole: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    environment = request.getfixturevalue("slurm").environment if by.startswith("srun") else ENVIRONMENT
    options = ["--comm.heartbeat_s=3", f"--comm.transport={transport}"]
    run_dir = tmp_path / "run"
    process = start(command(config, run_dir, *options, ranks=RANKS, by=by), environment)
    assert wait_for_round(process, run_dir, 2)
    ranks = ranks_of(run_dir)
    assert sorted(ranks) == list(range(RANKS))
    struck = time.monotonic()
    os.kill(ranks[victim], number)
    survivors = [process for rank, process in ranks.items() if rank != victim]
    while not all(is_gone(survivor) for survivor in survivors):
        assert time.monotonic() - struck < 60
        time.sleep(0.02)
    noticed_s = time.monotonic() - struck
    _, err = process.communicate(timeout=90)
    ended_s = time.monotonic() - struck
    print(
        f"\n{by} {transport}, rank {victim} {number.name}: all left after {noticed_s:.1f} s, launcher {ended_s:.1f} s"
    )
    assert process.returncode != 0
    how = "has died" if number == KILL else "has given no sign of life for"
    assert re.search(rf"fedfreeze: error: rank {victim} on \S+ \(pid {ranks[victim]}\) {how}", err), err
    assert "internal error" not in err
    assert [summary(run_dir)[key] for key in ("status", "exit_code")] == ["failed", 76]
    while not all(is_gone(each) for each in ranks.values()):  # mpirun does not wait for what it kills
        assert time.monotonic() - struck < 120, "a rank was left behind"
        time.sleep(0.05)
    assert run(command(config, run_dir, ranks=2)).returncode == 0
    assert sha256(run_dir) == sha256(whole)


@pytest.mark.slow
def test_torchrun_starts_its_workers_again_by_itself(config: Path, whole: Path, tmp_path: Path) -> None:
    """With --max-restarts: they meet at a store in which those that died have left their addresses."""
    arguments = command(config, tmp_path / "run", ranks=2, by="torchrun")
    process = start([*arguments[:3], "--max-restarts=2", *arguments[3:]])
    for rounds in (2, 6):
        assert wait_for_round(process, tmp_path / "run", rounds)
        os.kill(ranks_of(tmp_path / "run")[rounds // 6], KILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert sha256(tmp_path / "run") == sha256(whole)


def test_a_rank_that_never_comes_is_named(config: Path, tmp_path: Path) -> None:
    """As where a node does not start: the others wait for the time of joining, not for ever."""
    one_of_two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29547"}
    arguments = command(config, tmp_path / "run", "--comm.join_s=2")[:-2]
    result = run(arguments, environment=ENVIRONMENT | one_of_two)
    assert result.returncode == 76
    assert "rank 1 of 2 did not join within 2 s" in result.stderr
    assert result.stderr.count("\n") == 1
