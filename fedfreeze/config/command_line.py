"""What the commands of the command line share: CONFIG and overrides, run folders, types of options, and their help."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from fedfreeze.config.file import load_config, shipped_experiments
from fedfreeze.config.reference import section_keys, top_level_keys
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError, exit_code_help

# What argparse gives for adding commands; its class is private.
Commands = Any


def add_config_command(
    commands: Commands,
    name: str,
    function: Callable[[Config, argparse.Namespace], int],
    summary: str,
    *,
    sections: Sequence[str] = (),
    optional: bool = False,
) -> argparse.ArgumentParser:
    """Add a command that takes a configuration, or may go without; its help has the keys of `sections`, or all."""
    epilog = f"{_keys_help(sections)}\n\n{exit_code_help()}"
    command = _add(commands, name, summary, f"{_sentence(summary)}.", epilog)
    shipped = ", ".join(shipped_experiments())
    nargs = "?" if optional else None
    command.add_argument(
        "config", metavar="CONFIG", nargs=nargs, help=f"a YAML file, or a shipped experiment: {shipped}"
    )
    command.set_defaults(command=lambda options, rest: function(load_config(options.config, overrides(rest)), options))
    return command


def add_run_folders_command(
    commands: Commands,
    name: str,
    function: Callable[[list[str], argparse.Namespace], int],
    summary: str,
    *,
    more: str,
    options: str,
) -> argparse.ArgumentParser:
    """Add a command that takes run folders and no configuration.

    `more`: what its help says beyond the summary. `options`: those that it has, for whoever gives another.
    """
    command = _add(commands, name, summary, f"{_sentence(summary)}. {more}", exit_code_help())
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as runs/digits")

    def call(given: argparse.Namespace, rest: Sequence[str]) -> int:
        unknown = next((item for item in rest if item.startswith("-")), None)
        if unknown is not None:
            raise ConfigError(f"{name} has no option {unknown}; it takes run folders, {options}")
        return function([*given.runs, *rest], given)  # argparse leaves the folders that stand after an option

    command.set_defaults(command=call)
    return command


def _add(commands: Commands, name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}"


def positive(text: str) -> int:
    """Return an option's value as a whole number, 1 to 999999. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def overrides(rest: Sequence[str]) -> list[str]:
    """Take `--a.b=c` and `--a.b c` from what argparse does not know. Raises ConfigError for anything else."""
    found: list[str] = []
    items = iter(rest)
    for item in items:
        if not item.startswith("--") or item == "--":
            raise ConfigError(f"unexpected argument {item!r}; overrides are written --section.field=value")
        if "=" not in item:
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{item} needs a value, as in {item}=VALUE")
            item = f"{item}={value}"
        found.append(item)
    return found


def _keys_help(sections: Sequence[str]) -> str:
    """Return every key (of some sections) with its default and description, from the dataclasses themselves."""
    lines = ["configuration keys (--section.field=value; defaults shown, a shipped experiment sets its own):"]
    keys = [*top_level_keys(), *(key for _, _, keys in section_keys() for key in keys)]
    if sections:
        keys = [key for key in keys if key.name.partition(".")[0] in sections]
    for key in keys:
        choices = f" [{' | '.join(key.choices)}]" if key.choices else ""
        lines.append(f"  --{key.name}={key.default}{choices}\n      {key.meaning.replace('%', '%%')}")
    return "\n".join(lines)
