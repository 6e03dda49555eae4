"""Image folders: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, the classes numbered in the order of names."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.decode import FOLDER_FORMS, SPLITS, Sample, mode_of, open_image, pixels_of, reason, unequal
from fedfreeze.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NAMES_SHOWN = 8  # of what a folder holds, in an error

T = TypeVar("T")


class ImageFolder:
    """A folder of image files, one folder a class; colour if any image is, so that none loses its colours."""

    def __init__(self, config: DataConfig):
        """List the files. Raises DataError if the folder is not laid out as it should be."""
        assert config.path is not None
        self.folder = Path(config.path)
        self.size = config.image_size
        self.names: list[str] = []  # of the classes, by label
        self.first: tuple[str, tuple[int, ...]] | None = None  # the image that gives the shape to all
        try:
            self.files = self._list()
        except OSError as error:
            raise self._error(f"{error.filename} cannot be read: {reason(error)}; check its permissions") from None

    def fingerprint(self) -> str:
        """See Source. Files count by relative name, size and time of change."""
        digest = hashlib.blake2b(digest_size=16)  # not the facts themselves: there may be millions
        for files in self.files.values():
            for name, label in files:
                try:
                    facts = os.stat(self.folder / name)
                except OSError as error:
                    raise self._error(
                        f"{name} cannot be read: {reason(error)}; check or fetch the file again"
                    ) from None
                digest.update(json.dumps([name, label, facts.st_size, facts.st_mtime_ns]).encode())
        return json.dumps(["images", os.path.realpath(self.folder), digest.hexdigest(), self.size])

    def class_names(self) -> list[str] | None:
        """See Source. The names of the class folders."""
        return self.names

    def splits(self) -> dict[str, Iterator[Sample]]:
        """See Source."""
        # only the heads of the files are read, and only up to the first image in colour
        names = (name for files in self.files.values() for name, _ in files)
        mode = "RGB" if any(self._read(name, mode_of) == "RGB" for name in names) else "L"
        return {split: self._samples(files, mode) for split, files in self.files.items()}

    def _samples(self, files: list[tuple[str, int]], mode: str) -> Iterator[Sample]:
        for name, label in files:
            pixels = self._read(name, lambda image: pixels_of(image, mode, self.size))
            if self.first is None:
                self.first = name, pixels.shape
            if pixels.shape != self.first[1]:
                raise unequal(name, pixels.shape, *self.first)
            yield pixels, label

    def _read(self, name: str, take: Callable[["Image.Image"], T]) -> T:
        try:
            with open(self.folder / name, "rb") as file, open_image(file) as image:
                return take(image)
        except Exception as error:  # every format has errors of its own
            raise DataError(f"{name}: {reason(error)}; check or fetch the file again") from None

    def _list(self) -> dict[str, list[tuple[str, int]]]:
        """Return relative name and label of the files of each split, in order. Raises DataError, OSError."""
        folders = {split: self._split_folder(split) for split in SPLITS}
        labels: dict[str, int] = {}
        files: dict[str, list[tuple[str, int]]] = {}
        for split, folder in folders.items():
            classes = [entry.name for entry in _visible(self.folder / folder) if entry.is_dir()]
            if not classes:
                inside = "images but no class folders" if self._images(folder) else "no class folders"
                raise self._error(f"{folder} holds {inside}; give each class a folder, {folder}/CLASS/*.png")
            if split == "train":
                self.names = in_order(classes)
                labels = {name: label for label, name in enumerate(self.names)}
                if len(labels) < 2:
                    raise self._error(f"{folder} holds a single class, {classes[0]}; at least two are needed")
            strange = next((name for name in classes if name not in labels), None)
            if strange is not None:
                raise self._error(f"{folder} has the class {strange}, which {folders['train']} lacks; check the splits")
            classes.sort(key=labels.__getitem__)
            files[split] = [(file, labels[name]) for name in classes for file in self._images_of_class(folder, name)]
        return files

    def _split_folder(self, split: str) -> str:
        entries = _visible(self.folder)
        for wanted in SPLITS[split]:
            found = [entry.name for entry in entries if entry.name.lower() == wanted and entry.is_dir()]
            if len(found) > 1:
                raise self._error(f"it holds {' and '.join(found)}, which name the same split; leave one of them")
            if found:
                return found[0]
        there = ", ".join(entry.name for entry in entries[:NAMES_SHOWN]) or "nothing"
        more = f" and {len(entries) - NAMES_SHOWN} more" if len(entries) > NAMES_SHOWN else ""
        raise self._error(
            f"it holds no .parquet file and no {split} folder (found: {there}{more}); give a folder of {FOLDER_FORMS}"
        )

    def _images_of_class(self, folder: str, name: str) -> list[str]:
        files = self._images(os.path.join(folder, name))
        if not files:
            raise self._error(f"the class folder {folder}/{name} holds no image; fill or remove it")
        return files

    def _images(self, folder: str) -> list[str]:
        """Return the names, relative to data.path, of the images in a folder and below it, sorted. Raises OSError."""

        def fail(error: OSError) -> None:
            raise error  # by itself, os.walk passes over what it cannot list

        found = []
        for place, folders, names in os.walk(self.folder / folder, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(place, self.folder)
            images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
            found += [f"{relative}/{name}" for name in images]
        return sorted(found)

    def _error(self, text: str) -> DataError:
        return DataError(f"data.path {self.folder}: {text}")


def in_order(names: Sequence[str]) -> list[str]:
    """Return the names of classes in the order of their labels: whole numbers by value (2 before 10), else as text."""
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _visible(folder: Path) -> list["os.DirEntry[str]"]:
    """Return what is in a folder and not hidden, sorted by name. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
