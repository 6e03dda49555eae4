"""Ctrl-C at every phase, and a rank that raises: all ranks end, nothing is left, the run goes on to the same bits."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.data import store
from fedfreeze.device import cost
from fedfreeze.device.emulator import Emulator
from fedfreeze.run import experiment
from fedfreeze.storage import checkpoint
from fedfreeze.storage.run_folder import RunFolder
from tests.support.in_process import note
from tests.support.launching import Process, start, summary
from tests.support.tiny_runs import assert_no_leftovers, assert_same, go, leftovers, write

# Ten seconds of grace for a rank that waits in C++ for the others to join.
SLOW = ("the ranks' start, --nproc 2", "joining, --nproc 2", "deployment, --nproc 2")

# --- Ctrl-C


PHASES: dict[str, tuple[Any, str, int]] = {
    "data preparation": (store, "_write_store", 1),
    "partition": (experiment, "partition_of", 1),
    "cost prediction": (cost, "_stage_cost", 2),
    "building the network": (experiment, "build_network", 1),
    "claiming the folder": (RunFolder, "claim", 1),
    "first round": (Emulator, "_step", 2),
    "evaluation": (Emulator, "count_correct", 2),
    "between rounds": (RunFolder, "append_metrics", 4),
    "checkpoint, begun": (checkpoint.CheckpointStore, "save", 2),
    "checkpoint, half written": (checkpoint, "_sync", 5),
    "checkpoint, before old ones go": (checkpoint.CheckpointStore, "_drop_old", 3),
    "stage change": (Emulator, "leave_stage", 1),
    "deployment": (RunFolder, "write_model", 1),
    "books": (RunFolder, "write_summary", 2),
}


@pytest.mark.parametrize("phase", [f"Ctrl-C: {phase}" for phase in PHASES])
def test_ctrl_c_in(phase: str, here: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, number = PHASES[phase.removeprefix("Ctrl-C: ")]
    original, calls = getattr(owner, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    outcome = go(here, "run", "--data.cache_dir=cache")
    note(phase, "SIGINT", outcome.code, outcome.err or outcome.out.splitlines()[-1])
    assert len(calls) >= number
    assert (outcome.code, outcome.err) == (130, "")
    assert outcome.out.count("interrupted") == 1
    left = leftovers(here)
    if (here / "run").exists():
        assert (summary(here / "run")["status"], summary(here / "run")["exit_code"]) == ("preempted", 130)
    # the configuration names the cache, so the checkpoints are of the same run only with it
    again = go(here, "run", "--data.cache_dir=cache")
    assert (again.code, again.err) == (0, "")
    assert_same(here / "run", whole)
    assert left == []


# Starts fedfreeze as `python -m` does, and has everybody interrupted where it is told, once.
DRIVER = """
import os, runpy, signal, sys, time

def interrupt():
    try:
        os.close(os.open("interrupted", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    time.sleep(0.3)  # all ranks are there
    os.killpg(os.getpgrp(), signal.SIGINT)
    time.sleep(10)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            interrupt()

where = sys.argv.pop(1)
if ":" in where:
    import importlib
    module, name = where.split(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    def patched(*arguments, **options):
        interrupt()
        return original(*arguments, **options)
    setattr(owner, name, patched)
else:
    sys.meta_path.insert(0, Finder())
runpy.run_module("fedfreeze", run_name="__main__", alter_sys=True)
"""


def launch(folder: Path, where: str, ranks: int, *, driver: str = DRIVER, fresh: bool = False) -> Process:
    arguments = [where] if driver else []
    code = ["-c", driver] if driver else ["-m", "fedfreeze"]
    program = [sys.executable, *code, *arguments, "run", "small.yaml", "--run-dir", "run", "--nproc", str(ranks)]
    with contextlib.chdir(folder):
        return start(program, fresh=fresh)


def end_of(process: Process, timeout_s: float = 60) -> tuple[str, str]:
    """Wait for the end; nobody of its process group may outlive it."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            if process.poll() is not None:
                pytest.fail("a process was left behind")
    return out, err


LAUNCHED = {
    "import of fedfreeze itself": ("pydantic", 1),
    "import of torch": ("torch", 1),
    "import of torch, --nproc 2": ("torch", 2),
    "the ranks' start, --nproc 2": ("fedfreeze.run.session:run_rank", 2),
    "joining, --nproc 2": ("fedfreeze.comm.torch_transport:TorchTransport._make_store", 2),
    "first round, --nproc 2": ("fedfreeze.device.emulator:Emulator._step", 2),
    "checkpoint, --nproc 2": ("fedfreeze.storage.checkpoint:_sync", 2),
    "deployment, --nproc 2": ("fedfreeze.storage.run_folder:RunFolder.write_model", 2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(f"launched: {name}", marks=[pytest.mark.slow] if name in SLOW else []) for name in LAUNCHED]
)
def test_ctrl_c_of_a_launch(name: str, here: Path, whole: Path) -> None:
    where, ranks = LAUNCHED[name.removeprefix("launched: ")]
    process = launch(here, where, ranks, fresh=":" not in where)  # imports are there to be interrupted
    out, err = end_of(process)
    said = out.splitlines()[-1] if out else "ended by the signal"
    note(f"Ctrl-C: {name.removeprefix('launched: ')}", "SIGINT", process.returncode, err or said)
    assert (here / "interrupted").exists()
    assert process.returncode in (130, -signal.SIGINT)  # a shell calls both 130
    assert "Traceback" not in out + err
    assert err == ""
    assert out.count("interrupted") <= 1
    left = leftovers(here)
    if "torch" not in name and "itself" not in name:  # nothing had begun
        assert go(here).code == 0
        assert_same(here / "run", whole)
    assert left == []


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_at_any_moment(ranks: int, here: Path, whole: Path) -> None:
    """Seeded moments over the whole of a launch, imports included, as a terminal sends it; then the run goes on."""
    generator = random.Random(ranks)
    for _ in range(3):
        process = launch(here, "", ranks, driver="", fresh=True)
        time.sleep(0.3 + generator.random() * 3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        out, err = end_of(process)
        assert process.returncode in (0, 130, -signal.SIGINT), err
        assert "Traceback" not in out + err
        assert err == ""
        assert_no_leftovers(here)
    assert go(here).code == 0
    assert_same(here / "run", whole)


# --- a rank that raises


@pytest.fixture(scope="module", params=["rank 0", "rank 1"])
def raised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, int, str, str]:
    """A run of two ranks of which one raised: which, where, its exit code and what it said."""
    folder = tmp_path_factory.mktemp("raised")
    write(folder, model={"factory": "mine:faulty"})
    (folder / "fault").write_text(request.param[-1])
    process = launch(folder, "", 2, driver="")
    out, err = end_of(process, 40)
    note(f"{request.param} raises in round 2", "--nproc 2", process.returncode, err.splitlines()[0])
    return request.param, folder, process.returncode, out, err


def test_a_rank_that_raises_ends_all_with_one_traceback(raised: tuple[str, Path, int, str, str]) -> None:
    rank, folder, code, out, err = raised
    assert code == 70
    assert err.count("Traceback (most recent call last)") == 1
    assert "fedfreeze: error in code of your own (" in err
    assert f"mine.py:21), {rank} on " in err
    assert "a fault of this rank alone" in err
    assert "Traceback" not in out
    assert summary(folder / "run")["status"] == "failed"
    assert_no_leftovers(folder)


def test_summary_has_the_exit_code_of_a_rank_that_raised(raised: tuple[str, Path, int, str, str]) -> None:
    _, folder, code, _, _ = raised
    assert summary(folder / "run")["exit_code"] == code


def test_once_the_fault_is_gone_the_run_goes_on(raised: tuple[str, Path, int, str, str], tmp_path: Path) -> None:
    """To the bits of a run in which nothing was ever wrong."""
    shutil.copytree(raised[1], tmp_path / "copy")
    (tmp_path / "copy" / "fault").unlink()
    assert go(tmp_path / "copy").code == 0
    assert go(tmp_path / "copy", "undisturbed").code == 0
    assert_same(tmp_path / "copy" / "run", tmp_path / "copy" / "undisturbed")
