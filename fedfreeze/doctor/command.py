"""`fedfreeze doctor` on the command line."""

import argparse
import os
import signal
from pathlib import Path

from fedfreeze.comm.launcher import launch_here
from fedfreeze.comm.local_ranks import interrupt_once, run_local_ranks
from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_config_command, positive
from fedfreeze.config.schema import Config


def add_command(commands: Commands) -> None:
    """Add `doctor` with its options."""
    command = add_config_command(
        commands,
        "doctor",
        _doctor,
        "try out this machine or allocation in under a minute; start it as you start `run`",
        sections=("train", "comm", "track"),
        optional=True,
    )
    command.add_argument("--run-dir", metavar="DIR", help="run folder to try (default: runs/NAME)")
    command.add_argument("--ranks", type=positive, metavar="N", help="the ranks there should be; another number fails")
    command.add_argument("--nproc", type=positive, metavar="N", help="start N ranks on this machine (default 1)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _doctor(config: Config, options: argparse.Namespace) -> int:
    launch, nproc = launch_here(options.nproc, config.comm.transport, os.environ, os.getppid())
    from fedfreeze.doctor.program import Request, run_doctor

    run_dir = Path(options.run_dir or Path("runs") / config.name)
    request = Request(config, run_dir, options.config is not None, options.ranks, options.json)
    set_handler(signal.SIGINT, interrupt_once())
    if nproc > 1:
        return run_local_ranks(nproc, lambda local: run_doctor(request, local))
    return run_doctor(request, launch)
