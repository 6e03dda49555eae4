"""Runs that are told to leave: they save, leave with 75, and go on to the same bits."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.launching import (
    Process,
    command,
    is_gone,
    metrics,
    rounds_done,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
    without_wall_time,
    write_config,
)

LONG = {"train": {"rounds": 12, "local_epochs": 2}, "pace": {"policy": "fixed"}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("preempted"), **LONG)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The undisturbed run."""
    assert run(command(config, config.parent / "whole")).returncode == 0
    return config.parent / "whole"


def newest_checkpoint(run_dir: Path) -> int:
    rounds = [int(folder.name.removeprefix("round-")) for folder in (run_dir / "checkpoints").glob("round-*")]
    return max(rounds, default=0)


def begin(config: Path, run_dir: Path, *options: str, ranks: int = 1, rounds: int = 2) -> Process:
    process = start(command(config, run_dir, *options, ranks=ranks))
    assert wait_for_round(process, run_dir, rounds)
    return process


def goes_on_to_the_same_bits(config: Path, run_dir: Path, whole: Path, ranks: int = 1) -> None:
    assert run(command(config, run_dir, ranks=ranks)).returncode == 0
    assert sha256(run_dir) == sha256(whole)
    assert without_wall_time(metrics(run_dir)) == without_wall_time(metrics(whole))


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGUSR1, 2),
        pytest.param(signal.SIGUSR2, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_round(
    number: signal.Signals, ranks: int, config: Path, whole: Path, tmp_path: Path
) -> None:
    """Also where only the launching process is told, and no checkpoint was due."""
    process = begin(config, tmp_path / "run", "--checkpoint.every_rounds=100", ranks=ranks)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert f"notice: signal {number.name}: left; the last checkpoint stands, run again to go on" in out
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"], found["error"]) == ("preempted", 75, f"signal {number.name}")
    assert newest_checkpoint(tmp_path / "run") == rounds_done(tmp_path / "run") > 0
    goes_on_to_the_same_bits(config, tmp_path / "run", whole)


def test_without_time_for_the_rest_the_round_is_dropped(config: Path, whole: Path, tmp_path: Path) -> None:
    options = ["--checkpoint.grace_s=0", "--checkpoint.every_rounds=100"]
    process = begin(config, tmp_path / "run", *options, ranks=2)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGUSR1)  # one rank is enough, and it need not be rank 0
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert (
        "signal SIGUSR1, 0 s are left" in out or "signal SIGUSR1: left" in out
    )  # between two rounds nothing is dropped
    assert newest_checkpoint(tmp_path / "run") == rounds_done(tmp_path / "run")
    assert all(is_gone(int(rank)) for rank in ranks)
    goes_on_to_the_same_bits(config, tmp_path / "run", whole)


@pytest.mark.slow
def test_the_file_save_writes_a_checkpoint_and_the_run_goes_on(config: Path, whole: Path, tmp_path: Path) -> None:
    process = begin(config, tmp_path / "run", "--checkpoint.every_rounds=100")
    assert newest_checkpoint(tmp_path / "run") == 0
    (tmp_path / "run" / "save").touch()
    deadline = time.monotonic() + 30
    while newest_checkpoint(tmp_path / "run") == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert newest_checkpoint(tmp_path / "run") > 0
    assert process.poll() is None or newest_checkpoint(tmp_path / "run") < 8
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not (tmp_path / "run" / "save").exists()
    assert sha256(tmp_path / "run") == sha256(whole)


def test_the_file_stop_ends_the_run_and_stays_until_it_is_started_again(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    process = begin(config, tmp_path / "run", ranks=2)
    (tmp_path / "run" / "stop").touch()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert "notice: the file" in out
    assert (tmp_path / "run" / "stop").exists()
    again = run(command(config, tmp_path / "run"))
    assert again.returncode == 0
    assert f"notice: removed {tmp_path / 'run' / 'stop'}, which ended the run before" in again.stdout
    assert not (tmp_path / "run" / "stop").exists()
    assert sha256(tmp_path / "run") == sha256(whole)


def test_a_time_limit_ends_the_run_again_and_again(config: Path, tmp_path: Path) -> None:
    """A limit of so many seconds, as a job has: each life does some rounds, and none is lost."""
    few = ["--train.rounds=9", "--train.local_epochs=4"]
    whole = tmp_path / "whole"
    started = time.monotonic()
    process = begin(config, whole, *few, rounds=1)
    first_round_s = time.monotonic() - started
    process.communicate(timeout=240)
    assert process.returncode == 0
    rounds_s = time.monotonic() - started - first_round_s
    limit = f"--checkpoint.time_limit_s={1.3 * first_round_s + rounds_s / 3 + 3:.1f}"
    arguments = command(config, tmp_path / "run", limit, *few)
    before, lives = 0, 0
    while (result := run(arguments)).returncode == 75:
        lives += 1
        assert "notice: the time ends" in result.stdout
        assert newest_checkpoint(tmp_path / "run") == rounds_done(tmp_path / "run") >= before
        before = rounds_done(tmp_path / "run")
        assert lives < 20
    assert result.returncode == 0, result.stderr
    assert lives > 0
    assert sha256(tmp_path / "run") == sha256(whole)
    assert without_wall_time(metrics(tmp_path / "run")) == without_wall_time(metrics(whole))


@pytest.mark.slow
def test_a_signal_while_it_starts(config: Path, whole: Path, tmp_path: Path) -> None:
    """Before the first round it leaves at once: by the signal itself until it can take it, then with 75."""
    for number, pause in ((signal.SIGUSR1, 0.3), (signal.SIGTERM, 1.5), (signal.SIGUSR2, 2.5)):
        process = start(command(config, tmp_path / "run", ranks=2), fresh=True)
        time.sleep(pause)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (75, -number), err
        assert "Traceback" not in err
    goes_on_to_the_same_bits(config, tmp_path / "run", whole)
