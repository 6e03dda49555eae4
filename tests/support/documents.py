"""Reads the documents: their blocks, and the commands in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.checks import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"  # tests/test_extending.py runs what is in it
PROGRAMS = "fedfreeze|python3?|torchrun|bash|sh|pip|conda|wandb|export|git|cd|srun|sbatch|scancel|mpirun|apt-get|source"
COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:{PROGRAMS}|\.) \S")


@dataclass
class Block:
    """A fenced or indented block of a document."""

    language: str
    """Of a fence; empty for an indented block."""
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def is_python(self) -> bool:
        return self.language == "python" or (not self.language and self.lines[0].startswith(("import ", "from ")))


def blocks_of(document: Path) -> Iterator[Block]:
    """Yield fenced blocks, and indented ones (four spaces, after an empty line)."""
    block: Block | None = None
    fenced = False
    before = ""
    for line in document.read_text().splitlines():
        if line.startswith("```"):
            if fenced and block is not None:
                yield block
            block = None if fenced else Block(line.removeprefix("```").strip())
            fenced = not fenced
        elif fenced and block is not None:
            block.lines.append(line)
        elif line.startswith("    ") and (block is not None or not before.strip()):
            block = block or Block("")
            block.lines.append(line[4:])
        elif block is not None:
            yield block
            block = None
        before = line
    if block is not None:
        yield block


def commands_of(document: Path) -> list[str]:
    """Return the commands in a document, in order, without comments, continued lines joined."""
    found = []
    for block in blocks_of(document):
        if block.is_python or block.language in ("python", "yaml"):
            continue
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            command = re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ")
            if COMMAND.match(command):
                found.append(command)
    return found
