"""The life of a rank: it joins the others, runs the experiment, and leaves in order, whatever happens."""

import hashlib
import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.mpi_transport import launch_by_mpi
from fedfreeze.comm.ranks import Ranks
from fedfreeze.comm.signals import set_handler
from fedfreeze.compute import choose_device, keep_freed_memory
from fedfreeze.config.file import config_difference, config_values
from fedfreeze.config.schema import Config, code_named
from fedfreeze.errors import (
    ConfigError,
    ExitCode,
    FedfreezeError,
    PreemptedError,
    RankLostError,
    one_line,
    out_of_memory,
)
from fedfreeze.plugins import own_frame
from fedfreeze.run.experiment import Experiment
from fedfreeze.run.history import History
from fedfreeze.run.preempt import Preemption
from fedfreeze.run.reporter import Reporter
from fedfreeze.storage.run_folder import RunFolder


def run_rank(config: Config, run_dir: Path, launch: Launch, preemption: Preemption | None = None) -> int:
    """Collective: every rank must call this. Run an experiment to the end and return the exit code.

    Errors are told once, by rank 0; its own loss by all others.
    """
    reporter = Reporter(quiet=launch.rank != 0, launcher=launch.launcher)
    preemption = preemption or Preemption(config.checkpoint, os.environ)  # the caller takes no signals
    session = Session(config, run_dir, preemption, reporter)
    code, why = int(ExitCode.INTERNAL), ""
    try:
        code = _told(session, config, launch, reporter)
        why = session.why
    finally:
        session.leave(code, why)
    return code


def _told(session: "Session", config: Config, launch: Launch, reporter: Reporter) -> int:
    """Collective: every rank must call this. Run, and turn whatever ends the run into words and an exit code."""
    try:
        return session.run(launch)
    except PreemptedError as error:
        stands = "the last checkpoint stands" if session.folder.has_checkpoint() else "there is no checkpoint yet"
        reporter.notice(f"{error}: left; {stands}, run again to go on")
        return error.exit_code
    except RankLostError as error:
        ranks = session.ranks
        # rank 0 speaks for all, unless it is what was lost (where a parent tells it) or cannot have heard of this
        if ranks is None or (ranks.lifeline.root_lost and launch.launcher != "nproc"):
            reporter.quiet = False
        session.why = one_line(error)
        reporter.error(error)
        return error.exit_code
    except FedfreezeError as error:
        session.why = one_line(error)
        reporter.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        reporter.notice("interrupted; the last checkpoint stands, run again to go on")
        return ExitCode.INTERRUPTED
    except Exception as error:
        too_large = out_of_memory(error)
        if too_large is not None:
            reporter.crash(f"error: {too_large}")
            return too_large.exit_code
        own = own_frame(error, code_named(config))
        blame = f"error in code of your own ({own})" if own else "internal error"
        session.why = f"{blame}: {one_line(error)}; see its log"
        reporter.crash(f"{blame}, rank {launch.rank} on {socket.gethostname()}:\n{traceback.format_exc()}")
        return ExitCode.INTERNAL
    finally:
        reporter.close()


class Session:
    """What a rank holds from its first collective to its last breath, whatever comes between."""

    def __init__(self, config: Config, run_dir: Path, preemption: Preemption, reporter: Reporter):
        self.config = config
        self.folder = RunFolder(run_dir)
        self.preemption = preemption
        self.reporter = reporter
        self.ranks: Ranks | None = None
        self.why = ""
        """What ended this rank, in words, for the others."""

    def run(self, launch: Launch) -> int:
        """Collective: every rank must call this. Set up, train, and leave the group and the folder in order."""
        config, folder, reporter, preemption = self.config, self.folder, self.reporter, self.preemption
        # set before anything computes: the bits depend on it, and launchers set it to all sorts of values
        torch.set_num_threads(config.train.threads_per_rank)
        if config.comm.transport == "mpi":
            launch = launch_by_mpi(launch)
            reporter.quiet = launch.rank != 0
        device, missing = _device_or_error(config, launch)
        keep_freed_memory()
        is_root = launch.rank == 0
        self.ranks = ranks = Ranks(
            launch, device, config.comm, poll=lambda: preemption.message(root=is_root), hear_wish=preemption.hear
        )
        history = None
        try:
            ranks.together(missing)
            _agree(ranks, config, folder.path)
            if ranks.decide(lambda: _open_folder(folder, config, reporter)):
                ranks.close()
                return ExitCode.DONE
            history = History(config, folder, launch, ranks) if is_root else None
            ranks.decide(lambda: history.track(reporter.notice) if history else None)
            code = Experiment(config, folder, ranks, device, reporter, history, preemption).run()
            ranks.close()
            return code
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                set_handler(signal.SIGINT, signal.SIG_IGN)  # a second one must not spoil the way out
            if history is not None and history.begun:
                history.failed(error)
            raise
        finally:
            folder.close()

    def leave(self, code: int, why: str) -> None:
        """Tell the other ranks how this one leaves; where rank 0 was lost, rank 1 keeps its books."""
        if self.ranks is not None:
            self.ranks.leave(code, why)
            if self.ranks.rank == 1 and self.ranks.lifeline.root_lost:
                note_exit_code(self.folder.path, ExitCode.RANK_LOST, self.ranks.lifeline.lost)


def _device_or_error(config: Config, launch: Launch) -> tuple[torch.device, Callable[[], None]]:
    """Return where to compute, and what raises if that cannot be: told when the ranks can hear each other."""
    try:
        return choose_device(config.train.device, launch.local_rank), lambda: None
    except FedfreezeError as error:
        found = error

    def fail() -> None:
        raise found

    return torch.device("cpu"), fail


def _agree(ranks: Ranks, config: Config, run_dir: Path) -> None:
    """Collective: every rank must call this. Raise ConfigError on all where one was started with other settings."""
    mine = json.dumps([config_values(config), str(run_dir)], sort_keys=True)
    digests = ranks.all_gather(hashlib.sha256(mine.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everybody = [json.loads(text) for text in ranks.all_gather(mine)]
    for rank, (values, folder) in enumerate(everybody):
        root_values, root_folder = everybody[0]
        difference = config_difference(root_values, values) or f"run folder was {root_folder} and is now {folder}"
        if digests[rank] != digests[0]:
            raise ConfigError(
                f"rank {rank} on {ranks.rank_hosts[rank]} was started with other settings than rank 0 (for which "
                f"{difference}); start all ranks with the same command"
            )


def note_exit_code(run_dir: Path, code: int, error: str | None = None) -> None:
    """Have summary.json say how the ranks ended, where rank 0 could not, or knew only that another was gone."""
    folder = RunFolder(run_dir)
    summary = folder.read_summary()
    if summary is None:
        return
    if summary.get("status") == "running" and code == ExitCode.RANK_LOST:
        folder.write_summary(summary | {"status": "failed", "exit_code": int(code), "error": error})
    elif summary.get("exit_code") == ExitCode.RANK_LOST and code == ExitCode.INTERNAL:
        folder.write_summary(summary | {"exit_code": int(code)})


def _open_folder(folder: RunFolder, config: Config, reporter: Reporter) -> bool:
    """Lock the folder; tell whether the run in it is finished already."""
    for notice in folder.open(config):
        reporter.notice(notice)
    summary = folder.read_summary()
    if summary is not None and summary.get("status") == "finished":
        reporter.notice(f"{folder.path} is finished already (accuracy {summary.get('final_accuracy')})")
        return True
    return False
