"""Wandb kept quiet and at arm's length: what it may collect, where it may write, and how long it may take."""

import contextlib
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from fedfreeze.errors import one_line

T = TypeVar("T")

# All that wandb would collect by itself. Older versions lack some of these, and spell `x_` as `_`.
_SETTINGS = {
    "silent": True,
    "console": "off",
    "host": "",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 1.0,  # 15 s by default, and as much would be lost with a killed process
}


def check_writable(folder: Path) -> None:
    """Make a folder and try it: wandb would go to another one without a word. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)


def quiet_settings(wandb: Any, **more: Any) -> Any:
    """Return the Settings with which wandb collects nothing by itself, as far as the installed version has them."""
    wanted = _SETTINGS | more
    known = {name for kind in wandb.Settings.__mro__ for name in getattr(kind, "__annotations__", {})}
    spelled = {name if name in known else name.removeprefix("x"): value for name, value in wanted.items()}
    return wandb.Settings(**{name: value for name, value in spelled.items() if name in known})


def bounded(action: Callable[[], T], seconds: float) -> T:
    """Return what an action returns, or raise what it raises; TimeoutError after `seconds`, with the action going on.

    Also SystemExit becomes an ordinary error: it is wandb's, and ours alone is Ctrl-C.
    """
    outcome: Future[T] = Future()

    def act() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:
            outcome.set_exception(error)
        except BaseException as error:
            outcome.set_exception(RuntimeError(f"{type(error).__name__} {one_line(error)}"))

    Thread(target=act, name="wandb", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(one_line(error) if outcome.done() else f"wandb gave no answer in {seconds:.0f} s") from error


@contextlib.contextmanager
def no_terminal() -> Iterator[None]:
    """Have nobody to ask: without a key wandb would wait at a terminal for one."""
    stdin = sys.stdin
    with open(os.devnull, encoding="ascii") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


@contextlib.contextmanager
def quiet_environment(folder: Path) -> Iterator[None]:
    """Set what wandb takes from the environment alone, until the run ends: its files stay in one folder."""
    ours = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    for name, part in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
        ours[name] = os.environ.get(name) or str(folder / "wandb" / part)
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def tear_down(seconds: float) -> None:
    """End wandb's service process, the usual way, and wait at most so long."""
    with contextlib.suppress(Exception):
        bounded(importlib.import_module("wandb").teardown, seconds)


def end_services() -> None:
    """Kill wandb's service processes among our children, which would have the exit of this process wait for them."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for process in children.read_text().split():
                if Path(f"/proc/{process}/comm").read_text().startswith("wandb-"):
                    os.kill(int(process), signal.SIGKILL)
