"""Runs every line of a table of settings with several seeds, some at a time; what is finished is left alone.

    python benchmarks/sweep.py CONFIG TABLE OUT [--seeds 0 1 2] [--jobs 2] [--section.field=value ...]

A line of TABLE is a name and its overrides (`oort --select.name=oort`); `#` begins a comment. Run folders are
OUT/NAME-seedS, the log of each beside it; then compare them: `fedfreeze compare OUT/*/`.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from pathlib import Path

from fedfreeze.comm.launcher import Launch
from fedfreeze.config.file import load_config
from fedfreeze.errors import ConfigError
from fedfreeze.run.session import run_rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    options, overrides = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = read_table(options.table)
    tasks = [
        (options.config, [*overrides, *line], options.out, name, seed)
        for seed in options.seeds
        for name, line in settings
    ]
    failed = 0
    # forked, so that torch is imported once; one task a process, so that none inherits another's state
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for name, code, seconds in pool.imap_unordered(run_one, tasks, chunksize=1):
            print(f"{name}: exit {code}, {seconds:.0f} s", flush=True)
            failed += code != 0
    return int(failed > 0)


def read_table(path: Path) -> list[tuple[str, list[str]]]:
    """Return names and overrides."""
    lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    return [(words[0], words[1:]) for words in lines if words]


def run_one(task: tuple[str, list[str], Path, str, int]) -> tuple[str, int, float]:
    """Run one setting with one seed; return its name, exit code and seconds."""
    config_name, overrides, out, name, seed = task
    label = f"{name}-seed{seed}"
    started = time.monotonic()
    log = os.open(out / f"{label}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        config = load_config(config_name, [*overrides, f"--name={label}", f"--seed={seed}"])
        code = run_rank(config, out / label, Launch("none"))
    except ConfigError as error:
        print(f"fedfreeze: error: {error}", flush=True)
        code = int(error.exit_code)
    sys.stdout.flush()
    return label, code, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
