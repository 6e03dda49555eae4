"""Killed at random moments and started again: the same result, bit for bit; and nobody is left behind."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.support.launching import (
    command,
    is_gone,
    kill_tree,
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


def test_killed_three_times_at_random_moments(small_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = small_run
    total = rounds_done(whole)
    generator = random.Random(0)
    killed = 0
    for ranks in (1, 2, 3):
        process = start(command(config, tmp_path / "run", ranks=ranks))
        done = rounds_done(tmp_path / "run")
        assert wait_for_round(process, tmp_path / "run", done + generator.randint(1, max(1, total // 6)))
        time.sleep(generator.random() * 0.05)  # anywhere in a round, a checkpoint or a stage change
        if process.poll() is None:
            kill_tree(process)
            killed += 1
    assert killed == 3
    assert summary(tmp_path / "run")["status"] == "running"
    last = run(command(config, tmp_path / "run", ranks=2))
    assert last.returncode == 0, last.stderr
    assert "notice: took over the lock of pid" in last.stdout
    assert "notice: resumed after round" in last.stdout
    assert sha256(tmp_path / "run") == sha256(whole)
    assert without_wall_time(metrics(tmp_path / "run")) == without_wall_time(metrics(whole))
    for key in ("final_accuracy", "best_accuracy", "bytes_total", "mean_memory_mib", "participation", "rounds"):
        assert summary(tmp_path / "run")[key] == summary(whole)[key]


def test_torn_newest_checkpoint_falls_back(small_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = small_run
    process = start(command(config, tmp_path / "run"))
    assert wait_for_round(process, tmp_path / "run", 4)
    kill_tree(process)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("round-*"))[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run(command(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert f"notice: checkpoint {newest.name} is torn" in result.stdout
    assert sha256(tmp_path / "run") == sha256(whole)
    assert without_wall_time(metrics(tmp_path / "run")) == without_wall_time(metrics(whole))


def ranks_of(process_id: int) -> list[int]:
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return [int(child) for child in children]


def all_gone(process_ids: list[int], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not all(is_gone(one) for one in process_ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 500}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run", ranks=2))
    assert wait_for_round(process, tmp_path / "run", 1)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.kill()  # the parent alone
    process.communicate(timeout=60)
    assert all_gone(ranks)


def test_a_killed_rank_ends_all_with_76_and_the_run_goes_on_later(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 9}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run", ranks=3))
    assert wait_for_round(process, tmp_path / "run", 2)
    ranks = ranks_of(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 76
    assert all_gone(ranks)
    assert err.count("fedfreeze: error:") == 1
    assert "rank 2 on " in err
    assert "has died" in err
    assert summary(tmp_path / "run")["exit_code"] == 76
    assert run(command(config, tmp_path / "run", ranks=2)).returncode == 0


def test_interrupt_leaves_with_130_and_the_run_goes_on_later(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 9}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run", ranks=2))
    assert wait_for_round(process, tmp_path / "run", 2)
    ranks = ranks_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert all_gone(ranks)
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"]) == ("preempted", 130)
    assert run(command(config, tmp_path / "run")).returncode == 0


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 500}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run"))
    assert wait_for_round(process, tmp_path / "run", 1)
    second = run(command(config, tmp_path / "run", ranks=2))
    assert process.poll() is None
    kill_tree(process)
    assert second.returncode == 64
    assert second.stderr.count("fedfreeze: error:") == 1
    assert f"in use by pid {process.pid}" in second.stderr


def test_killed_between_the_last_checkpoint_and_the_end(small_run: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing is left but to deploy: no round is trained again, and none on top."""
    config, whole = small_run
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "model.safetensors").unlink()
    status = summary(run_dir) | {"status": "running", "exit_code": None}
    (run_dir / "summary.json").write_text(json.dumps(status))
    result = run(command(config, run_dir, ranks=2))
    assert result.returncode == 0, result.stderr
    assert "round " not in result.stdout.split("notice: resumed")[0]
    assert sha256(run_dir) == sha256(whole)
    assert without_wall_time(metrics(run_dir)) == without_wall_time(metrics(whole))


def test_checkpoints_of_another_network_are_refused(small_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, whole = small_run
    other = write_config(tmp_path, model={"width": 4})
    run_dir = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", run_dir / "checkpoints")
    values = (whole / "config.yaml").read_text().replace("width: 8", "width: 4")
    (run_dir / "config.yaml").write_text(values)
    result = run(command(other, run_dir))
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert "are of another network" in result.stderr


def test_rank_0_killed_is_told_by_the_launcher(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 500}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run", ranks=2))
    assert wait_for_round(process, tmp_path / "run", 1)
    ranks = ranks_of(process.pid)
    os.kill(ranks[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 76
    assert err.count("fedfreeze: error:") == 1
    assert "rank 0 was ended by signal 9" in err
    assert all_gone(ranks)
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["exit_code"]) == ("failed", 76)


def test_interrupting_the_launcher_alone_reaches_the_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"rounds": 500}, pace={"policy": "fixed"})
    process = start(command(config, tmp_path / "run", ranks=2))
    assert wait_for_round(process, tmp_path / "run", 1)
    ranks = ranks_of(process.pid)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert all_gone(ranks)
    assert summary(tmp_path / "run")["status"] == "preempted"


def test_a_reader_that_leaves_does_not_stop_the_run(small_run: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = small_run
    process = start(command(config, tmp_path / "run"))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # `| head -1`
    assert process.wait(timeout=120) == 0
    process.stderr.close()  # type: ignore[union-attr]
    assert sha256(tmp_path / "run") == sha256(whole)


def test_changed_caps_are_noticed_on_resume(tmp_path: Path) -> None:
    """config.yaml only names the CSV file; the run is made of what was in it."""
    fleet = tmp_path / "fleet.csv"
    rows = [f"{device},{[0.33, 0.4, 0.6, 0.9][device % 4]}" for device in range(24)]
    fleet.write_text("device,memory_cap_mib\n" + "\n".join(rows) + "\n")
    config = write_config(tmp_path, fleet={"memory_cap_mib": str(fleet)})
    process = start(command(config, tmp_path / "run"))
    assert wait_for_round(process, tmp_path / "run", 2)
    kill_tree(process)
    fleet.write_text(fleet.read_text().replace("0.33", "5.0"))
    result = run(command(config, tmp_path / "run"))
    assert result.returncode == 64
    assert "the data or the devices (a CSV file?) have changed" in result.stderr
    fleet.write_text(fleet.read_text().replace("5.0", "0.33"))
    assert run(command(config, tmp_path / "run")).returncode == 0
