"""`fedfreeze plan` on the command line."""

import argparse
import signal
from pathlib import Path

from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_config_command
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError, ExitCode


def add_command(commands: Commands) -> None:
    """Add `plan` with its options."""
    command = add_config_command(
        commands, "plan", _plan, "what each stage needs and which devices can join; nothing is trained"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--partition-picture", type=Path, metavar="FILE", help="draw the labels of each device (.png, .svg or .pdf)"
    )
    command.add_argument(
        "--cut",
        action="store_true",
        help="propose the cheapest cut with which --share of the devices join all stages",
    )
    command.add_argument(
        "--share", type=_share, default=0.9, metavar="S", help="share of the devices, 0 to 1 (default 0.9), for --cut"
    )
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="time a few real training steps of each stage here: which fleet.speed_gflops this machine has",
    )
    command.add_argument("--write", type=Path, metavar="FILE", help="write the configuration with the proposed cut")


def _plan(config: Config, options: argparse.Namespace) -> int:
    if options.calibrate and options.cut:
        raise ConfigError("--calibrate and --cut are two questions; ask one at a time")
    from fedfreeze.plan.cut_table import plan_cut
    from fedfreeze.plan.table import plan, plan_calibrated

    set_handler(signal.SIGINT, signal.default_int_handler)
    if options.calibrate:
        plan_calibrated(config, as_json=options.json)
    elif options.cut:
        plan_cut(config, share=options.share, write=options.write, as_json=options.json)
    else:
        plan(config, as_json=options.json, partition_picture=options.partition_picture)
    return ExitCode.DONE


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, a number over 0 and up to 1")
    return share
