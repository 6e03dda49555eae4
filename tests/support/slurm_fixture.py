"""The fixture `slurm`: a real SLURM of two emulated nodes for a test session, and what tests do with its jobs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.checks import ROOT
from tests.support.launching import ENVIRONMENT
from tests.support.local_slurm import LocalSlurm, environment_of, missing_packages

ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)


class SlurmJobs(LocalSlurm):
    """The cluster, with its jobs and their logs."""

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Submit a batch script from the folder `cwd` and return the job's id."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """Return the fields of a job, or of every element of an array, as `scontrol show job` names them."""
        lines = self.call("scontrol", "-o", "show", "job", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job: JobState, Restarts, ExitCode, StdOut and more."""
        return self.jobs(job)[0]

    def wait(self, job: str, reached: Callable[[dict[str, str]], bool], timeout_s: float, what: str) -> dict[str, str]:
        """Poll until a job's fields are as wanted and return them. Raises TimeoutError with its log."""
        deadline = time.monotonic() + timeout_s
        while not reached(fields := self.job(job)):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job} is {fields['JobState']} after {timeout_s} s, not {what}\n{self.log(job)}"
                )
            time.sleep(0.2)
        return fields

    def wait_for_end(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good, its requeues included (`sbatch --wait` would look ever more rarely)."""
        return self.wait(job, lambda fields: fields["JobState"] in ENDED, timeout_s, "ended")

    def log(self, job: str) -> str:
        """Return what a job has written so far, over all its lives."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def kill_task(self, job: str, number: int) -> None:
        """Kill a task of a job as the kernel would when memory is short."""
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={number}"}
        tasks = [pid for pid in self.processes() if wanted <= set(environment_of(pid))]
        assert tasks, f"job {job} has no task {number}"
        for pid in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmJobs]:
    """A cluster of two nodes for this test session (each worker of pytest-xdist has its own)."""
    if missing := missing_packages():
        pytest.skip(f"there is no SLURM here; on Debian: apt-get install --no-install-recommends {' '.join(missing)}")
    # not below pytest's own folder: the path of a socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="fedfreeze-slurm-"))
    cluster = SlurmJobs(folder)
    # outlives this session, even one that is killed, just long enough to stop the cluster's jobs
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.support.local_slurm", "guard"],
        cwd=ROOT,
        env=ENVIRONMENT | {"FEDFREEZE_LOCAL_SLURM": str(folder)},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        cluster.start(die_with_us=True)
        yield cluster
    finally:
        cluster.stop()
        left = cluster.processes()
        shutil.rmtree(folder, ignore_errors=True)
        guard.communicate(timeout=60)
    assert not left, f"processes were left behind: {left}"
