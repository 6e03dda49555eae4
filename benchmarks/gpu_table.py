"""Runs the checks of the GPU path, each in a process and a time of its own, and prints a table; see gpu.sh.

    python benchmarks/gpu_table.py [--minutes 10] [--only NAME ...] [--json FILE] [--profile FILE] [--device cuda]

A check prints a line of JSON for each row as soon as it stands, so that one that crashes, hangs or runs out of time
costs no more than its own rows. Nothing here imports torch.
"""

import argparse
import configparser
import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "ROW "
GRACE_S = 5.0  # a check looks at the clock itself; after this it is ended


@dataclass
class Row:
    """What was checked, and how it went."""

    what: str
    command: str = ""
    expected: str = ""
    seen: str = ""
    passed: bool | None = None
    """None: nothing was to be held, or it was not tried."""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return the word of the table."""
        return {True: "pass", False: "FAIL", None: "-"}[self.passed]


@dataclass(frozen=True)
class Check:
    """A group of rows: one process."""

    name: str
    limit_s: float
    """The most that it may take."""
    least_s: float = 20.0
    """It is not begun with less."""


# In the order of what must not be missed. Together they take more than ten minutes if each needs all of its time.
CHECKS = (
    Check("machine", 120),
    Check("caps", 100),
    Check("segments", 60),
    Check("kills", 90, 30),
    Check("bits", 150, 40),
    Check("speed", 240, 40),
    Check("study", 600, 60),
)


def print_row(row: Row) -> None:
    """Tell the parent of a row, now."""
    print(MARK + json.dumps(asdict(row)), flush=True)


def read_rows(text: str) -> list[Row]:
    """Return the rows among a check's output; a torn line is none."""
    rows = []
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                rows.append(Row(**json.loads(line.removeprefix(MARK))))
            except (ValueError, TypeError):
                continue
    return rows


def run_limited(
    command: Sequence[str], limit_s: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str, str]:
    """Run a command and all it starts for so long at most; return code (None: time was up), output and errors."""
    process = start(command, environment, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=limit_s)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        kill_all(process)
        out, err = process.communicate()
        return None, out, err


def start(
    command: Sequence[str], environment: dict[str, str] | None = None, *, stderr: int = subprocess.STDOUT
) -> "subprocess.Popen[str]":
    """Start a command in a session of its own, which goes when this process is killed; its output can be read."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill a process that `start` has started and all of its session; those that are gone, are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is killed (Linux): what a check has started goes with it."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def run_check(check: Check, options: Sequence[str], limit_s: float, program: Sequence[str]) -> list[Row]:
    """Run one check; return its rows, and one more where it did not come to its end."""
    command = [*program, "--check", check.name, "--seconds", f"{limit_s:.0f}", *options]
    shown = " ".join(["python", "benchmarks/gpu_checks.py", *command[len(program) :]])
    code, out, err = run_limited(command, limit_s + GRACE_S)
    rows = read_rows(out)
    if code is None:
        rows.append(Row(f"{check.name}: time", shown, f"done in {limit_s:.0f} s", "ended, as time was up", False))
    elif code != 0:
        last = [line for line in err.splitlines() if line.strip()][-1:]
        rows.append(Row(f"{check.name}: end", shown, "exit code 0", f"exit code {code}: {''.join(last)[:300]}", False))
    return rows


def run_checks(checks: Iterable[Check], seconds: float, options: Sequence[str], program: Sequence[str]) -> list[Row]:
    """Run checks one after the other while there is time; tell each row as it comes."""
    started = time.monotonic()
    found: list[Row] = []
    for check in checks:
        left = seconds - (time.monotonic() - started)
        if left < min(check.least_s, check.limit_s):
            rows = [Row(check.name, seen=f"not tried: {max(0.0, left):.0f} s were left")]
        else:
            rows = run_check(check, options, min(check.limit_s, left), program)
        for row in rows:
            print(f"{row.verdict:<5} {row.what}: {row.seen}", file=sys.stderr, flush=True)
        found += rows
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table for a terminal: what, verdict, expected and seen, and below it the command."""
    lines = [f"{'':<5} {'what':<44} {'expected':<34} seen", "-" * 120]
    for row in rows:
        columns = [textwrap.wrap(text, width) or [""] for text, width in ((row.what, 43), (row.expected, 33))]
        columns.append(textwrap.wrap(row.seen, 60) or [""])
        for number in range(max(map(len, columns))):
            what, expected, seen = (each[number] if number < len(each) else "" for each in columns)
            lines.append(f"{row.verdict if number == 0 else '':<5} {what:<44} {expected:<34} {seen}".rstrip())
        if row.command:
            lines += textwrap.wrap(row.command, 112, initial_indent="      $ ", subsequent_indent="        ")
    count = {word: sum(row.verdict == word for row in rows) for word in ("pass", "FAIL", "-")}
    return "\n".join(
        [*lines, "", f"{count['pass']} passed, {count['FAIL']} failed, {count['-']} only told or not tried"]
    )


def missing_packages() -> list[str]:
    """Return what setup.cfg asks for and this Python lacks, and what that asks for in turn as far as is known here."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = [re.split(r"[<>=]", line)[0] for line in parser["options"]["install_requires"].split()]
    wanted += ["pytest", "annotated-types", "pydantic-core", "typing-extensions", "typing-inspection", "iniconfig"]
    wanted += ["pluggy", "packaging", "markdown-it-py", "mdurl", "pygments"]
    found = []
    for name in wanted:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return found


def main(arguments: Sequence[str] | None = None, program: Sequence[str] | None = None) -> int:
    """Run the checks, print the table, write the JSON; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--profile", help="also write a trace of a run, for chrome://tracing or Perfetto")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    parser.add_argument("--missing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.missing:
        print(" ".join(missing_packages()))
        return 0
    started = time.monotonic()
    checks = [check for check in CHECKS if options.only is None or check.name in options.only]
    passed_on = ["--device", options.device, *(["--profile", options.profile] if options.profile else [])]
    program = program or [sys.executable, str(Path(__file__).with_name("gpu_checks.py"))]
    rows = run_checks(checks, 60 * options.minutes, passed_on, program)
    print(table(rows))
    failed = sum(row.passed is False for row in rows)
    found = {
        "command": "bash benchmarks/gpu.sh " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "seconds": round(time.monotonic() - started, 1),
        "failed": failed,
        "rows": [asdict(row) for row in rows],
    }
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"figures in {options.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
