"""Where images come from: a registry of sources, each a stream of (image, label) for every split."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.decode import FOLDER_FORMS, SPLITS, Sample, pixels_of
from fedfreeze.data.huggingface import HuggingFace
from fedfreeze.data.image_folder import ImageFolder
from fedfreeze.data.parquet_files import named, parquet_files
from fedfreeze.data.synthetic import Synthetic
from fedfreeze.errors import ConfigError, DataError


class Source(Protocol):
    """A data set that can be decoded."""

    def fingerprint(self) -> str:
        """Return a text that changes when the data does; it names the decoded store."""

    def splits(self) -> dict[str, Iterator[Sample]]:
        """Return the streams `train` and `test`, to be read in this order. Raises DataError.

        A stream that raises BeginAgain is not at fault: the source has learnt from it, and is to be asked once more.
        """

    def class_names(self) -> list[str] | None:
        """Return the names of the classes, by label, once the splits were read; None where the source has none."""


class Digits:
    """scikit-learn's embedded digits: 1,797 real 8x8 grey images; every fifth of a class is test data."""

    def __init__(self, config: DataConfig | None = None):
        self.size = None if config is None else config.image_size

    def fingerprint(self) -> str:
        """See Source."""
        return f"digits-1 {self.size}"

    def class_names(self) -> list[str] | None:
        """See Source. The digits themselves."""
        return [str(digit) for digit in range(10)]

    def splits(self) -> dict[str, Iterator[Sample]]:
        """See Source."""
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        order = np.argsort(digits.target, kind="stable")
        test = order[::5]
        train = np.setdiff1d(order, test)
        return {
            name: iter([(pixels_of(Image.fromarray(images[i]), "L", self.size), int(digits.target[i])) for i in rows])
            for name, rows in (("train", train), ("test", test))
        }


EMBEDDED = {"digits": Digits, "synthetic": Synthetic}  # by data.name; any other name is one of the hub


def make_source(config: DataConfig) -> Source:
    """Return the source that the configuration names; `path` wins over `name`. Raises DataError, ConfigError."""
    if config.path is not None:
        return _local(config, config.path)
    if config.name not in EMBEDDED:
        return HuggingFace(config)
    _refuse(config, ("subset", "revision", "image_column", "label_column"), f"data.name={config.name} has none")
    if config.name == "synthetic":
        _refuse(config, ("image_size",), "data.synthetic_shape decides the size of data.name=synthetic")
    return EMBEDDED[config.name](config)


def fingerprint_key(source: Source) -> str:
    """Return a short name for the decoded store of a source."""
    return hashlib.blake2b(source.fingerprint().encode(), digest_size=8).hexdigest()


def _local(config: DataConfig, path: str) -> Source:
    _refuse(config, ("subset", "revision"), f"data.path={path} is no data set of the hub")
    folder = Path(path)
    if not os.path.isdir(folder):  # not Path.is_dir, which raises for a name that is too long
        raise DataError(f"data.path {path[:200]} is not a folder; give a folder of {FOLDER_FORMS}")
    files = parquet_files(folder)
    if any(named(files, name) for names in SPLITS.values() for name in names):
        return HuggingFace(config)
    try:
        source = ImageFolder(config)
    except DataError:
        if not files:
            raise
        return HuggingFace(config)  # which says how its files must be named
    _refuse(config, ("image_column", "label_column"), f"data.path={path} holds image folders, which have no columns")
    return source


def _refuse(config: DataConfig, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if getattr(config, key) is not None:
            raise ConfigError(f"data.{key}={getattr(config, key)}: {why}; leave data.{key} out")
