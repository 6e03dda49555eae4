"""`fedfreeze compare` on the command line."""

import argparse
import signal
from pathlib import Path

from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_run_folders_command
from fedfreeze.errors import ExitCode


def add_command(commands: Commands) -> None:
    """Add `compare` with its options."""
    command = add_run_folders_command(
        commands,
        "compare",
        _compare,
        "runs beside each other: tables, pictures, a page",
        more="Runs that differ in nothing but the seed are one row, mean and spread.",
        options="--target, --out, --markdown, --json",
    )
    command.add_argument(
        "--target",
        type=_accuracy,
        metavar="ACCURACY",
        help="accuracy, 0 to 1, to which rounds and time are taken (default: 95%% of the lowest best accuracy)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.html, pictures, table.md and compare.json there"
    )
    style = command.add_mutually_exclusive_group()
    style.add_argument("--markdown", dest="style", action="store_const", const="markdown", help="print a GitHub table")
    style.add_argument("--json", dest="style", action="store_const", const="json", help="print JSON, in plain units")
    command.set_defaults(style="terminal")


def _compare(folders: list[str], options: argparse.Namespace) -> int:
    from fedfreeze.compare.program import compare

    set_handler(signal.SIGINT, signal.default_int_handler)
    compare(folders, target_accuracy=options.target, out=options.out, style=options.style)
    return ExitCode.DONE


def _accuracy(text: str) -> float:
    try:
        accuracy = float(text)
    except ValueError:
        accuracy = -1.0
    if not 0 < accuracy < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an accuracy, a number between 0 and 1")
    return accuracy
