"""`fedfreeze doctor`: healthy under each launcher, every failure told with its exit code, nothing left behind."""

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfreeze.comm.launcher import Launch
from fedfreeze.config.schema import CommConfig, TrainConfig
from fedfreeze.doctor import judge, probes
from fedfreeze.doctor.findings import Finding, exit_code_of
from fedfreeze.errors import ExitCode
from fedfreeze.units import MIB
from tests.support.in_process import Outcome, attempt
from tests.support.launching import ENVIRONMENT, run, write_config
from tests.support.slurm_fixture import SlurmJobs

ONE_RANK = ["launcher", "ranks", "transport", "versions", "instructions", "device", "caps", "data", "run folder"]
ONE_RANK += ["wandb", "job"]
SEVERAL = [*ONE_RANK, "all-reduce", "heartbeat"]

# Ranks of --nproc are forked and so inherit what is spoilt here; each case runs in the one process that imports torch.
DRIVER = """
import multiprocessing, os, signal, sys
from fedfreeze.cli import main
from fedfreeze.comm.ranks import Ranks
from fedfreeze.doctor import probes, program
from fedfreeze.errors import UnavailableError

def on_rank_1(spoilt, usual):
    return lambda *values, **named: (
        spoilt if multiprocessing.current_process().name == "rank1" else usual)(*values, **named)

def spoil(place, name, make):
    usual = getattr(place, name)
    setattr(place, name, on_rank_1(make(usual), usual))
    return lambda: setattr(place, name, usual)

def no_device(wanted, local_rank):
    raise UnavailableError("no such device; use another")

def wrong(usual):
    def all_reduce(self, tensor):
        usual(self, tensor)
        if len(tensor) > 1000:
            tensor[7] += 1
    return all_reduce

def die(*values):
    os.kill(os.getpid(), signal.SIGKILL)

cases = {
    "healthy": lambda: None,
    "version": lambda: spoil(probes, "probe_process", lambda usual: lambda: usual() | {"torch": "1.0"}),
    "device": lambda: spoil(program, "choose_device", lambda usual: no_device),
    "sum": lambda: spoil(Ranks, "all_reduce", wrong),
    "lost": lambda: spoil(probes, "probe_caps", lambda usual: die),
}
out = os.dup(1)
for name, begin in cases.items():
    end = begin()
    with open(f"{name}.out", "w") as file:
        os.dup2(file.fileno(), 1)
        code = main(["doctor", "digits", "--data.cache_dir=cache", "--nproc", "2", "--ranks=2", "--json"])
    os.dup2(out, 1)
    print(name, code, flush=True)
    if end:
        end()
    program._SIZES = program._SIZES[:2]  # the others need not measure
"""


def doctor(folder: Path, *arguments: str, **environment: str) -> Outcome:
    """Run it on one rank in this process."""
    return attempt(folder, "doctor", *arguments, environment=environment)


def checks(text: str) -> dict[str, dict[str, Any]]:
    """Return the checks of the JSON object that was printed, by name."""
    return {check["check"]: check for check in json.loads(text)["checks"]}


def failed(text: str) -> list[str]:
    return [name for name, check in checks(text).items() if check["state"] == "FAILED"]


# --- one rank


def test_healthy_without_a_configuration_leaves_nothing_behind(tmp_path: Path) -> None:
    outcome = doctor(tmp_path, "--data.cache_dir=deep/cache", "--track.wandb=off")
    assert (outcome.code, outcome.err, outcome.changed) == (0, "", [])
    assert outcome.out.startswith("run: 11 checks by 1 rank in ")
    assert "nothing failed, " in outcome.out
    lines = outcome.out.splitlines()
    for name in ONE_RANK:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, outcome.out


def test_json_is_one_object_with_every_check(tmp_path: Path) -> None:
    outcome = doctor(tmp_path, str(write_config(tmp_path)), "--json", "--data.cache_dir=deep/cache")
    report = json.loads(outcome.out)
    assert (outcome.code, report["exit_code"], report["ranks"], report["launcher"]) == (0, 0, 1, "none")
    assert sorted(checks(outcome.out)) == sorted(ONE_RANK)
    assert all(check["advice"] or check["state"] == "ok" for check in report["checks"])
    assert set(outcome.changed) <= {"small.yaml"}


BAD = {
    "number of ranks": (64, "launcher", "--ranks expects 3", ["--ranks=3"]),
    "run folder under a file": (74, "run folder", "Not a directory", ["--run-dir=small.yaml/run"]),
    "run folder in /proc": (74, "run folder", "cannot use run folder /proc/run", ["--run-dir=/proc/run"]),
    "run folder of another run": (64, "run folder", "holds another run: seed was 0 and is now 1", ["--seed=1"]),
    "data folder": (74, "data", "cannot write decoded data to /proc/x", ["--data.cache_dir=/proc/x"]),
    "data": (65, "data", "data.path nowhere is not a folder", ["--data.path=nowhere"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_told_with_its_exit_code(case: str, tmp_path: Path) -> None:
    code, check, says, options = BAD[case]
    if case == "run folder of another run":
        (tmp_path / "runs" / "small").mkdir(parents=True)
        config = doctor_config(tmp_path, "--data.cache_dir=cache")
        (tmp_path / "runs" / "small" / "config.yaml").write_text(config)
    write_config(tmp_path)
    outcome = doctor(tmp_path, "small.yaml", "--json", "--data.cache_dir=cache", *options)
    assert (outcome.code, outcome.err, outcome.changed) == (code, "", [])
    assert failed(outcome.out) == [check]
    assert says in checks(outcome.out)[check]["found"]
    assert checks(outcome.out)[check]["advice"]


def doctor_config(folder: Path, *overrides: str) -> str:
    from fedfreeze.config.file import dump_config, load_config

    return dump_config(load_config(str(write_config(folder)), overrides))


def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    from fedfreeze.config.file import load_config
    from fedfreeze.storage.run_folder import RunFolder

    config = load_config(str(write_config(tmp_path)))
    folder = RunFolder(tmp_path / "run")
    folder.open(config)
    outcome = doctor(tmp_path, "small.yaml", "--run-dir=run", "--json", "--data.cache_dir=cache")
    folder.close()
    assert (outcome.code, failed(outcome.out), outcome.changed) == (64, ["run folder"], [])
    assert "is in use by pid" in checks(outcome.out)["run folder"]["found"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_missing(tmp_path: Path) -> None:
    outcome = doctor(tmp_path, "--json", "--train.device=cuda", "--data.cache_dir=cache")
    assert (outcome.code, failed(outcome.out)) == (69, ["device", "caps"])
    assert "torch finds no CUDA device" in checks(outcome.out)["device"]["found"]


@pytest.mark.parametrize("installed", [False, True])
def test_mpi_that_is_missing_ends_in_one_line(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the ranks can talk there is no table."""
    usual = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("mpi4py"):
            raise ImportError("libmpi.so.40: cannot open shared object file")
        return usual(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = doctor(tmp_path, "--comm.transport=mpi")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (69, "", 1)
    assert ("libmpi.so.40" if installed else "mpi4py is not installed") in outcome.err


def test_wandb_that_is_wanted_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = doctor(tmp_path, "--json", "--track.wandb=offline", "--data.cache_dir=cache")
    assert (outcome.code, failed(outcome.out)) == (69, ["wandb"])
    assert "pip install" in checks(outcome.out)["wandb"]["advice"]
    outcome = doctor(tmp_path, "--json", "--data.cache_dir=cache")
    assert (outcome.code, checks(outcome.out)["wandb"]["state"]) == (0, "ok")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_key_of_wandb_is_looked_for_and_never_shown(tmp_path: Path) -> None:
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    online = ("--track.wandb=online", "--data.cache_dir=cache")
    secret = "0123456789" * 4
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {secret}\n")
    for environment in ({"WANDB_API_KEY": secret}, {"NETRC": str(tmp_path / "netrc")}):
        outcome = doctor(tmp_path, "--json", *online, **server, **environment)
        assert secret not in outcome.out + outcome.err
        found = checks(outcome.out)["wandb"]
        assert (outcome.code, found["state"], found["facts"]["key"]) == (0, "warning", True)
        assert "does not answer" in found["found"]
    outcome = doctor(tmp_path, "--json", *online, **server)
    assert checks(outcome.out)["wandb"]["facts"]["key"] is False
    assert "no key for 127.0.0.1" in checks(outcome.out)["wandb"]["found"]
    outcome = doctor(tmp_path, "--json", *online, **server, WANDB_MODE="disabled")
    assert checks(outcome.out)["wandb"]["facts"]["mode"] == "off"


def test_a_check_that_breaks_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "seconds_left", lambda environment: 1 / 0)
    outcome = doctor(tmp_path, "--json", "--data.cache_dir=cache")
    assert (outcome.code, outcome.err, failed(outcome.out)) == (70, "", ["job"])
    assert "ZeroDivisionError" in checks(outcome.out)["job"]["found"]


def test_caps_that_do_not_hold_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfreeze.device.cap import TensorByteCounter

    monkeypatch.setattr(TensorByteCounter, "_check", lambda self, operation: None)
    outcome = doctor(tmp_path, "--json", "--data.cache_dir=cache")
    assert (outcome.code, failed(outcome.out)) == (69, ["caps"])
    assert "passed under a cap of" in checks(outcome.out)["caps"]["found"]


@pytest.mark.parametrize("arguments", [["--nonsense"], ["digits", "--train.nonsense=1"], ["--nproc=2", "--ranks=x"]])
def test_usage_mistakes_are_one_line(arguments: list[str], tmp_path: Path) -> None:
    outcome = doctor(tmp_path, *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (64, "", 1)


# --- several ranks


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each case of DRIVER."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "driver.py").write_text(DRIVER)
    with contextlib.chdir(folder):
        done = run([sys.executable, "driver.py"], timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    left = sorted(path.name for path in folder.iterdir() if path.suffix not in (".out", ".py"))
    assert left == []
    codes = dict(line.split() for line in done.stdout.splitlines())
    return {name: (int(code), (folder / f"{name}.out").read_text()) for name, code in codes.items()}


def test_healthy_with_two_ranks(several: dict[str, tuple[int, str]]) -> None:
    code, out = several["healthy"]
    found = checks(out)
    assert (code, failed(out), sorted(found)) == (0, [], sorted(SEVERAL))
    assert [record["host"] for record in found["ranks"]["facts"]["by_rank"]] == [os.uname().nodename] * 2
    sizes = found["all-reduce"]["facts"]["sizes"]
    assert [size["bytes"] for size in sizes][:2] == [8, 2**17]
    assert all(size["seconds"] > 0 for size in sizes)
    assert len(found["caps"]["facts"]["by_rank"]) == 2


@pytest.mark.parametrize(
    ("case", "code", "check", "says"),
    [
        ("version", 69, "versions", "rank 1 on {host}: python"),
        ("device", 69, "device", "rank 1 on {host}: no such device"),
        ("sum", 69, "all-reduce", "wrong sum on rank 1"),
        ("lost", 76, "lost", "rank 1 on {host} (pid "),
    ],
)
def test_what_one_rank_lacks_is_told_with_rank_and_host(
    case: str, code: int, check: str, says: str, several: dict[str, tuple[int, str]]
) -> None:
    assert several[case][0] == code
    assert failed(several[case][1])[0] == check
    assert says.format(host=os.uname().nodename) in checks(several[case][1])[check]["found"]


def test_a_rank_that_never_came_is_told(tmp_path: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29871"}
    with contextlib.chdir(tmp_path):
        done = run([sys.executable, "-m", "fedfreeze", "doctor", "--comm.join_s=1"], 120, ENVIRONMENT | alone)
    assert (done.returncode, done.stdout) == (76, "")
    assert "fedfreeze: error: rank 1 of 2 did not join within 1 s" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun; on Debian: apt-get install openmpi-bin")
def test_under_mpirun(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=60).stdout
    options = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in said else []
    program = [sys.executable, "-m", "fedfreeze", "doctor", "--comm.transport=mpi", "--json", "--ranks=2"]
    done = run(["mpirun", "-n", "2", *options, *program, f"--run-dir={tmp_path}/run"])
    assert done.returncode == 0, done.stderr
    found = checks(done.stdout)
    assert sorted(found) == sorted(SEVERAL)
    assert found["transport"]["facts"]["backend"] == "mpi"
    assert found["launcher"]["facts"]["launcher"] == "mpirun"


@pytest.mark.slow
def test_under_srun_on_two_nodes(slurm: SlurmJobs, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "fedfreeze", "doctor", "--json", "--ranks=2"]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=2", "--time=10", *program],
        cwd=tmp_path,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = checks(done.stdout)
    assert (found["launcher"]["facts"]["launcher"], found["launcher"]["facts"]["ranks"]) == ("srun", 2)
    job = found["job"]["facts"]
    assert (job["restarts"], found["job"]["state"]) == (0, "ok")
    assert 300 < job["seconds_left"] < 700


# --- what is made of what was found

CPU = {"kind": "cpu", "gpus_of_job": 0}


def gpu(uuid: str, name: str = "NVIDIA X") -> dict[str, Any]:
    return {"kind": "cuda", "index": 0, "name": name, "memory_bytes": 80 * 2**30, "uuid": uuid}


def records(*devices: dict[str, Any], hosts: int = 1, **same: Any) -> list[dict[str, Any]]:
    usual = {"pid": 1, "cores": [0, 1], "instructions": "AVX2"}
    return [
        usual | same | {"rank": rank, "host": f"n{rank * hosts // len(devices)}", "device": device}
        for rank, device in enumerate(devices)
    ]


@pytest.mark.parametrize(
    ("devices", "state", "says"),
    [
        ([CPU, CPU], "ok", "cpu"),
        ([gpu("a"), gpu("b")], "ok", "rank 0 on n0: cuda:0, NVIDIA X, 80.0 GiB, a; rank 1 on n0: cuda:0"),
        ([gpu("a"), gpu("a")], "warning", "ranks 0-1 on n0: cuda:0"),
        ([gpu("a"), CPU], "warning", "rank 1 on n0: cpu"),
        ([gpu("a"), gpu("b", "NVIDIA Y")], "warning", "NVIDIA Y"),
        ([CPU, CPU | {"gpus_of_job": 4}], "warning", "cpu, though rank 1 on n0 has GPUs in its job"),
    ],
)
def test_devices(devices: list[dict[str, Any]], state: str, says: str) -> None:
    found = judge.judge_devices(records(*devices), TrainConfig())
    assert (found.state, exit_code_of([found])) == (state, 0)
    assert says in found.found


@pytest.mark.parametrize(
    ("ranks", "hosts", "threads", "state", "says"),
    [
        (2, 1, 1, "ok", "n0: ranks 0-1 on 2 cores"),
        (4, 2, 1, "ok", "n0: ranks 0-1 on 2 cores; n1: ranks 2-3 on 2 cores"),
        (4, 1, 1, "warning", "too many for n0: 4 threads on 2 cores"),
        (1, 1, 4, "warning", "rank 0 on n0: fewer cores than the 4 of train.threads_per_rank"),
        (24, 12, 1, "ok", "and 4 more (--json has all)"),
    ],
)
def test_cores(ranks: int, hosts: int, threads: int, state: str, says: str) -> None:
    found = judge.judge_ranks(records(*[CPU] * ranks, hosts=hosts), threads)
    assert found.state == state
    assert says in found.found


def test_bound_ranks_show_their_share() -> None:
    bound = [record | {"cores": [record["rank"]]} for record in records(CPU, CPU)]
    assert judge.judge_ranks(bound, 1).found == "n0: ranks 0-1 on 2 cores, 1 each"


def test_instruction_sets_that_differ_are_a_warning() -> None:
    found = records(CPU, CPU, hosts=2)
    assert judge.judge_instructions(found).state == "ok"
    found[1]["instructions"] = "AVX512"
    assert judge.judge_instructions(found).state == "warning"
    assert "rank 1 on n1: AVX512" in judge.judge_instructions(found).found


def test_a_slow_network_is_a_warning_only_between_hosts() -> None:
    sizes = [{"bytes": 8, "seconds": 1e-3}, {"bytes": 64 * MIB, "seconds": 2.0}]
    assert judge.judge_all_reduce(sizes, [], hosts=1).state == "ok"
    slow = judge.judge_all_reduce(sizes, [], hosts=2)
    assert slow.state == "warning"
    assert "64 MiB in 2 s (32 MiB/s)" in slow.found


def test_who_was_lost_is_told() -> None:
    lost = judge.judge_lifeline([None, "rank 1 on n1 has died"], CommConfig())
    assert (lost.exit_code, lost.found) == (76, "rank 1 on n1 has died")


def test_hub_data_that_is_not_there_is_a_warning_but_read_only_data_is_fine() -> None:
    there = {"folder": "c", "prepared": True, "from_hub": True}
    absent = {"folder": "c", "prepared": False, "from_hub": True, "free_bytes": 2**40}
    ranks = records(CPU, CPU, hosts=2, data=there)
    assert judge.judge_data(ranks, "cifar10").state == "ok"
    ranks[1]["data"] = absent
    found = judge.judge_data(ranks, "cifar10")
    assert (found.state, found.found[:45]) == ("warning", "cifar10 is not decoded yet for rank 1 on n1; ")


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        ({"job": None}, "ok", "no SLURM job"),
        (
            {"job": "7", "seconds_left": 7000.0, "restarts": 2},
            "ok",
            "SLURM job 7, restarted 2 times, ends in 116.7 min",
        ),
        ({"job": "7", "seconds_left": 100.0}, "warning", "ends in 100 s"),
        ({"job": "7"}, "ok", "no end is set"),
        ({"job": "7", "asked": False}, "warning", "nothing tells when it ends"),
        ({"job": "7", "asked": False, "time_limit_s": 60.0}, "ok", "checkpoint.time_limit_s ends the run after 60 s"),
    ],
)
def test_job(facts: dict[str, Any], state: str, says: str) -> None:
    usual = {"seconds_left": None, "restarts": 0, "time_limit_s": None, "grace_s": 90.0, "asked": True}
    found = judge.judge_job(usual | facts)
    assert found.state == state
    assert says in found.found


def test_little_space_and_missing_locks_are_warnings() -> None:
    good = {"folder": "runs/x", "status": None, "free_bytes": 2**40, "sync_s": 0.001, "locks": True}
    assert judge.judge_run_folder(good, "n0").state == "ok"
    assert "little space" in judge.judge_run_folder(good | {"free_bytes": 2**20}, "n0").advice
    assert "no locks" in judge.judge_run_folder(good | {"locks": False}, "n0").advice
    assert "holds this run, running" in judge.judge_run_folder(good | {"status": "running"}, "n0").found


def test_locks_that_a_file_system_lacks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.try_folder(tmp_path / "a" / "b", "use")["locks"] is True
    monkeypatch.setattr("fcntl.flock", lambda descriptor, how: None)
    assert probes.try_folder(tmp_path / "a" / "b", "use")["locks"] is False
    assert list(tmp_path.iterdir()) == []


def test_the_first_failure_gives_the_exit_code() -> None:
    findings = [Finding("a", "x", "y"), Finding("b", "x", "y", 74), Finding("c", "x", "y", 64)]
    assert [finding.state for finding in findings] == ["warning", "FAILED", "FAILED"]
    assert exit_code_of(findings) == ExitCode.STORAGE
    assert judge.judge_launch(Launch("srun", 0, 4), 2, 4).state == "ok"
    wrong = judge.judge_launch(Launch("srun", 0, 4), 2, 8)
    assert (wrong.exit_code, wrong.advice) == (64, "see --ntasks and --nodes of sbatch and srun (`srun --ntasks=8`)")
