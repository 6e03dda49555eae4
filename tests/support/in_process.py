"""Runs the command line in this process on bad inputs, and tells what it said and what it left behind."""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedfreeze.cli import main
from tests.support.launching import write_config

RUN_DIR = "deep/run"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID")

# A network that costs next to nothing, and the start of every module of a user's own.
TINY = """
from collections import OrderedDict
import torch
from torch import nn

def tiny(num_classes, in_channels, image_size):
    return nn.Sequential(OrderedDict(
        a=nn.Conv2d(in_channels, 4, 3, padding=1), relu=nn.ReLU(), b=nn.Conv2d(4, 4, 3, padding=1), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, num_classes),
    ))
"""

# As little as a run can be that has stages, checkpoints and a network to deploy.
TINY_RUN: dict[str, Any] = {
    "model": {"factory": "mine:tiny", "split": ["a", "b"]},
    "fleet": {"devices": 4, "memory_cap_mib": 4.0},
    "train": {"rounds": 6, "participants": 3, "batch_size": 64},
    "pace": {"policy": "fixed"},
    "eval": {"every_rounds": 1},
}


class HungError(BaseException):
    """Raised in a run that does not end; no `except Exception` of the product stops it."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    changed: list[str]
    """Files and folders that are there now, or differ, and were not so before."""


@dataclass(frozen=True)
class Bad:
    """One bad input and what must be said of it."""

    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    code: int = 64
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the configuration SMALL."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None
    config: str = "small.yaml"
    arguments: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The bad input in short, for the table."""
        if self.arguments is not None:
            return "fedfreeze " + " ".join(self.arguments)
        parts = [f"{key}={value}" for key, value in self.environment.items()]
        if self.config != "small.yaml":
            parts.append(self.config)
        for section, change in self.sections.items():
            changes = change.items() if isinstance(change, dict) else [("", change)]
            parts += [f"--{section}.{key}={value}".replace(".=", "=") for key, value in changes]
        return " ".join([*parts, *self.options]) or "files as in the case"


def own(source: str, **sections: Any) -> dict[str, Any]:
    """Return the keywords of a case in which a module `mine` of the user's own is at fault."""
    values = {key: dict(value) for key, value in TINY_RUN.items()}
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    return {"files": {"mine.py": TINY + source}, "sections": values}


def run_case(case: Bad, folder: Path) -> Outcome:
    """Write the files of a case into a folder, run it there, and tell how it went."""
    write_config(folder, **case.sections)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.prepare is not None:
        case.prepare(folder)
    arguments = case.arguments or ("run", case.config, "--run-dir", RUN_DIR, *case.options)
    return attempt(folder, *arguments, environment=case.environment)


def attempt(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 60
) -> Outcome:
    """Run the command line in this process, in a folder; one that hangs is ended with HungError."""
    before = tree(folder)
    with quiet_process(folder, environment or {}), captured() as (out, err), deadline(timeout_s):
        try:
            code = main(list(arguments))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    after = tree(folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Outcome(int(code), out.getvalue(), err.getvalue(), changed)


def assert_refused(outcome: Outcome, code: int, *says: str) -> None:
    """One line that says what it must, with the right code, and nothing left behind."""
    assert outcome.code == code, f"code {outcome.code}: {outcome.err}"
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("fedfreeze: error: "), outcome.err
    for words in says:
        assert words in outcome.err, outcome.err
    assert len(outcome.err) < 1500, "a line that nobody can read"
    assert outcome.changed == []


def check_refused(name: str, case: Bad, folder: Path) -> None:
    """Run a case, keep its row, and see it refused."""
    outcome = run_case(case, folder)
    note(name, case.shown, outcome.code, outcome.err)
    assert_refused(outcome, case.code, *case.says)


def tree(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, by relative name; an empty cache and Python's own caches do not count."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if "__pycache__" in name or (name == "cache" and path.is_dir()):
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            try:
                found[name] = path.read_bytes()
            except OSError as error:
                found[name] = error.errno
        else:
            found[name] = "folder"
    return found


@contextlib.contextmanager
def deadline(timeout_s: float) -> Iterator[None]:
    """Raise HungError in what takes longer."""

    def hung(*_: object) -> None:
        raise HungError(f"it did not end within {timeout_s} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Catch what is printed, also by C code."""
    out, err = io.StringIO(), io.StringIO()
    here = [os.dup(1), os.dup(2)]
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.dup2(write, 1)
    os.dup2(write, 2)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        for number, kept in enumerate(here, start=1):
            os.dup2(kept, number)
            os.close(kept)
        os.close(write)
        with contextlib.suppress(BlockingIOError):
            err.write(os.read(read, 10**6).decode(errors="replace"))
        os.close(read)


@contextlib.contextmanager
def quiet_process(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Put back all that a run changes in its process: signals, torch's settings, modules, paths, variables."""
    import torch

    handler, threads, generator = signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.get_rng_state()
    path, modules, variables, here = list(sys.path), set(sys.modules), dict(os.environ), os.getcwd()
    os.chdir(folder)
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        torch.set_num_threads(threads)
        torch.set_rng_state(generator)
        signal.signal(signal.SIGINT, handler)


def note(case: str, shown: str, code: object, message: str) -> None:
    """Keep a row for the table that `python -m tests.test_bad_inputs` prints."""
    if table := os.environ.get("BAD_INPUTS_TABLE"):
        with open(table, "a", encoding="utf-8") as file:
            file.write(json.dumps([case, shown, str(code), " ".join(message.split())]) + "\n")


def png(shade: int = 0, *, size: tuple[int, int] = (8, 8), seed: int | None = None) -> bytes:
    """Return a grey PNG image."""
    from PIL import Image

    pixels = np.full(size, shade, np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(folder: Path, *, classes: int = 2, each: int = 4) -> None:
    """Write FOLDER/data/train/CLASS/*.png and test."""
    for split in ("train", "test"):
        for label in range(classes):
            place = folder / "data" / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(each):
                (place / f"{index}.png").write_bytes(png(seed=label * 100 + index))


def parquet(folder: Path, split: str, labels: list[Any], images: list[Any] | None = None, column: str = "img") -> Path:
    """Write FOLDER/data/SPLIT-00000-of-00001.parquet."""
    import pyarrow
    from pyarrow import parquet as writer

    rows = [{"bytes": data, "path": None} for data in images or [png(seed=i) for i in range(len(labels))]]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (folder / "data").mkdir(exist_ok=True)
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    writer.write_table(pyarrow.table({column: pyarrow.array(rows, kind), "label": pyarrow.array(labels)}), file)
    return file
