"""Watches over the start, where ranks wait for one another in calls that neither a key nor a signal can end."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from fedfreeze.errors import ExitCode

_LEAVES = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGUSR1: ExitCode.RUN_AGAIN,
    signal.SIGUSR2: ExitCode.RUN_AGAIN,
    signal.SIGTERM: ExitCode.RUN_AGAIN,
    signal.SIGHUP: ExitCode.RUN_AGAIN,
}

# How long the ordinary way has before this one is taken: a call of Python's own ends by itself, and says more.
_PATIENCE_S = 3.0

_TELL_AFTER_S = 15.0


@contextlib.contextmanager
def watched(rank: int, world_size: int, join_s: float, leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """End this process, with one line, if what is inside takes longer than `join_s` seconds, or a signal comes.

    MPI_Init and the connecting of torch.distributed are single calls into C, which may wait for ever for a rank that
    never comes; Python's handlers do not run in the meantime.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer.fileno()) if in_main_thread else -1
    name = f"rank {rank} of {world_size} on {socket.gethostname()}"
    inside = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + join_s + _PATIENCE_S
        tell = time.monotonic() + _TELL_AFTER_S
        while not inside.is_set():
            reader.settimeout(0.25)
            try:
                number = reader.recv(1)
            except TimeoutError:
                number = b""
            except OSError:
                return
            if number and number[0] in _LEAVES and not inside.wait(_PATIENCE_S):
                if number[0] != signal.SIGINT:  # whoever pressed Ctrl-C knows
                    sys.stderr.write(
                        f"fedfreeze: {name} got {signal.Signals(number[0]).name} while the ranks were joining\n"
                    )
                _end(_LEAVES[signal.Signals(number[0])], leave)
            if rank == 0 and time.monotonic() > tell:
                tell = float("inf")
                print(f"notice: waiting for all {world_size} ranks, up to {join_s:.0f} s", flush=True)
            if time.monotonic() > deadline and not inside.is_set():
                sys.stderr.write(
                    f"fedfreeze: error: {name}: the ranks did not come together within {join_s:.0f} s (comm.join_s); "
                    "see whether all were started, with the same WORLD_SIZE, and whether MASTER_ADDR and MASTER_PORT "
                    "lead to rank 0\n"
                )
                _end(ExitCode.RANK_LOST, leave)

    thread = threading.Thread(target=watch, name="joining", daemon=True)
    thread.start()
    try:
        yield
    finally:
        inside.set()
        if in_main_thread:
            signal.set_wakeup_fd(before)
        thread.join(1.0)
        reader.close()
        writer.close()


def _end(code: int, leave: Callable[[int], None]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    leave(int(code))
