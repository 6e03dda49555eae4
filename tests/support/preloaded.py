"""Python programs that need not wait for their imports: a server that has them forks a process for each.

Importing torch, and all that the first run of a process loads and makes, cost four processor seconds a launch, which
most tests of launched runs are not about. What `start_preloaded` gives has a process of its own, with its own session,
environment, folder, signals and exit, and stands where `python -m fedfreeze`, `python -c` or `python FILE` stands after
its imports. Tests of imports, of a bare start and of launchers start the real thing.
"""

import contextlib
import fcntl
import functools
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Preloaded:
    """A started program, used as a `subprocess.Popen` in text mode is."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]):
        self.args = [sys.executable, *arguments]
        sys.audit("fedfreeze.preloaded", self.args)  # tests/support/by_room.py counts them
        self.returncode: int | None = None
        out, out_there = os.pipe()
        err, err_there = os.pipe()
        self.stdout: IO[str] = os.fdopen(out, encoding="utf-8", errors="replace")
        self.stderr: IO[str] = os.fdopen(err, encoding="utf-8", errors="replace")
        with open(os.devnull, "rb") as nothing:
            self._line = _ask(_server(), arguments, environment, [nothing.fileno(), out_there, err_there])
        os.close(out_there)
        os.close(err_there)
        self.pid = int(_answer(self._line))

    def poll(self) -> int | None:
        """Return the exit code, as Popen does; None while the process runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read all that it prints and wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        with selectors.DefaultSelector() as selector:
            for name in texts:
                stream = getattr(self, name)
                if not stream.closed:
                    selector.register(stream.fileno(), selectors.EVENT_READ, name)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                found = selector.select(left)
                if not found and left is not None:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in found:
                    if piece := os.read(key.fd, 65536):
                        texts[key.data].append(piece)
                    else:
                        selector.unregister(key.fd)
        for name in texts:
            getattr(self, name).close()
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        out, err = (b"".join(texts[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process alone."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._line, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = int(_answer(self._line))
                    self._line.close()
        return self.returncode


def start_preloaded(arguments: Sequence[str], environment: dict[str, str]) -> Preloaded:
    """Start `python ARGUMENTS` (-m fedfreeze, -c CODE or a file) in a session of its own, in this process's folder."""
    return Preloaded(arguments, environment)


def command_for_shells(folder: Path) -> Path:
    """Write the command `fedfreeze` for a shell's PATH, which starts a preloaded one; return the folder it is in."""
    path = folder / "fedfreeze"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{__file__}" ask "{_server()}" -m fedfreeze "$@"\n')
    path.chmod(0o755)
    return folder


def _ask(place: str, arguments: Sequence[str], environment: dict[str, str], streams: Sequence[int]) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(place)
    request = json.dumps({"arguments": list(arguments), "environment": environment, "folder": os.getcwd()})
    socket.send_fds(line, [request.encode()], streams)
    return line


def _answer(line: socket.socket) -> bytes:
    """Return what the server says: first the process, then its exit code. Raises EOFError if it is gone."""
    answer = line.recv(64)
    if not answer:
        raise EOFError("the program that has fedfreeze loaded is gone")
    return answer


@functools.cache
def _server() -> str:
    """Return the path of the server's socket; it is one for all workers of a test session.

    Whoever is the first to need it starts it, and it ends with that process.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    # a socket's path has at most 107 characters
    place = Path(tempfile.gettempdir()) / f"fedfreeze-tests-{session[:12]}" / "socket"
    with open(place.parent.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            place.parent.mkdir()
            _start_server(place)
    return str(place)


def _start_server(place: Path) -> None:
    read, write = os.pipe()  # the server sees its end when this process ends, however it does
    subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded", "serve", str(place.parent), str(read)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        pass_fds=[read],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read)
    os.set_inheritable(write, False)
    deadline = time.monotonic() + 120
    while not place.exists():
        assert time.monotonic() < deadline, "the program that has fedfreeze loaded did not start"
        time.sleep(0.05)


# --- a client for shells: it stands for the program that it has started


def ask() -> int:
    """Start a program with this one's streams, pass on signals to it, and return its exit code."""
    line = _ask(sys.argv[2], sys.argv[3:], dict(os.environ), [0, 1, 2])
    pid = int(_answer(line))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(_answer(line))
    return code if code >= 0 else 128 - code


# --- the server


def serve() -> int:
    """Serve until the process that started us ends; in a forked process, return the exit code of its program."""
    folder, life = sys.argv[2], int(sys.argv[3])
    _warm_up()
    lines: dict[int, socket.socket] = {}  # process -> where its end is told
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door,
        selectors.DefaultSelector() as selector,
    ):
        door.bind(f"{folder}/new")
        door.listen(64)
        os.rename(f"{folder}/new", f"{folder}/socket")
        for descriptor in (door.fileno(), bell, life):
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == life:
                    os.unlink(f"{folder}/socket")
                    os.rmdir(folder)
                    os.unlink(f"{folder}.lock")
                    return 0
                if key.fd == bell:
                    os.read(bell, 4096)
                    _tell_ends(lines)
                    continue
                line, _ = door.accept()
                request, streams, _, _ = socket.recv_fds(line, 2**20, 3)
                if len(streams) != 3:
                    line.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    ours = [line, door, *lines.values()]
                    for descriptor in (bell, ring, life, selector.fileno(), *(each.detach() for each in ours)):
                        os.close(descriptor)
                    return _run(json.loads(request), streams)
                for descriptor in streams:
                    os.close(descriptor)
                lines[pid] = line
                _tell(line, pid)


def _warm_up() -> None:
    """Make a short run of one rank, so that all is loaded and made that the first of a process loads and makes."""
    import sklearn.datasets

    from fedfreeze.cli import main as run
    from tests.support.launching import write_config

    assert sklearn.datasets  # where digits come from, for those that bring a cache of their own
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = write_config(Path(folder), train={"rounds": 3}, pace={"policy": "fixed"})
        code = run(["run", str(config), "--run-dir", f"{folder}/run"])
    assert code == 0, "the run before all others failed"
    gc.collect()
    gc.freeze()  # or each forked process would look through all that is loaded, and so copy it


def _run(request: dict[str, Any], streams: Sequence[int]) -> int:
    """Be `python ARGUMENTS`."""
    os.setsid()
    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
        os.close(descriptor)
    # the streams were made for what stood at these descriptors when this program began
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    how, *rest = request["arguments"]
    if how == "-m":
        sys.argv = rest
        del sys.path[0]  # as fedfreeze/__main__.py does
        from fedfreeze.__main__ import main as run

        return run()
    sys.path[0] = "" if how == "-c" else str(Path(how).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")
    return 0


def _tell_ends(lines: dict[int, socket.socket]) -> None:
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        line = lines.pop(pid)
        _tell(line, os.waitstatus_to_exitcode(status))
        line.close()


def _tell(line: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        line.send(str(number).encode())


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "serve" else ask())
