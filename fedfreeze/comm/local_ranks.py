"""`--nproc N`: ranks on this machine, forked, ended with their parent, and told what their parent is told."""

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import current_process, get_context
from multiprocessing.process import BaseProcess

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.signals import put_back, set_handler
from fedfreeze.errors import ConfigError, ExitCode, FedfreezeError

# How long surviving local ranks may take to notice a lost one and leave by themselves.
_GRACE_S = 10.0

_SAME_INTERRUPT_S = 2.0

# What a rank obeys, and its parent may be told in its place.
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)


def interrupt_once() -> Callable[[int, object], None]:
    """Return a handler that raises KeyboardInterrupt and takes Ctrl-Cs of the next two seconds for the same one.

    A terminal tells all processes of its foreground, and a parent its ranks: the second word must not break into the
    clean-up after the first.
    """
    last: list[float] = []

    def interrupt(number: int, frame: object) -> None:
        now = time.monotonic()
        if not last or now - last[-1] > _SAME_INTERRUPT_S:
            last.append(now)
            raise KeyboardInterrupt

    return interrupt


def run_local_ranks(world_size: int, rank_main: Callable[[Launch], int]) -> int:
    """Start `world_size` ranks on this machine, wait for them, and return the exit code of the first that failed.

    Ranks are forked from this process, which has imported torch already but started no thread and no CUDA context; so
    their start costs milliseconds instead of an import each. They die with their parent, however it dies.

    Raises ConfigError in a process that may start no others.
    """
    if current_process().daemon:
        raise ConfigError(
            f"--nproc {world_size} in a daemonic process, such as a worker of multiprocessing.Pool: Python lets it "
            "start no others; leave --nproc out there, or start fedfreeze by subprocess"
        )
    with tempfile.TemporaryDirectory(prefix="fedfreeze-") as folder:
        store_file = f"{folder}/store"
        fork = get_context("fork")
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        ranks: list[BaseProcess] = []
        # a Ctrl-C, or a signal to save and leave, waits until the ranks stand where they can take it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_PASSED_ON})
        for rank in range(world_size):
            launch = Launch("nproc", rank, world_size, rank, world_size, store_file=store_file)
            process = fork.Process(target=_local_rank, args=(launch, rank_main, parent, before), name=f"rank{rank}")
            process.start()
            ranks.append(process)
        handlers = {number: set_handler(number, partial(_passed_on, ranks)) for number in _PASSED_ON}
        try:
            return _wait(ranks, before)
        finally:
            for number, handler in handlers.items():
                put_back(number, handler)


def _local_rank(launch: Launch, rank_main: Callable[[Launch], int], parent: int, unblocked: set[int]) -> None:
    die_with_parent(parent)
    # this thread is the main one now, whichever it was in the parent: no event loop of the parent's is to hear of our
    # signals, and no handler of its own to take them
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, interrupt_once())
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        code = rank_main(launch)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except FedfreezeError as error:  # a signal to leave, before anything had begun
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through the parent's exit handlers, which are not this process's to run


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux), so that no rank outlives its launcher."""
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(ExitCode.RANK_LOST)


def _wait(ranks: list[BaseProcess], unblocked: set[int]) -> int:
    deadline = None
    interrupted = killed_by_us = False
    masked = True
    while any(rank.is_alive() for rank in ranks):
        try:
            if masked:
                masked = False
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            for rank in ranks:
                rank.join(timeout=0.02)
        except KeyboardInterrupt:
            interrupted = True  # a terminal has told the ranks too; `kill -INT` of this process alone has not
            deadline = deadline or time.monotonic() + _GRACE_S
            _tell(ranks, signal.SIGINT)
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            killed_by_us = killed_by_us or not failed or any(code > 0 for code in failed)
            for rank in ranks:
                rank.kill()
    failed = [rank.exitcode for rank in ranks if rank.exitcode]
    if interrupted and failed:
        return ExitCode.INTERRUPTED
    if not killed_by_us and (ranks[0].exitcode or 0) < 0:  # rank 0 tells of every other loss, but not of its own
        print(
            f"fedfreeze: error: rank 0 was ended by signal {-(ranks[0].exitcode or 0)} (out of memory, if you did not "
            "send it); run again to go on from the last checkpoint",
            file=sys.stderr,
        )
    # a rank that was killed, or the one whose error made the others lose it, says more than those who lost it
    told = [exitcode for exitcode in failed if exitcode != ExitCode.RANK_LOST]
    code = (told or failed or [0])[0]
    return ExitCode.RANK_LOST if code < 0 else code


def _passed_on(ranks: list[BaseProcess], number: int, frame: object) -> None:
    _tell(ranks, number)


def _tell(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, number)
