"""`fedfreeze fetch` on the command line."""

import argparse
import signal

from fedfreeze.comm.signals import set_handler
from fedfreeze.config.command_line import Commands, add_config_command
from fedfreeze.config.schema import Config
from fedfreeze.errors import ExitCode


def add_command(commands: Commands) -> None:
    """Add `fetch`."""
    add_config_command(
        commands,
        "fetch",
        _fetch,
        "download and decode the data into data.cache_dir, for nodes without a network",
        sections=("data",),
    )


def _fetch(config: Config, options: argparse.Namespace) -> int:
    from fedfreeze.data.store import open_store, prepare

    set_handler(signal.SIGINT, signal.default_int_handler)
    folder = prepare(config.data)
    data = open_store(folder)
    size = "x".join(str(length) for length in data.image_shape)
    name = config.data.path or config.data.name
    counts = f"{len(data.train)} training and {len(data.test)} test images of {size}, {data.num_classes} classes"
    print(f"{name}: {counts}, in {folder}")
    return ExitCode.DONE
