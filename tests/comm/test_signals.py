"""Handlers of signals, and the command line where none may be set: called from threads, beside an event loop."""

import json
import multiprocessing
import signal
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.comm.local_ranks import run_local_ranks
from fedfreeze.comm.signals import handler_kept, set_handler
from fedfreeze.errors import ConfigError
from tests.support.in_process import TINY, TINY_RUN, attempt
from tests.support.launching import run, sha256, write_config


def in_thread(action: Any) -> Any:
    """Return what an action returns in a thread of its own, or the error that it raises."""
    found: list[Any] = []

    def act() -> None:
        try:
            found.append(action())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_handler_is_set_in_the_main_thread_alone() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with handler_kept(signal.SIGUSR1):
        assert set_handler(signal.SIGUSR1, signal.SIG_IGN) == before
        assert in_thread(lambda: set_handler(signal.SIGUSR1, signal.SIG_DFL)) is None
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_handler_that_python_has_not_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with handler_kept(signal.SIGUSR1):
        pass


def test_ranks_of_a_daemonic_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--nproc 2 in a daemonic process"):
        run_local_ranks(2, lambda launch: 0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TINY)
    write_config(tmp_path, **TINY_RUN)
    return tmp_path


def test_commands_put_the_handlers_of_their_caller_back(tiny: Path) -> None:
    def theirs(number: int, frame: object) -> None:
        raise AssertionError

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.signal(number, theirs) for number in numbers}
    try:
        for words in (
            ["run", "small.yaml", "--run-dir", "run"],
            ["plan", "small.yaml"],
            ["compare", "run"],
            ["sync", "x"],
        ):
            attempt(tiny, *words)
            assert [signal.getsignal(number) for number in numbers] == [theirs] * 5, words
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# As a tuner or a notebook does it: an event loop in the main thread, which has handlers of its own.
SCRIPT = """
import asyncio, hashlib, json, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fedfreeze.cli import main

COMMANDS = [
    ["run", "small.yaml", "--run-dir", "alone"],
    ["run", "small.yaml", "--run-dir", "ranks", "--nproc", "2"],
    ["run", "small.yaml", "--run-dir", "bad", "--train.roundz=3"],
    ["run", "small.yaml", "--run-dir", "bad", "--data.path=nowhere"],
    ["plan", "small.yaml", "--json"],
    ["fetch", "small.yaml"],
    ["compare", "alone", "--json"],
    ["sync", "none"],
    ["doctor", "small.yaml", "--json", "--nproc", "2"],
]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

async def all_of_them():
    loop = asyncio.get_running_loop()
    heard, ticks = [], [0]
    for number in SIGNALS:
        loop.add_signal_handler(number, heard.append, number)
    async def tick():
        while True:
            ticks[0] += 1
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    codes = []
    for command in COMMANDS:
        codes.append(await loop.run_in_executor(None, main, command))
    with ThreadPoolExecutor(2) as two:
        runs = [["run", "small.yaml", "--run-dir", f"both{i}"] for i in range(2)]
        codes += await asyncio.gather(*(loop.run_in_executor(two, main, words) for words in runs))
    signal.raise_signal(signal.SIGUSR1)
    await asyncio.sleep(0.05)
    ticking.cancel()
    return {"codes": codes, "heard": [int(number) for number in heard], "ticks": ticks[0]}

if __name__ == "__main__":
    found = asyncio.run(all_of_them())
    Path("found.json").write_text(json.dumps(found))
"""


def test_every_command_runs_in_a_thread_beside_an_event_loop(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt(tiny, "run", "small.yaml", "--run-dir", "main").code == 0
    monkeypatch.chdir(tiny)
    done = run([sys.executable, "-c", textwrap.dedent(SCRIPT)], timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "main thread" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads((tiny / "found.json").read_text())
    assert found["codes"] == [0, 0, 64, 65, 0, 0, 0, 64, 0, 0, 0], done.stdout + done.stderr
    assert found["heard"] == [signal.SIGUSR1]  # the loop's own handlers stand, and heard nothing of the ranks'
    assert found["ticks"] > 5
    assert "notice: another thread of this process is at work" in done.stderr
    digests = {sha256(tiny / name) for name in ("main", "alone", "ranks", "both0", "both1")}
    assert len(digests) == 1
