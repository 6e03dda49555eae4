"""Starts fedfreeze as its users do, and reads what it leaves behind."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.preloaded import Preloaded, start_preloaded

# Small enough for a launch to cost little, with everything in it: caps that hold some stages of some devices only,
# a device without samples is likely, two frozen blocks, and stages that end at different rounds.
SMALL = {
    "name": "small",
    "data": {"name": "digits", "alpha": 0.3},
    "model": {"name": "resnet8", "width": 8},
    "fleet": {"devices": 24, "memory_cap_mib": [0.33, 0.4, 0.6, 0.9]},
    "train": {"rounds": 16, "participants": 6, "local_epochs": 1, "batch_size": 16, "learning_rate": 0.05},
    "pace": {"policy": "perturbation", "window": 3, "slope_window": 2, "checks": 1, "slope_limit": 0.5},
    "eval": {"every_rounds": 4},
}

# As root, as in a container, Open MPI wants to be told; and more ranks than cores.
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]

# Survivors of a lost rank leave by themselves and say why; what does not, SLURM ends after a while.
SRUN = ["srun", "--kill-on-bad-exit=0", "--wait=10"]

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="there is no mpirun here; on Debian: apt-get install openmpi-bin"
)

ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def write_config(folder: Path, **sections: Any) -> Path:
    """Write SMALL, with changes by section, as a YAML file."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change  # type: ignore[operator]
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(config: Path, run_dir: Path, *options: str, ranks: int = 1, by: str = "nproc") -> list[str]:
    """Return the command line of a run, started by `nproc`, `torchrun`, `mpirun` or `srun 2` (over two nodes)."""
    program = ["-m", "fedfreeze", "run", str(config), "--run-dir", str(run_dir), *options]
    launcher, _, nodes = by.partition(" ")
    if launcher == "torchrun":
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [*agent, *program]
    if launcher == "mpirun":
        return [*MPIRUN, "-n", str(ranks), sys.executable, *program]
    if launcher == "srun":
        pmix = ["--mpi=pmix"] if "--comm.transport=mpi" in options else []
        return [*SRUN, *pmix, f"--nodes={nodes or 1}", f"--ntasks={ranks}", sys.executable, *program]
    return [sys.executable, *program, "--nproc", str(ranks)]


# What tests wait for, signal and read.
Process = subprocess.Popen[str] | Preloaded

# A Python program that starts so needs no start of its own: see preloaded.py.
PRELOADED = (["-m", "fedfreeze"], ["-c"])


def run(
    arguments: list[str], timeout_s: float = 240, environment: dict[str, str] | None = None, *, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end; a run that hangs is killed with all its ranks and fails the test."""
    process = start(arguments, environment, fresh=fresh)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def start(arguments: list[str], environment: dict[str, str] | None = None, *, fresh: bool = False) -> Process:
    """Start in a process group of its own; `fresh`: with an interpreter of its own, whose imports are waited for."""
    program, *rest = arguments
    is_file = rest[:1] and rest[0].endswith(".py")
    if program == sys.executable and (is_file or any(rest[: len(begin)] == begin for begin in PRELOADED)) and not fresh:
        return start_preloaded(rest, environment or ENVIRONMENT)
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment or ENVIRONMENT,
        start_new_session=True,
    )


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Return rank -> process of the ranks that torchrun, mpirun or srun has started for a run folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if str(run_dir).encode() not in arguments or arguments[1:3] not in ([b"-m", b"fedfreeze"], [b"-u", b"-m"]):
                continue
            lines = (process / "environ").read_bytes().split(b"\0")
            variables = dict(line.split(b"=", 1) for line in lines if b"=" in line)
            for name in (b"RANK", b"OMPI_COMM_WORLD_RANK", b"SLURM_PROCID"):
                if name in variables:
                    found[int(variables[name])] = int(process.name)
                    break
    return found


def is_gone(process: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def kill_tree(process: Process, signal_number: int = signal.SIGKILL) -> None:
    """Send a signal to a run and all its ranks at once."""
    os.killpg(process.pid, signal_number)
    process.communicate(timeout=60)


def rounds_done(run_dir: Path) -> int:
    """Return how many rounds metrics.jsonl holds."""
    return sum(record["kind"] == "round" for record in metrics(run_dir))


def wait_for_round(process: Process, run_dir: Path, number: int, timeout_s: float = 120) -> bool:
    """Wait until a round is done; False if the run ended before."""
    deadline = time.monotonic() + timeout_s
    while rounds_done(run_dir) < number:
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"round {number} was not reached in {timeout_s} s")
        time.sleep(0.01)
    return True


def sha256(run_dir: Path) -> str:
    """Return the sha256 of the deployed network."""
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def summary(run_dir: Path) -> dict[str, Any]:
    """Return summary.json."""
    return json.loads((run_dir / "summary.json").read_text())  # type: ignore[no-any-return]


# What rounds tell of the machine, not of the experiment.
OF_THE_MACHINE = ("wall_s", "imbalance", "parts_s", "parts_processor_s")


def without_wall_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of rounds and stages, less what may differ between two runs of the same experiment."""
    return [
        {key: value for key, value in record.items() if key not in OF_THE_MACHINE}
        for record in records
        if record["kind"] in ("round", "stage")
    ]
