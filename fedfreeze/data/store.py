"""The decoded data: one memory-mapped uint8 file a split, written once a node, whole or not at all."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.decode import BeginAgain, unequal
from fedfreeze.data.identity import note_content
from fedfreeze.data.sources import Sample, Source, fingerprint_key, make_source
from fedfreeze.errors import DataError, StorageError, storage_error
from fedfreeze.storage import lock

VERSION = 3  # of what is decoded and how: a store of another version is left alone
MAX_CLASSES = 100_000  # a larger label is a mistake, and would ask for a classifier of that size
NO_SPACE_ADVICE = "free space or choose another folder by --data.cache_dir=FOLDER"
BLOCK = 2**20  # pixels of a channel summed at once: an image may be large, and sums take 8 bytes a pixel


@dataclass(frozen=True)
class Split:
    """One split: `images` uint8 (samples, channels, height, width), memory-mapped; `labels` int64 (samples,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A decoded data set; `mean` and `std` are of the training images, a channel, in [0, 1]."""

    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None
    """The name of each class, by label; None where the source gives none."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of decoded data: `data.cache_dir`, else the user's cache folder.

    Raises StorageError where there is no such: a container's user may have no name and no home.
    """
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedfreeze"
    except RuntimeError:
        raise StorageError(
            f"no place for decoded data on {socket.gethostname()}: HOME is not set and user {os.getuid()} has no home; "
            "give a folder by --data.cache_dir=FOLDER"
        ) from None


def store_folder(config: DataConfig) -> Path:
    """Return where the decoded data lies, or will. Raises DataError if the source cannot be read."""
    return cache_folder(config) / f"v{VERSION}-{fingerprint_key(make_source(config))}"


def prepare(config: DataConfig) -> Path:
    """Decode the data if no process did before, and return the folder of the store.

    Every rank may call this: the first to come decodes, the others of the node wait for its lock, however long that
    takes, and not in a collective, which would time out.

    Written under a temporary name and renamed, so that two processes cannot spoil each other's work and a kill leaves
    nothing half-written under the final name. Raises DataError, StorageError.
    """
    source, final = make_source(config), store_folder(config)
    try:
        if (final / "meta.json").is_file():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        lock_path = final.with_name(f"{final.name}.lock")
        descriptor = lock.take(lock_path, wait=True)
        assert descriptor is not None
        try:
            if not (final / "meta.json").is_file():
                _decode(source, final, str(config.path or config.name))
        finally:
            lock.give_back(descriptor, lock_path)
    except OSError as error:
        raise storage_error("write decoded data to", final.parent, error, NO_SPACE_ADVICE) from None
    return final


def _decode(source: Source, final: Path, name: str) -> None:
    for left in final.parent.glob(f"{final.name}.tmp-{socket.gethostname()}-*"):
        if not Path("/proc", left.name.split("-")[-2]).exists():  # its writer was killed
            shutil.rmtree(left, ignore_errors=True)
    temporary = final.with_name(f"{final.name}.tmp-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        temporary.mkdir()  # not by mkdtemp, whose folders are closed to colleagues
        try:
            _write_store(source.splits(), temporary)
        except BeginAgain:
            _write_store(source.splits(), temporary)
        _note_names(source.class_names(), temporary)
        note_content(temporary)
        _move_into_place(temporary, final)
    except DataError as error:
        raise DataError(f"data {name}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if (final / "meta.json").is_file():
            return  # lost the race against another process: its store serves
        shutil.rmtree(final, ignore_errors=True)  # somebody deleted a part of it
        temporary.rename(final)


def open_store(folder: Path) -> Data:
    """Open a prepared store; images stay on disk and are mapped. Raises DataError if it was tampered with."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        shape = tuple(meta["image_shape"])
        splits = {}
        for name in ("train", "test"):
            labels = np.load(folder / f"{name}.labels.npy")
            images = np.memmap(folder / f"{name}.images.u8", np.uint8, mode="r", shape=(len(labels), *shape))
            splits[name] = Split(images, labels)
        figures = meta["num_classes"], tuple(meta["mean"]), tuple(meta["std"])
        names = meta.get("class_names")
        return Data(splits["train"], splits["test"], *figures, None if names is None else tuple(names))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"decoded data in {folder} is damaged ({error}); delete that folder and run again") from None


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Turn uint8 (batch, channels, height, width) into float32 of zero mean and unit variance a channel."""
    scale, shift = (_scale_and_shift_once if images.is_cuda else _scale_and_shift)(mean, std, images.device)
    return images.float().mul_(scale).sub_(shift)


def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None]
    return scale, shift


@lru_cache(maxsize=8)
def _scale_and_shift_once(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same, made once: each copy to a GPU waits for what is queued there."""
    with torch.inference_mode(False):  # they are used in training, too, whoever asks first
        return _scale_and_shift(mean, std, device)


def _write_store(streams: dict[str, Iterator[Sample]], folder: Path) -> None:
    shape: tuple[int, ...] | None = None
    labels: dict[str, np.ndarray] = {}
    total = square = np.zeros(0)
    for name, stream in streams.items():
        found: list[int] = []
        with open(folder / f"{name}.images.u8", "wb") as file:
            for image, label in stream:
                if shape is None:
                    shape = image.shape
                    total, square = np.zeros(shape[0]), np.zeros(shape[0])
                if image.shape != shape:
                    raise unequal(f"split {name}, row {len(found) + 1}", image.shape, "the first", shape)
                if label >= MAX_CLASSES:
                    raise DataError(f"split {name}, row {len(found) + 1}: label {label} is over {MAX_CLASSES - 1}")
                if label < 0:
                    raise DataError(f"split {name}, row {len(found) + 1}: label {label} is negative (a missing label?)")
                if name == "train":
                    pixels = image.reshape(shape[0], -1)
                    for start in range(0, pixels.shape[1], BLOCK):
                        block = pixels[:, start : start + BLOCK].astype(np.float64)
                        total += block.sum(1)
                        square += (block**2).sum(1)
                file.write(np.ascontiguousarray(image).data)
                found.append(label)
        if not found:
            raise DataError(f"split {name} holds no samples")
        labels[name] = np.array(found, dtype=np.int64)
        np.save(folder / f"{name}.labels.npy", labels[name])
    assert shape is not None
    num_classes = _count_classes(labels["train"])
    if labels["test"].max() >= num_classes:
        raise DataError(
            f"split test has label {labels['test'].max()}, split train only 0 to {num_classes - 1}; check the splits"
        )
    count = len(labels["train"]) * shape[1] * shape[2]
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 1.0))  # at least one grey level: a constant channel stays finite
    meta = {
        "image_shape": list(shape),
        "num_classes": num_classes,
        "mean": (mean / 255).tolist(),
        "std": (std / 255).tolist(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _note_names(names: list[str] | None, folder: Path) -> None:
    """Add the names of the classes that the training data has; fewer names than classes are none."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    whole = names is not None and len(names) >= meta["num_classes"]
    path.write_text(json.dumps(meta | {"class_names": names[: meta["num_classes"]] if names and whole else None}))


def _count_classes(labels: np.ndarray) -> int:
    """Return the number of classes of the training labels, 0 to n-1. Raises DataError if one has no sample."""
    found = np.unique(labels)
    if len(found) < 2:
        raise DataError("split train holds a single class; at least two are needed")
    for label, wanted in zip(found.tolist(), range(len(found)), strict=True):
        if label != wanted:
            raise DataError(
                f"split train has no sample of class {wanted}, though labels go up to {found[-1]}; "
                f"renumber the labels 0 to {len(found) - 1}, in both splits"
            )
    return len(found)
