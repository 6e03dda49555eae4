"""`fedfreeze run` on the command line."""

import argparse
import os
import signal
from pathlib import Path

from fedfreeze.comm.launcher import Launch, launch_here
from fedfreeze.comm.local_ranks import interrupt_once, run_local_ranks
from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_config_command, positive
from fedfreeze.config.schema import Config
from fedfreeze.errors import ExitCode
from fedfreeze.run.preempt import Preemption


def add_command(commands: Commands) -> None:
    """Add `run` with its options."""
    command = add_config_command(commands, "run", _run, "train, or go on where the run folder's checkpoint is")
    command.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME)")
    command.add_argument("--show-run-dir", action="store_true", help="print the run folder, and do nothing else")
    command.add_argument("--nproc", type=positive, metavar="N", help="start N ranks on this machine (default 1)")


def _run(config: Config, options: argparse.Namespace) -> int:
    run_dir = Path(options.run_dir or Path("runs") / config.name)
    if options.show_run_dir:  # the scripts that start runs ask, before any rank
        print(run_dir)
        return ExitCode.DONE
    launch, nproc = launch_here(options.nproc, config.comm.transport, os.environ, os.getppid())
    preemption = Preemption(config.checkpoint, os.environ)
    preemption.install()
    # or torch's own lines, stack traces among them, come before ours where ranks do not find each other
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        # here: a mistake is told without importing torch
        from fedfreeze.compute import check_can_fork, cuda_not_started

        with cuda_not_started():
            from fedfreeze.run.session import note_exit_code, run_rank

        set_handler(signal.SIGINT, interrupt_once())
        if nproc > 1:

            def local_rank(local: Launch) -> int:
                preemption.install()  # in its own main thread, which a thread of the parent's may have forked
                return run_rank(config, run_dir, local, preemption)

            check_can_fork(config.train.device, nproc)
            code = run_local_ranks(nproc, local_rank)
            note_exit_code(run_dir, code)
            return code
        return run_rank(config, run_dir, launch, preemption)
    finally:
        preemption.uninstall()
