"""What SLURM answers when it is asked, and what is made of its silence."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.comm import slurm
from fedfreeze.comm.slurm import first_node, job_has_ended, node_address, seconds_left
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from fedfreeze.storage import run_folder
from fedfreeze.storage.run_folder import RunFolder
from tests.support.checks import assert_one_line
from tests.support.slurm_fixture import SlurmJobs
from tests.support.slurm_fixture import slurm as cluster

__all__ = ["cluster"]

Answer = Callable[..., None]
SILENCE = [FileNotFoundError(), subprocess.TimeoutExpired("squeue", 20), "fails"]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Have SLURM's commands answer so, instead of being run."""

    def answer(given: str | Exception, error: str = "") -> None:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            if isinstance(given, Exception):
                raise given
            return subprocess.CompletedProcess(command, int(given == "fails" or bool(error)), given, error)

        monkeypatch.setattr(slurm.subprocess, "run", run)
        monkeypatch.setattr(slurm.time, "time", lambda: 1_000_000.0)

    return answer


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[008-011,020],login1", "gpu008"),
        ("a,b,c", "a"),
        ("rack[3]-node,x", "rack3-node"),
        ("c1-[07,09]-ib", "c1-07-ib"),
    ],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@given(
    prefix=st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z]", fullmatch=True),
    numbers=st.lists(st.integers(0, 999), min_size=1, max_size=5),
    width=st.integers(1, 4),
)
def test_first_node_property(prefix: str, numbers: list[int], width: int) -> None:
    names = [f"{number:0{width}d}" for number in numbers]
    assert first_node(f"{prefix}[{','.join(names)}]") == f"{prefix}{names[0]}"
    assert first_node(",".join(f"{prefix}{name}" for name in names)) == f"{prefix}{names[0]}"


def test_a_list_that_names_no_node() -> None:
    with pytest.raises(ConfigError) as caught:
        first_node("")
    assert_one_line(caught.value, "set MASTER_ADDR")


def test_address_is_what_slurm_says(answer: Answer) -> None:
    answer("NodeName=n7 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=vm Version=22\n")
    assert node_address("n7") == "10.1.2.3"


@pytest.mark.parametrize("silence", [*SILENCE, "", "nothing"])
def test_address_is_the_name_where_slurm_is_silent(answer: Answer, silence: str | Exception) -> None:
    answer(silence)
    assert node_address("n7") == "n7"


def test_seconds_left_from_the_environment(answer: Answer) -> None:
    answer("fails")
    assert seconds_left({"SLURM_JOB_END_TIME": "1000060"}) == 60
    assert seconds_left({}) == math.inf
    assert seconds_left({"SLURM_JOB_END_TIME": "Unknown"}) == math.inf


def test_seconds_left_by_asking(answer: Answer) -> None:
    answer("1000090\n")
    assert seconds_left({"SLURM_JOB_ID": "12"}) == 90


@pytest.mark.parametrize("silence", [*SILENCE, "", "NONE\n"])
def test_no_end_is_known_where_slurm_is_silent(answer: Answer, silence: str | Exception) -> None:
    answer(silence)
    assert seconds_left({"SLURM_JOB_ID": "12"}) == math.inf


def test_job_has_ended(answer: Answer) -> None:
    for states, ended in (("COMPLETED\n", True), ("RUNNING\n", False), ("FAILED\nRUNNING\n", False), ("PENDING", True)):
        answer(states)
        assert job_has_ended("12") is ended
    answer("", "slurm_load_jobs error: Invalid job id specified")
    assert job_has_ended("12")


@pytest.mark.parametrize("silence", SILENCE)
def test_a_job_that_nothing_is_known_of_may_still_run(answer: Answer, silence: str | Exception) -> None:
    answer(silence)
    assert not job_has_ended("12")
    assert not job_has_ended(None)


def test_the_lock_of_a_job_that_has_ended_on_another_node_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the loss of a node: the job that goes on is another one, on another host."""
    lock = tmp_path / "lock"
    lock.write_text('{"host": "n77", "pid": 1, "started": "1", "job": "12"}')
    monkeypatch.setattr(run_folder, "job_has_ended", lambda job: False)
    with pytest.raises(ConfigError, match=r"locked by pid 1 on n77 \(job 12\)"):
        RunFolder(tmp_path).open(Config())
    monkeypatch.setattr(run_folder, "job_has_ended", lambda job: job == "12")
    folder = RunFolder(tmp_path)
    assert folder.open(Config()) == ["took over the lock of pid 1 on n77, which is gone"]
    folder.close()


def test_a_real_slurm(cluster: SlurmJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep 600\n")
    job = cluster.submit(script, options=["--time=3", "--nodes=1"], cwd=tmp_path)
    cluster.wait(job, lambda fields: fields["JobState"] == "RUNNING", 30, "running")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert 60 < seconds_left({"SLURM_JOB_ID": job}) <= 180
    assert not job_has_ended(job)
    assert job_has_ended("987654")
    assert node_address("n1") == "127.0.0.1"
    cluster.call("scancel", job)
    cluster.wait_for_end(job, 30)
    assert job_has_ended(job)
