"""One finding a check, and all of them as a table or as JSON."""

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.text import Text

from fedfreeze.errors import ExitCode, storage_error
from fedfreeze.run.reporter import LastingConsole

_STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    advice: str = ""
    """What to do; empty where all is well."""
    exit_code: int = 0
    """Other than 0: it failed."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """ok | warning | FAILED."""
        return "FAILED" if self.exit_code else "warning" if self.advice else "ok"


def exit_code_of(findings: Sequence[Finding]) -> int:
    """Return the exit code of the first failure, else 0."""
    return next((finding.exit_code for finding in findings if finding.exit_code), int(ExitCode.DONE))


def print_findings(findings: Sequence[Finding], title: str) -> None:
    """Print the table; at a terminal wrapped to its width, in a log one line a check."""
    console = LastingConsole(highlight=False)
    width = max(len(finding.check) for finding in findings)
    indent = " " * (width + 11)
    wide = console.width if console.is_terminal else 10**6

    def wrapped(text: str) -> str:
        lines = [textwrap.fill(line, wide, subsequent_indent=indent) for line in text.splitlines()]
        return "\n".join(lines)

    console.print(title, markup=False, soft_wrap=True)
    for finding in findings:
        line = wrapped(f"{finding.check:<{width}}  {finding.state:<7}  {finding.found}")
        if finding.advice:
            line += "\n" + wrapped(f"{indent}-> {finding.advice}")
        text = Text(line)
        text.stylize(_STYLES[finding.state], width + 2, width + 9)
        console.print(text, soft_wrap=True)
    states = Counter(finding.state for finding in findings)
    warnings = f"{count(states['warning'], 'warning')}" if states["warning"] else "no warning"
    failed = f"{states['FAILED']} FAILED (exit code {exit_code_of(findings)})" if states["FAILED"] else "nothing failed"
    console.print(f"{failed}, {warnings}", markup=False, soft_wrap=True)


def print_json(findings: Sequence[Finding], **around: Any) -> None:
    """Print one object: what stands around, then the checks. Raises StorageError."""
    checks = [{"check": finding.check, "state": finding.state} | asdict(finding) for finding in findings]
    try:
        print(json.dumps({"exit_code": exit_code_of(findings), **around, "checks": checks}, indent=2), flush=True)
    except BrokenPipeError:
        LastingConsole().on_broken_pipe()
    except OSError as error:
        raise storage_error("write", getattr(sys.stdout, "name", "the output"), error) from None


def failed_as(check: str, exit_code: int, message: str) -> Finding:
    """Return what failed as a finding: what was found, and after the first semicolon what to do."""
    found, _, advice = message.partition("; ")
    return Finding(check, found, advice or "see `fedfreeze doctor --help`", exit_code, {"error": message})


def count(number: int, what: str) -> str:
    """Return `1 rank` or `2 ranks`."""
    return f"{number} {what}{'s' * (number != 1)}"
