"""The scripts of launch/ and slurm/, with a stand-in for fedfreeze: restarts, signals, usage errors, their form."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.checks import ROOT
from tests.support.in_process import attempt
from tests.support.launching import (
    ENVIRONMENT,
    metrics,
    sha256,
    summary,
    wait_for_round,
    without_wall_time,
    write_config,
)

FAKE = ROOT / "tests" / "support" / "fake_fedfreeze.sh"
SOURCED = [ROOT / "launch" / f"{name}.sh" for name in ("environment", "local_start", "restart", "settings")]
SOURCED += [ROOT / "slurm" / "common.sh"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
BATCH = sorted((ROOT / "slurm").glob("*.sbatch"))
STARTED = [*(path for path in (ROOT / "launch").glob("*.sh") if path not in SOURCED), *BATCH, FAKE]

UNTIL_DONE = """
set -euo pipefail
FEDFREEZE_HOME=$1; shift
. "$FEDFREEZE_HOME/launch/restart.sh"
run_until_done run "$@"
"""


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# --- what the files must be


@pytest.mark.parametrize("script", [*SOURCED, *STARTED], ids=names([*SOURCED, *STARTED]))
def test_parses_and_says_what_it_is(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    first = lines[1] if lines[0] == "#!/usr/bin/env bash" else lines[0]
    assert re.match(r"# [A-Z].{20}", first)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("script", STARTED, ids=names(STARTED))
def test_started_scripts_are_executable_and_strict(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail\n" in script.read_text() or script == FAKE


@pytest.mark.parametrize("script", SOURCED, ids=names(SOURCED))
def test_sourced_scripts_are_not_executable(script: Path) -> None:
    assert not script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", BATCH, ids=names(BATCH))
def test_batch_files_have_one_block_for_the_site_and_survive_a_time_limit(script: Path) -> None:
    text = script.read_text()
    assert len(re.findall(r"^# --- edit for your site", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^# --- end of what to edit", text, re.MULTILINE)) == 1
    # SLURM reads options only up to the first command
    assert text.rindex("\n##SBATCH ") < text.index("set -euo pipefail")
    for option in ("--signal=B:USR1@120", "--requeue", "--open-mode=append", "--time="):
        assert f"\n#SBATCH {option}" in text
    # counts come from the allocation: no launcher is told a number
    commands = text[text.index("set -euo pipefail") :]
    assert not re.search(r"(--ntasks|--nodes|--nnodes|--nproc-per-node|--gpus)\S*[= ][0-9]", commands)
    assert not re.search(r"srun[^\n]* -[nN] *[0-9]", commands)


# --- run_until_done


def until_done(
    folder: Path, *command: str, script: str = UNTIL_DONE, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = command or (str(FAKE), "run", "digits", "--run-dir", "run")
    return subprocess.run(
        ["bash", "-c", script, "script", str(ROOT), *command],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def starts(folder: Path) -> int:
    return int((folder / "run.starts").read_text())


@pytest.mark.parametrize(
    ("words", "code", "number", "said"),
    [
        ("go", 0, 1, ""),
        ("64", 64, 1, ""),
        ("70", 70, 1, ""),
        ("75", 75, 1, ""),
        ("1", 1, 1, ""),  # torchrun, and the run folder was not opened
        ("130", 130, 1, ""),
        ("65-in-the-folder", 65, 1, ""),  # torchrun says 1
        ("75-in-the-folder", 75, 1, ""),
        ("lose go", 0, 2, "restart 1 of 3: a rank was lost; [01] s lost since checkpoint round-2"),
        ("76 lose go", 0, 3, "restart 2 of 3"),
        ("137 go", 0, 2, "restart 1 of 3: a rank was lost; there is no checkpoint, it begins anew"),
        ("76-in-the-folder", 76, 4, "not started again: it was 3 times, the limit MAX_RESTARTS"),
        ("lose", 76, 4, "not started again: it was 3 times, the limit MAX_RESTARTS"),
        ("lose 75", 75, 2, "restart 1 of 3"),
    ],
)
def test_a_lost_rank_is_a_restart_and_nothing_else_is(
    words: str, code: int, number: int, said: str, tmp_path: Path
) -> None:
    done = until_done(tmp_path, STARTS=words, ROUNDS="6")
    assert (done.returncode, starts(tmp_path)) == (code, number), done.stdout + done.stderr
    assert re.search(said, done.stdout)
    assert said or "restart" not in done.stdout


@pytest.mark.parametrize(("limit", "number"), [("0", 1), ("1", 2)])
def test_the_limit_of_restarts(limit: str, number: int, tmp_path: Path) -> None:
    done = until_done(tmp_path, STARTS="lose", MAX_RESTARTS=limit)
    assert (done.returncode, starts(tmp_path)) == (76, number)


@pytest.mark.parametrize("limit", ["many", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_told(limit: str, tmp_path: Path) -> None:
    done = until_done(tmp_path, MAX_RESTARTS=limit)
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1
    assert f"MAX_RESTARTS is '{limit}'" in done.stderr


@pytest.mark.parametrize("status", ["running", "finished", "preempted"])
def test_the_summary_of_a_former_start_is_not_believed(status: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    former = {"status": status, "exit_code": {"running": None, "finished": 0, "preempted": 75}[status]}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(former, indent=2) + "\n")
    assert until_done(tmp_path, STARTS="1").returncode == 1
    assert starts(tmp_path) == 1


def test_the_summary_that_the_program_writes_can_be_read(tmp_path: Path) -> None:
    """With its own writer, so that a change of the form is noticed."""
    from fedfreeze.storage.run_folder import RunFolder

    (tmp_path / "run").mkdir()
    values = {"status": "failed", "exit_code": 74, "stages": [{"status": "x", "exit_code": 1}], "wall_s": 1.5}
    RunFolder(tmp_path / "run").write_summary(values)
    script = '. "$1/launch/restart.sh"; summary_value run status; summary_value run exit_code; summary_value run none'
    assert until_done(tmp_path, script=script).stdout.split() == ["failed", "74"]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = until_done(tmp_path, "no-such-launcher")
    assert done.returncode == 127
    assert "restart" not in done.stdout


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=ENVIRONMENT | {"FOLDER_OF_TEST": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def of_the_test(folder: Path) -> list[int]:
    """Every process that was started for a test, wherever it has gone."""
    mark = f"FOLDER_OF_TEST={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark in path.read_bytes().split(b"\0") else []
        except OSError:
            continue
    return found


def assert_nobody_left(folder: Path) -> None:
    deadline = time.monotonic() + 5
    while left := of_the_test(folder):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes were left behind")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, 75),
        (signal.SIGUSR2, 75),
        (signal.SIGTERM, 75),
        (signal.SIGHUP, 75),
        (signal.SIGINT, 130),
    ],
)
def test_a_signal_is_passed_on_and_waited_for(number: int, code: int, tmp_path: Path) -> None:
    run = ["run", "digits", "--run-dir", "run"]
    process = start(tmp_path, "bash", "-c", UNTIL_DONE, "script", str(ROOT), str(FAKE), *run, ROUNDS="1000")
    wait_for(tmp_path / "run" / "round")
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    assert starts(tmp_path) == 1
    assert_nobody_left(tmp_path)


def test_a_rank_that_the_signal_kills_is_not_started_again(tmp_path: Path) -> None:
    """It had no handler yet: the job goes on later, from its last checkpoint."""
    process = start(tmp_path, "bash", "-c", UNTIL_DONE, "script", str(ROOT), "sleep", "100")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 76
    assert "restart" not in out
    assert_nobody_left(tmp_path)


def test_what_a_launcher_leaves_behind_is_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "bash", "-c", UNTIL_DONE, "script", str(ROOT), "bash", "-c", "sleep 100 & exit 64")
    assert process.wait(timeout=30) == 64
    assert_nobody_left(tmp_path)


# --- the run folder: the program says which it is, and the scripts ask it

NAMED = {
    "named.yaml": "seed: 1\nname: small  # of the test\n",
    "nameless.yaml": "seed: 1\n",
    "quoted.yaml": "name: 'a-name'  # quoted\n",
    "crlf.yaml": "name: foo\r\nseed: 1\r\n",
    "flow.yaml": "{name: flowing, seed: 1}\n",
    "spaced.yaml": "name :   wide\nseed: 1\n",
    "marked.yaml": "\ufeffname: marked\n",
    "nested.yaml": "data:\n  name: digits\n",
}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["digits"], "runs/digits"),
        (["digits", "--name=mine"], "runs/mine"),
        (["digits", "--name", "mine", "--seed=1"], "runs/mine"),
        (["digits", "--name=007"], "runs/007"),
        (["digits", "--run-dir", "here"], "here"),
        (["digits", "--run-dir=here", "--name=mine"], "here"),
        (["named.yaml"], "runs/small"),
        (["nameless.yaml"], "runs/nameless"),
        (["quoted.yaml"], "runs/a-name"),
        (["crlf.yaml"], "runs/foo"),
        (["flow.yaml"], "runs/flowing"),
        (["spaced.yaml"], "runs/wide"),
        (["marked.yaml"], "runs/marked"),
        (["nested.yaml"], "runs/nested"),
    ],
)
def test_the_program_says_which_its_run_folder_is(arguments: list[str], folder: str, tmp_path: Path) -> None:
    for name, text in NAMED.items():
        (tmp_path / name).write_bytes(text.encode())
    # in a job of several tasks too, where a run would ask for srun
    outcome = attempt(tmp_path, "run", *arguments, "--show-run-dir", environment={"SLURM_NTASKS": "2"} | JOB)
    assert (outcome.code, outcome.out, outcome.err, outcome.changed) == (0, f"{folder}\n", "", [])


def test_scripts_ask_the_program_for_the_run_folder_and_tell_what_it_tells(tmp_path: Path) -> None:
    (tmp_path / "crlf.yaml").write_bytes(NAMED["crlf.yaml"].encode())
    (tmp_path / "types.py").write_text("raise RuntimeError('not the types of Python')\n")
    words = ("2", "crlf.yaml", "--name=bar", "--seed=1")
    stubs = {"MPIRUN": stub(tmp_path, "HYDRA"), "PYTHON": sys.executable}
    told = call(tmp_path, "launch/mpirun.sh", *words, **stubs).stdout
    assert told.rstrip().endswith("-m fedfreeze run crlf.yaml --run-dir runs/bar --name=bar --seed=1")
    wrong = call(tmp_path, "launch/mpirun.sh", *words, "--sede=1", **stubs)
    assert (wrong.returncode, wrong.stdout) == (64, "")
    assert wrong.stderr.startswith("fedfreeze: error: unknown key sede; did you mean seed?; allowed: name, ")
    assert wrong.stderr.count("\n") == 1
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    site = {"FEDFREEZE_HOME": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    job = batch(tmp_path, "cpu", "crlf.yaml", **site, SLURM_NTASKS="2")
    assert "-m fedfreeze run crlf.yaml --run-dir runs/foo\n" in job.stdout


# --- torchrun.sh and mpirun.sh


def call(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHON": str(FAKE)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", ["launch/torchrun.sh", "launch/mpirun.sh"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 64, "CONFIG is missing"),
        (["2"], 64, "CONFIG is missing"),
        (["--seed=1", "digits"], 64, "CONFIG must come before '--seed=1'"),
        (["0", "digits"], 64, "RANKS is '0'"),
        (["--help"], 0, "RANKS"),
    ],
)
def test_usage(script: str, arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = call(tmp_path, script, *arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[0] if code else said in done.stdout
    assert f"bash {script} [RANKS] CONFIG" in done.stderr + done.stdout


def test_a_python_without_fedfreeze_is_told(tmp_path: Path) -> None:
    done = call(tmp_path, "launch/torchrun.sh", "digits", PYTHON="false")
    assert done.returncode == 69
    assert "false has no fedfreeze" in done.stderr


def stub(folder: Path, version: str) -> str:
    path = folder / "mpirun"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit\nprintf "%s " "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["mpirun (Open MPI) 4.1.4", "HYDRA build details: Version: 4.1"])
def test_mpirun_is_told_only_what_it_knows_and_what_was_asked(version: str, tmp_path: Path) -> None:
    plain = call(tmp_path, "launch/mpirun.sh", "3", "digits", MPIRUN=stub(tmp_path, version)).stdout
    assert plain.startswith("-n 3 ")
    assert plain.rstrip().endswith(f"{FAKE} -m fedfreeze run digits --run-dir runs/digits")
    assert "--oversubscribe" not in plain
    assert "as-root" not in plain
    asked = {"OVERSUBSCRIBE": "1", "MPIRUN_OPTIONS": "--hostfile hosts"}
    more = call(tmp_path, "launch/mpirun.sh", "3", "digits", MPIRUN=stub(tmp_path, version), **asked).stdout
    assert ("--oversubscribe" in more) == ("Open MPI" in version)
    assert " --hostfile hosts " in more


def test_an_mpirun_of_nobody_is_told(tmp_path: Path) -> None:
    done = call(tmp_path, "launch/mpirun.sh", "2", "digits", MPIRUN=stub(tmp_path, "unknown 1"))
    assert done.returncode == 69
    assert "neither Open MPI nor MPICH: unknown 1" in done.stderr


MPIRUN = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="there is no mpirun; on Debian: apt-get install openmpi-bin"
)


@pytest.fixture
def undisturbed(small_run: tuple[Path, Path]) -> Path:
    """A run of the tiny experiment with nothing in its way."""
    return small_run[1]


def launch(folder: Path, launcher: str, **environment: str) -> subprocess.Popen[str]:
    # more ranks than cores, and as root, as it may be in a container
    environment |= {"OVERSUBSCRIBE": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    script = str(ROOT / "launch" / f"{launcher}.sh")
    return start(folder, "bash", script, "2", "small.yaml", "--run-dir", "run", PYTHON=sys.executable, **environment)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        pytest.param("mpirun", signal.SIGUSR1, marks=[MPIRUN, pytest.mark.slow], id="mpirun USR1"),
        pytest.param("mpirun", signal.SIGTERM, marks=[MPIRUN, pytest.mark.slow], id="mpirun TERM"),
        pytest.param("torchrun", signal.SIGUSR1, marks=pytest.mark.slow, id="torchrun USR1"),
        pytest.param("torchrun", signal.SIGTERM, marks=pytest.mark.slow, id="torchrun TERM"),
    ],
)
def test_a_run_that_was_told_to_leave_goes_on_to_the_same_bits(
    launcher: str, number: int, tmp_path: Path, undisturbed: Path
) -> None:
    write_config(tmp_path)
    process = launch(tmp_path, launcher)
    assert wait_for_round(process, tmp_path / "run", 2)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert_nobody_left(tmp_path)
    process = launch(tmp_path, launcher)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "\x1b" not in out  # no bar in what is no terminal, though mpirun gives its ranks one
    assert sha256(tmp_path / "run") == sha256(undisturbed)
    assert without_wall_time(metrics(tmp_path / "run")) == without_wall_time(metrics(undisturbed))
    found = summary(tmp_path / "run")
    assert [found[key] for key in ("launcher", "world_size", "backend")] == [launcher, 2, "gloo"]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=[MPIRUN, pytest.mark.slow])])
def test_a_killed_rank_is_a_restart_to_the_same_bits(launcher: str, tmp_path: Path, undisturbed: Path) -> None:
    write_config(tmp_path)
    process = launch(tmp_path, launcher)
    assert wait_for_round(process, tmp_path / "run", 2)
    ranks = [pid for pid in of_the_test(tmp_path) if "RANK=1" in rank_of(pid)]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("fedfreeze: restart ") == 1
    assert re.search(r"restart 1 of 3: a rank was lost; \d+ s lost since checkpoint round-", out)
    assert sha256(tmp_path / "run") == sha256(undisturbed)
    assert without_wall_time(metrics(tmp_path / "run")) == without_wall_time(metrics(undisturbed))
    found = summary(tmp_path / "run")
    assert [found[key] for key in ("launcher", "world_size", "backend")] == [launcher, 2, "gloo"]
    assert_nobody_left(tmp_path)


def rank_of(pid: int) -> list[str]:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return [word.replace("OMPI_COMM_WORLD_RANK=", "RANK=") for word in words]


# --- the batch files, without a SLURM


def batch(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return call(folder, f"slurm/{script}.sbatch", *arguments, **{"SLURM_SUBMIT_DIR": str(folder)} | JOB | environment)


@pytest.mark.parametrize("script", [path.stem for path in BATCH])
def test_batch_files_that_cannot_find_the_project_or_a_configuration(script: str, tmp_path: Path) -> None:
    lost = batch(tmp_path, script, "digits")
    assert lost.returncode == 69
    assert lost.stderr.count("\n") == 1
    assert f"FEDFREEZE_HOME is '{tmp_path}', which has no slurm/common.sh; submit from" in lost.stderr
    unsaid = batch(tmp_path, script, FEDFREEZE_HOME=str(ROOT), SLURM_ARRAY_TASK_ID="1", NPROC="1")
    assert unsaid.returncode == 64
    assert "usage: " in unsaid.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "said"),
    [
        ("cpu", ["digits"], {"MAX_REQUEUES": "some"}, "MAX_REQUEUES is 'some'"),
        ("train_torchrun", ["digits"], {}, "the job has no GPUs and NPROC is '0'; add --gpus-per-node=N"),
        ("sweep", ["digits"], {"SLURM_ARRAY_TASK_ID": "1"}, "neither TABLE nor SEEDS"),
        ("sweep", ["digits", "no-table"], {"SLURM_ARRAY_TASK_ID": "1"}, "the table 'no-table' cannot be read"),
        ("sweep", ["digits", "table"], {}, "usage: sbatch --array="),
    ],
)
def test_batch_files_tell_a_mistake_in_one_line(
    script: str, arguments: list[str], environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = batch(tmp_path, script, *arguments, **environment, FEDFREEZE_HOME=str(ROOT))
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
