"""Where images come from: a registry of sources, each a stream of (image, label) for every split."""

import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedfreeze.config import DataConfig
from fedfreeze.errors import DataError, UnavailableError, one_line

Sample = tuple[np.ndarray, int]  # image: uint8 of shape (channels, height, width); label

IMAGE_COLUMNS = ("img", "image", "images")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val")}


class Source(Protocol):
    """A data set that can be decoded."""

    def fingerprint(self) -> str:
        """Return a text that changes when the data does; it names the decoded store."""

    def splits(self) -> dict[str, Iterator[Sample]]:
        """Return the streams `train` and `test`. Raises DataError."""


class Digits:
    """scikit-learn's embedded digits: 1,797 real 8x8 grey images; every fifth of a class is test data."""

    def fingerprint(self) -> str:
        """See Source."""
        return "digits-1"

    def splits(self) -> dict[str, Iterator[Sample]]:
        """See Source."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        order = np.argsort(digits.target, kind="stable")
        test = order[::5]
        train = np.setdiff1d(order, test)
        return {
            name: iter([(images[i], int(digits.target[i])) for i in rows])
            for name, rows in (("train", train), ("test", test))
        }


class HuggingFace:
    """A folder of Parquet files, or a data set of the hub, read by Hugging Face `datasets`."""

    def __init__(self, config: DataConfig):
        self.location = config.path or config.name
        self.is_local = config.path is not None

    def fingerprint(self) -> str:
        """See Source. Local files count by name, size and time of change."""
        if not self.is_local:
            return f"hub:{self.location}"
        files = _data_files(Path(self.location))
        try:
            facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        except OSError as error:
            raise DataError(f"data {self.location}: {error.filename} cannot be read: {error.strerror}") from None
        return json.dumps([os.path.realpath(self.location), facts])

    def splits(self) -> dict[str, Iterator[Sample]]:
        """See Source."""
        loaded = self._load()
        streams = {}
        for split, names in SPLITS.items():
            found = next((name for name in names if name in loaded), None)
            if found is None:
                raise DataError(
                    f"no {split} split (found: {', '.join(loaded) or 'none'}); name the files {split}-*.parquet"
                )
            streams[split] = self._samples(loaded[found], split)
        return streams

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UnavailableError("reading Parquet needs the package `datasets`; pip install datasets") from None
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        datasets.logging.set_verbosity(logging.CRITICAL)  # a user's error is one line, and it is ours
        try:
            if self.is_local:
                files = [str(file) for file in _data_files(Path(self.location))]
                present = {name: _named(files, name) for names in SPLITS.values() for name in names}
                present = {name: [glob.escape(file) for file in found] for name, found in present.items() if found}
                # streaming: no second copy of the data in another cache
                return datasets.load_dataset("parquet", data_files=present, streaming=True) if present else {}
            return datasets.load_dataset(self.location, streaming=True)
        except Exception as error:  # every reader below `datasets` has errors of its own
            hint = "" if self.is_local else "; without a network give --data.path=FOLDER of Parquet files"
            raise DataError(f"it cannot be read: {one_line(error)[:200]}{hint}") from None

    def _samples(self, rows: Any, split: str) -> Iterator[Sample]:
        mode = None
        row = -1
        try:
            for row, record in enumerate(rows):
                if row == 0:
                    image_column = _column(record, IMAGE_COLUMNS, "image", self.location)
                    label_column = _column(record, LABEL_COLUMNS, "label", self.location)
                image, mode = _decode(record[image_column], mode)
                label = record[label_column]
                if not isinstance(label, int):
                    raise DataError(f"label {label!r} is not a whole number")
                yield image, label
        except Exception as error:  # a torn file or image: name the place, whatever the reader calls it
            raise DataError(
                f"split {split}, row {row + 1}: {one_line(error)[:200]}; check or fetch the files again"
            ) from None


def make_source(config: DataConfig) -> Source:
    """Return the source that the configuration names; `path` wins over `name`. Raises DataError."""
    if config.path is None and config.name == "digits":
        return Digits()
    if config.path is not None:
        _data_files(Path(config.path))
    return HuggingFace(config)


def fingerprint_key(source: Source) -> str:
    """Return a short name for the decoded store of a source."""
    return hashlib.blake2b(source.fingerprint().encode(), digest_size=8).hexdigest()


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"data.path {folder} is not a folder; give the folder that holds train-*.parquet")
    files = sorted(folder.glob("**/*.parquet"))
    if not files:
        raise DataError(f"data.path {folder} holds no .parquet file; give the folder that holds train-*.parquet")
    return files


def _named(files: list[str], split: str) -> list[str]:
    """Return the files of a split: its name, then an end or something that is not a letter (`val` is not `valid`)."""
    return [file for file in files if re.match(rf"{split}(?![a-z])", Path(file).name.lower())]


def _column(record: dict[str, Any], names: tuple[str, ...], what: str, location: str) -> str:
    found = next((name for name in names if name in record), None)
    if found is None:
        raise DataError(f"no {what} column (one of {', '.join(names)}); found: {', '.join(record)}")
    return found


def _decode(value: Any, mode: str | None) -> tuple[np.ndarray, str]:
    """Decode one image to uint8 (channels, height, width), grey or colour as the first image of the split was."""
    from PIL import Image

    if isinstance(value, dict):
        data = value.get("bytes")
        if data is None:
            raise DataError("the image has no bytes")
        value = Image.open(io.BytesIO(data))
    if not isinstance(value, Image.Image):
        raise DataError(f"the image is {type(value).__name__}, not encoded bytes")
    if mode is None:
        mode = "L" if value.mode in ("1", "L", "LA") or value.mode.startswith("I") else "RGB"
    if value.mode.startswith("I") and mode == "L":  # 16-bit grey: Pillow's own conversion would clip at 255
        pixels = (np.asarray(value).astype(np.int64) >> 8).astype(np.uint8)
    else:
        pixels = np.asarray(value.convert(mode), dtype=np.uint8)
    return (pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))), mode
