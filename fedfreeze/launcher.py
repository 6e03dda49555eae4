"""Which launcher started this process, and who it is among the ranks; `--nproc N` starts local ranks itself."""

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

from fedfreeze.errors import ConfigError, ExitCode

# How long surviving local ranks may take to notice a dead one and leave by themselves.
_GRACE_S = 10.0

_SAME_INTERRUPT_S = 2.0


@dataclass(frozen=True)
class Launch:
    """Who this process is among the ranks."""

    launcher: str
    """none | nproc | torchrun."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    init_method: str = "env://"
    """How torch.distributed finds the other ranks."""


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Read who this process is from what its launcher set. Raises ConfigError where that cannot be right."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launch = Launch(
            "torchrun",
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE"),
        )
        if not (0 <= launch.rank < launch.world_size and 0 <= launch.local_rank < launch.local_world_size):
            raise ConfigError(
                f"RANK is {launch.rank} of WORLD_SIZE {launch.world_size}, LOCAL_RANK {launch.local_rank} of "
                f"LOCAL_WORLD_SIZE {launch.local_world_size}, which cannot be; start the ranks with torchrun or --nproc"
            )
        return launch
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" in environment and tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(
            f"srun started {tasks} tasks that would not know of each other; start one task a node and torchrun in it"
        )
    return Launch("none")


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"RANK is set but {name} is {environment.get(name)!r}; start the ranks with torchrun or --nproc"
        ) from None


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
    """
    with tempfile.TemporaryDirectory(prefix="fedfreeze-") as folder:
        init_method = f"file://{folder}/store"
        fork = get_context("fork")
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        ranks: list[BaseProcess] = []
        # a Ctrl-C waits until the ranks stand where they can take it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for rank in range(world_size):
            launch = Launch("nproc", rank, world_size, rank, world_size, init_method)
            process = fork.Process(target=_local_rank, args=(launch, rank_main, parent, before), name=f"rank{rank}")
            process.start()
            ranks.append(process)
        return _wait(ranks, before)


def _local_rank(launch: Launch, rank_main: Callable[[Launch], int], parent: int, unblocked: set[int]) -> None:
    die_with_parent(parent)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        code = rank_main(launch)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
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
            for rank in ranks:
                if rank.is_alive() and rank.pid is not None:
                    os.kill(rank.pid, signal.SIGINT)
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
