"""What a decoded data set is, wherever it lies: a digest of its shape, labels and pixels."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedfreeze.errors import DataError

SPLIT_FILES = ("train.labels.npy", "train.images.u8", "test.labels.npy", "test.images.u8")
_BLOCK_BYTES = 2**22
_READ_ANYWAY_BYTES = 2**28  # a smaller store is read at each start, which takes less than a second


@dataclass(frozen=True)
class Identity:
    """The content of a store."""

    digest: str
    """Of what the files hold now: the same for the same images and labels in the same order."""
    intact: bool
    """Whether the files hold what was decoded into them."""


def content_digest(folder: Path) -> str:
    """Return the digest of a store, all of which is read. Raises OSError, ValueError, KeyError."""
    meta = json.loads((folder / "meta.json").read_text())
    digest = hashlib.sha256(json.dumps([list(meta["image_shape"]), meta["num_classes"]]).encode())
    for name in SPLIT_FILES:
        if name.endswith(".npy"):
            digest.update(np.load(folder / name).astype("<i8").tobytes())
            continue
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def note_content(folder: Path) -> None:
    """Write the digest of a store that was just decoded, and how its files look on disk, into its meta.json."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"content": {"digest": content_digest(folder), "stamps": _stamps(folder)}}))


def identify(folder: Path) -> Identity:
    """Return what a store holds. Raises DataError if it was tampered with so that it cannot be read.

    A large store whose files have the size and time of change that they were written with is not read again.
    """
    try:
        noted = json.loads((folder / "meta.json").read_text()).get("content")
        stamps = _stamps(folder)
        large = sum(size for size, _ in stamps.values()) > _READ_ANYWAY_BYTES
        if noted and large and noted["stamps"] == stamps:
            return Identity(noted["digest"], intact=True)
        digest = content_digest(folder)
        return Identity(digest, intact=not noted or noted["digest"] == digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(f"decoded data in {folder} is damaged ({error}); delete that folder and run again") from None


def is_same(recorded: Any, store: Path, identity: Identity) -> bool:
    """Tell whether what a checkpoint recorded of its data is the data of a store.

    A checkpoint of a version before this one has the name of its store (v2-...), which follows from path, names and
    times of the files. Where that store is in the same cache its content decides; else equal names are the same data,
    unless ours is no longer what was decoded.
    """
    if recorded == identity.digest:
        return True
    if not isinstance(recorded, str) or not re.fullmatch(r"v2-[0-9a-f]{16}", recorded):
        return False
    before = store.parent / recorded
    try:
        return content_digest(before) == identity.digest
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # not there, or no longer whole
        return identity.intact and recorded.partition("-")[2] == store.name.partition("-")[2]


def _stamps(folder: Path) -> dict[str, list[int]]:
    found = {name: (folder / name).stat() for name in SPLIT_FILES}
    return {name: [facts.st_size, facts.st_mtime_ns] for name, facts in found.items()}
