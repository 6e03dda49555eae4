"""Checkpoints: written whole or not at all, verified when read, safetensors and JSON only."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save as serialise_numpy
from safetensors.torch import load_file
from safetensors.torch import save as serialise

import fedfreeze
from fedfreeze.errors import DataError, one_line, storage_error

VERSION = 1

# What reading a damaged or foreign file can raise.
_TORN = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back: the method's tensors, plain state, and the window's updates by round."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    updates: list[tuple[int, np.ndarray]]
    written_by: str | None = None
    """The version of fedfreeze; none: it does not say, as an older one."""


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    round-NNNNNN/ holds weights.safetensors and state.json; updates/ holds the update of each round that the
    perturbation window still needs, each written once however many checkpoints refer to it.
    """

    def __init__(self, folder: Path, keep: int, notice: Callable[[str], None]):
        self.folder = folder
        self.keep = keep
        self.notice = notice
        self._update_digests: dict[int, str] = {}
        self._needed_by: dict[str, set[int]] = {}  # folder of a checkpoint -> rounds whose updates it refers to

    def save(
        self,
        round_number: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        updates: Iterable[tuple[int, np.ndarray]],
    ) -> None:
        """Write a checkpoint under a temporary name, then rename it; drop what is no longer needed.

        Raises StorageError.
        """
        final = self.folder / f"round-{round_number:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            for folder in (self.folder, self.folder / "updates"):
                folder.mkdir(exist_ok=True)  # not its parents: a run folder that was deleted is not made again
            _remove(temporary)
            temporary.mkdir()
            needed = [self._save_update(number, update) for number, update in updates]
            weights = temporary / "weights.safetensors"
            weights.write_bytes(weight_bytes(tensors))
            content = {
                "version": VERSION,
                "fedfreeze": fedfreeze.__version__,
                "round": round_number,
                "weights_digest": _digest(weights),
                "updates": needed,
                "state": state,
            }
            text = json.dumps(content, sort_keys=True)
            with open(temporary / "state.json", "w", encoding="utf-8") as file:
                file.write(json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
            for file_name in ("weights.safetensors", "state.json"):
                _sync(temporary / file_name)
            _remove(final)  # one that was torn, or from rounds that are done again
            temporary.rename(final)
            _sync(self.folder)
            self._needed_by[final.name] = {number for number, _ in needed}
            self._drop_old()
        except BaseException as error:  # Ctrl-C too leaves nothing half-written
            _remove(temporary)
            for half in (self.folder / "updates").glob(".*.tmp"):
                _remove(half)
            if isinstance(error, OSError):
                raise storage_error("write checkpoint", final, error) from None
            raise

    def load_newest(self, restore: Callable[[Checkpoint], None] = lambda found: None) -> Checkpoint | None:
        """Restore the newest checkpoint that is whole, saying so where a newer one was torn; None if there is none.

        One whose state `restore` cannot take counts as torn. Raises DataError if there are checkpoints but none can be
        read, or one is of a newer version.
        """
        candidates = self._rounds()[::-1]
        reasons: list[str] = []
        for i, folder in enumerate(candidates):
            found: Checkpoint | None = None
            try:
                found = self._load(folder)
                restore(found)
            except (*_TORN, OSError) as error:
                reason = f"is torn ({one_line(error)[:120]})"
                if found is not None and isinstance(error, KeyError):  # whole, but of a version that noted less
                    by = f"fedfreeze {found.written_by}" if found.written_by else "an older fedfreeze"
                    reason = f"lacks {error}, which fedfreeze {fedfreeze.__version__} needs; {by} wrote it"
                reasons.append(f"{folder.name} {reason}")
                self.notice(f"checkpoint {reasons[-1]}; trying the one before")
                continue
            for torn in candidates[:i]:  # they must not take the place of whole ones among those that are kept
                _remove(torn)
            self._drop_old()  # of an older one a process that ended may have left a part
            return found
        if candidates:
            raise DataError(
                f"none of the {len(candidates)} checkpoints in {self.folder} can be read ({reasons[0]}); delete the "
                "run folder to start anew"
            )
        return None

    def _load(self, folder: Path) -> Checkpoint:
        outer = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if hashlib.sha256(outer["content"].encode()).hexdigest() != outer["digest"]:
            raise ValueError("state.json does not match its digest")
        content = json.loads(outer["content"])
        if content["version"] != VERSION:
            raise DataError(
                f"checkpoint {folder} has format {content['version']}, this fedfreeze reads {VERSION}; "
                f"use the version that wrote it{', ' + str(content['fedfreeze']) if 'fedfreeze' in content else ''}"
            )
        if _digest(folder / "weights.safetensors") != content["weights_digest"]:
            raise ValueError("weights.safetensors does not match its digest")
        updates = []
        for number, digest in content["updates"]:
            path = self._update_path(number)
            if _digest(path) != digest:
                raise ValueError(f"{path.name} does not match its digest")
            updates.append((number, load_numpy(path)["update"]))
        self._update_digests = dict(content["updates"])
        tensors = load_file(folder / "weights.safetensors")
        return Checkpoint(tensors, content["state"], updates, content.get("fedfreeze"))

    def _save_update(self, number: int, update: np.ndarray) -> tuple[int, str]:
        if number not in self._update_digests:
            path = self._update_path(number)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(serialise_numpy({"update": update}))
            _sync(temporary)
            digest = _digest(temporary)
            temporary.rename(path)
            self._update_digests[number] = digest
        return number, self._update_digests[number]

    def _update_path(self, number: int) -> Path:
        return self.folder / "updates" / f"round-{number:06d}.safetensors"

    def _rounds(self) -> list[Path]:
        # by number: with seven digits the later round comes first in the alphabet
        return sorted(self.folder.glob("round-*"), key=lambda folder: (len(folder.name), folder.name))

    def _drop_old(self) -> None:
        kept = self._rounds()[-self.keep :]
        for folder in self._rounds()[: -self.keep]:
            _remove(folder)
        self._needed_by = {folder.name: self._needed_of(folder) for folder in kept}
        needed = set().union(*self._needed_by.values())
        for path in (self.folder / "updates").glob("round-*.safetensors"):
            number = path.stem.removeprefix("round-")
            if number.isdecimal() and int(number) not in needed:
                path.unlink(missing_ok=True)
                self._update_digests.pop(int(number), None)

    def _needed_of(self, folder: Path) -> set[int]:
        """Return the rounds whose updates a checkpoint refers to; one of an earlier life of the run is read."""
        if folder.name in self._needed_by:
            return self._needed_by[folder.name]
        try:
            outer = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return {number for number, _ in json.loads(outer["content"])["updates"]}
        except (*_TORN, OSError):
            return set()  # torn: it cannot be used, so it needs nothing


def weight_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file, without metadata: nothing in it differs between runs.

    As bytes and not by safetensors' own writer, which makes files that only their owner can read.
    """
    return serialise({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
