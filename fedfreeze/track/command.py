"""`fedfreeze sync` on the command line."""

import argparse
import signal

from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_run_folders_command


def add_command(commands: Commands) -> None:
    """Add `sync` with its options."""
    command = add_run_folders_command(
        commands,
        "sync",
        _sync,
        "one continuous Weights & Biases run for each run folder, however often it was requeued",
        more="Does nothing where nothing is new.",
        options="--offline, --project, --entity, --force, --json",
    )
    command.add_argument(
        "--offline", action="store_true", help="write one offline run to RUN/wandb/sync, without key and network"
    )
    command.add_argument(
        "--project", metavar="P", help="project (default: track.project of the run, else WANDB_PROJECT)"
    )
    command.add_argument(
        "--entity", metavar="E", help="user or team (default: track.entity of the run, else WANDB_ENTITY)"
    )
    command.add_argument("--force", action="store_true", help="also where there is nothing new")
    command.add_argument("--json", action="store_true", help="print what became of each run as JSON")


def _sync(folders: list[str], options: argparse.Namespace) -> int:
    from fedfreeze.track.sync import sync

    set_handler(signal.SIGINT, signal.default_int_handler)
    return sync(
        folders,
        offline=options.offline,
        project=options.project,
        entity=options.entity,
        force=options.force,
        as_json=options.json,
    )
