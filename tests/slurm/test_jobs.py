"""The batch files as shipped, in a real SLURM of two emulated nodes: requeued and preempted runs give the same bits."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.support.checks import ROOT
from tests.support.launching import command, rounds_done, run, sha256, summary, write_config
from tests.support.slurm_fixture import SlurmJobs

FAKE = str(ROOT / "tests" / "support" / "fake_fedfreeze.sh")
# small shares of the emulated nodes, so that jobs of one test run side by side
SMALL_TASKS = ("--nodes=1", "--ntasks-per-node=1", "--mem-per-cpu=100")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
# seconds between round 3 and the end, also on a fast machine: SLURM and the file `stop` take one or two
ENOUGH = {"train": {"local_epochs": 6}}
LONG = {"train": {"rounds": 40, "local_epochs": 8}, "pace": {"slope_limit": 1e-9}}


def submit(
    slurm: SlurmJobs, folder: Path, file: str, *arguments: str, options: tuple[str, ...], **variables: str
) -> str:
    """Submit a shipped batch file from a folder of the test; what a site sets comes from the environment."""
    site = {"FEDFREEZE_HOME": str(ROOT), "PYTHON": sys.executable}
    return slurm.submit(ROOT / "slurm" / file, *arguments, options=options, cwd=folder, environment=site | variables)


def wait_for_rounds(slurm: SlurmJobs, job: str, run_dir: Path, number: int, timeout_s: float = 180) -> None:
    """Wait until a run has done so many rounds, in whichever life of its job."""
    slurm.wait(job, lambda _: rounds_done(run_dir) >= number, timeout_s, f"in round {number}")


def wait_for_file(slurm: SlurmJobs, job: str, path: Path) -> None:
    slurm.wait(job, lambda _: path.exists(), 60, f"at {path}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment on one rank, with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(command(write_config(folder, **ENOUGH), folder / "run")).returncode == 0
    return folder / "run"


def assert_finished(slurm: SlurmJobs, job: str, run_dir: Path, undisturbed: Path, restarts: int | None = None) -> None:
    """Wait for the end of a job, which must reach the undisturbed run's bits after so many (or any) requeues."""
    fields = slurm.wait_for_end(job, timeout_s=400)
    log = slurm.log(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert int(fields["Restarts"]) == restarts if restarts is not None else int(fields["Restarts"]) >= 1, log
    assert "status=finished exit_code=0 seconds=" in log
    assert summary(run_dir)["world_size"] == 2
    assert sha256(run_dir) == sha256(undisturbed)


# --- the real program on two nodes


def test_a_run_that_slurm_signals_is_requeued_and_reaches_the_same_bits(
    slurm: SlurmJobs, tmp_path: Path, undisturbed: Path
) -> None:
    """`scancel --signal=USR1 --batch` is what SLURM does before a time limit, without the waiting."""
    config = write_config(tmp_path, **ENOUGH)
    job = submit(slurm, tmp_path, "cpu.sbatch", config.name, options=TWO_NODES)
    wait_for_rounds(slurm, job, tmp_path / "runs" / "small", 3)
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    assert_finished(slurm, job, tmp_path / "runs" / "small", undisturbed, restarts=1)
    log = slurm.log(job)
    assert "requeued: 1 of at most 10" in log
    for fact in (f"job_id={job}", "restart_count=0", "restart_count=1", "nodes=n[1-2]", "tasks=2", "end_time=1"):
        assert fact in log


@pytest.mark.slow
def test_a_time_limit_is_a_requeue(slurm: SlurmJobs, tmp_path: Path) -> None:
    """One minute, the shortest: SLURM looks twice a minute and may signal a minute early, so it does in each life."""
    config = write_config(tmp_path, **LONG)
    assert run(command(config, tmp_path / "undisturbed")).returncode == 0
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@10")
    job = submit(slurm, tmp_path, "cpu.sbatch", config.name, options=options)
    assert_finished(slurm, job, tmp_path / "runs" / "small", tmp_path / "undisturbed")
    assert "SIGUSR1 at " in slurm.log(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "tasks"), [("train.sbatch", "--ntasks=2"), ("train_torchrun.sbatch", "--ntasks-per-node=1")]
)
def test_a_job_for_gpus_is_preempted_and_goes_on(
    file: str, tasks: str, slurm: SlurmJobs, tmp_path: Path, undisturbed: Path
) -> None:
    """The GPUs exist for SLURM alone; the ranks compute on the CPU."""
    config = write_config(tmp_path, **ENOUGH)
    # one rank a node, and all of the node, so that the urgent job needs its place
    options = ("--exclusive", "--nodes=2", tasks, "--cpus-per-task=8", "--mem-per-cpu=1000")
    job = submit(slurm, tmp_path, file, config.name, options=options, NPROC="1")
    wait_for_rounds(slurm, job, tmp_path / "runs" / "small", 3)
    urgent = slurm.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 3",
    )
    assert slurm.wait_for_end(urgent)["JobState"] == "COMPLETED"
    assert summary(tmp_path / "runs" / "small")["status"] in ("preempted", "running")
    assert_finished(slurm, job, tmp_path / "runs" / "small", undisturbed, restarts=1)


@pytest.mark.slow
def test_a_lost_rank_is_a_restart_within_the_job(slurm: SlurmJobs, tmp_path: Path, undisturbed: Path) -> None:
    config = write_config(tmp_path, **ENOUGH)
    job = submit(slurm, tmp_path, "cpu.sbatch", config.name, options=TWO_NODES)
    wait_for_rounds(slurm, job, tmp_path / "runs" / "small", 3)
    slurm.kill_task(job, 1)
    assert_finished(slurm, job, tmp_path / "runs" / "small", undisturbed, restarts=0)
    assert len(re.findall(r"restart 1 of 3: a rank was lost; \d+ s lost since checkpoint round-", slurm.log(job))) == 1
    # chains of jobs: a finished run is done at once
    again = submit(slurm, tmp_path, "cpu.sbatch", config.name, options=TWO_NODES)
    assert slurm.wait_for_end(again)["JobState"] == "COMPLETED"


# --- who is requeued, with a stand-in for the program


def test_requeues_have_a_limit(slurm: SlurmJobs, tmp_path: Path) -> None:
    variables = {"PYTHON": FAKE, "STARTS": "75", "MAX_REQUEUES": "1"}
    job = submit(slurm, tmp_path, "cpu.sbatch", "digits", options=SMALL_TASKS, **variables)
    fields = slurm.wait_for_end(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "1")
    log = slurm.log(job)
    assert log.count("requeued: 1 of at most 1\n") == 1
    assert "not requeued: it was 1 times, the limit MAX_REQUEUES is 1" in log


@pytest.mark.parametrize(("code", "starts"), [("64", 1), ("76", 3)])
def test_a_failure_is_no_requeue(code: str, starts: int, slurm: SlurmJobs, tmp_path: Path) -> None:
    variables = {"PYTHON": FAKE, "STARTS": code, "MAX_RESTARTS": "2"}
    job = submit(slurm, tmp_path, "cpu.sbatch", "digits", options=SMALL_TASKS, **variables)
    fields = slurm.wait_for_end(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert slurm.log(job).count("fake: start") == starts
    assert f"exit_code={code} seconds=" in slurm.log(job)


def test_a_job_that_its_user_cancels_is_not_requeued(slurm: SlurmJobs, tmp_path: Path) -> None:
    variables = {"PYTHON": FAKE, "ROUNDS": "1000"}
    job = submit(slurm, tmp_path, "cpu.sbatch", "digits", options=SMALL_TASKS, **variables)
    wait_for_file(slurm, job, tmp_path / "runs" / "digits" / "round")
    slurm.call("scancel", job)
    fields = slurm.wait_for_end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    slurm.wait(job, lambda _: "not requeued: the job was cancelled" in slurm.log(job), 15, "through")
    assert summary(tmp_path / "runs" / "digits")["exit_code"] == 75
    time.sleep(1)
    assert slurm.job(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(("content", "requeued"), [("", False), ("by me", False), ("requeue", True)])
def test_a_run_that_somebody_stops_is_not_requeued(
    content: str, requeued: bool, slurm: SlurmJobs, tmp_path: Path
) -> None:
    variables = {"PYTHON": FAKE, "ROUNDS": "1000", "MAX_REQUEUES": "3"}
    job = submit(slurm, tmp_path, "cpu.sbatch", "digits", options=SMALL_TASKS, **variables)
    wait_for_file(slurm, job, tmp_path / "runs" / "digits" / "round")
    (tmp_path / "runs" / "digits" / "stop").write_text(f"{content}\n" if content else "")
    if requeued:
        fields = slurm.wait(job, lambda fields: fields["Restarts"] == "1", 20, "requeued")
        slurm.call("scancel", job)
    else:
        fields = slurm.wait_for_end(job)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "0")
        assert "not requeued: somebody left the file runs/digits/stop" in slurm.log(job)


def test_an_array_runs_a_line_of_a_table_each_and_requeues_one_element_alone(slurm: SlurmJobs, tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("# settings\n\nfast --train.learning_rate=0.1\n\n--train.rounds=3 --seed=5\n")
    variables = {"PYTHON": FAKE, "SEEDS": "0 1", "ROUNDS": "10"}
    options = ("--array=1-5%3", "--mem-per-cpu=100")
    job = submit(
        slurm, tmp_path, "sweep.sbatch", "digits", "table.txt", "--pace.window=4", options=options, **variables
    )
    runs = tmp_path / "runs" / "table"
    wait_for_file(slurm, f"{job}_2", runs / "2-seed0" / "round")
    (runs / "2-seed0" / "stop").write_text("requeue\n")
    states = {}
    for element in range(1, 6):
        fields = slurm.wait_for_end(f"{job}_{element}")
        states[element] = (fields["JobState"], fields["Restarts"])
    assert states == {element: ("COMPLETED", "1" if element == 2 else "0") for element in range(1, 6)}
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == [
        "2-seed0",
        "2-seed1",
        "fast-seed0",
        "fast-seed1",
    ]
    assert all(json.loads((path / "summary.json").read_text())["status"] == "finished" for path in runs.glob("*/"))
    command_line = "run digits --run-dir runs/table/fast-seed1 --pace.window=4 --train.learning_rate=0.1 --seed=1"
    assert f"-m fedfreeze {command_line} --name=fast-seed1\n" in slurm.log(f"{job}_3")
    assert f"array={job}_2 restart_count=1" in slurm.log(f"{job}_2")
    assert "nothing to do: element 5 is none of this sweep's 4" in slurm.log(f"{job}_5")
