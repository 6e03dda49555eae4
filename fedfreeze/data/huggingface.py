"""Parquet files in a folder, or a data set of the Hugging Face hub, read by the package `datasets`."""

import errno
import glob
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.decode import SPLITS, BeginAgain, Sample, as_image, mode_of, pixels_of, reason
from fedfreeze.data.parquet_files import check_same_names, class_names, parquet_files, split_files
from fedfreeze.errors import DataError, UnavailableError, one_line

IMAGE_COLUMNS = ("img", "image", "images")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class HuggingFace:
    """A folder of Parquet files (`data.path`), or a data set of the hub (`data.name`)."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.location = config.path or config.name
        self.is_local = config.path is not None
        self._mode: str | None = None  # of all images: grey until one in colour comes, wherever in the data set
        self._names: list[str] | None = None

    def fingerprint(self) -> str:
        """See Source. Local files count by name, size and time of change."""
        config = self.config
        decoding = [config.image_column, config.label_column, config.image_size]
        if not self.is_local:
            return json.dumps(["hub", self.location, config.subset, config.revision, decoding])
        folder = Path(self.location)
        try:
            facts = [
                [str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns]
                for file in parquet_files(folder)
            ]
        except OSError as error:
            raise DataError(
                f"data {self.location}: {error.filename} cannot be read: {reason(error)}; check or fetch it again"
            ) from None
        return json.dumps(["parquet", os.path.realpath(folder), facts, decoding])

    def class_names(self) -> list[str] | None:
        """See Source. As the hub's features have them."""
        return self._names

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
            if not self.is_local:
                self._take_names(loaded[found], found)
            streams[split] = self._samples(loaded[found], split)
        return streams

    def _take_names(self, rows: Any, split: str) -> None:
        """Note the names of the classes of a split of the hub. Raises DataError where they contradict the first."""
        features = getattr(rows, "features", None) or {}
        wanted = [self.config.label_column] if self.config.label_column is not None else LABEL_COLUMNS
        names = getattr(next((features[name] for name in wanted if name in features), None), "names", None)
        if names is not None:
            check_same_names(self._names or names, names, "the split before", f"the split {split}")
            self._names = self._names or list(names)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UnavailableError("reading Parquet needs the package `datasets`; pip install datasets") from None
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        datasets.logging.set_verbosity(logging.CRITICAL)  # a user's error is one line, and it is ours
        files: dict[str, list[Path]] = {}
        if self.is_local:
            files = split_files(Path(self.location))
            everything = [file for found in files.values() for file in found]
            self._names = class_names(everything, self.config.label_column, LABEL_COLUMNS)
        try:
            if self.is_local:
                # a part without rows makes `datasets` fail
                full = {split: [file for file in found if _rows_in([file])] or found for split, found in files.items()}
                present = {split: [glob.escape(str(file)) for file in found] for split, found in full.items()}
                # streaming: no second copy of the data in another cache, whose lock would lie in a home folder that
                # need not be there
                with tempfile.TemporaryDirectory(prefix="fedfreeze-") as place:
                    options = {"data_files": present, "streaming": True, "cache_dir": place}
                    return datasets.load_dataset("parquet", **options) if present else {}
            chosen = {"name": self.config.subset, "revision": self.config.revision}
            given = {key: value for key, value in chosen.items() if value is not None}
            return datasets.load_dataset(self.location, **given, streaming=True)
        except Exception as error:  # every reader below `datasets` has errors of its own
            raise DataError(f"it cannot be read: {one_line(error)[:200]}{self._hint(error)}") from None

    def _hint(self, error: Exception) -> str:
        if self.is_local:
            return ""
        if re.search(r"Config name is missing|BuilderConfig .* not found", str(error)):
            return "; give one of them as data.subset"
        if getattr(error, "errno", None) in _CANNOT_WRITE or "home directory" in str(error):
            return "; set HF_HOME to a folder that can be written"
        if self.config.revision is not None and "evision" in str(error):
            return "; check data.revision"
        return "; without a network give --data.path=FOLDER of Parquet files"

    def _samples(self, rows: Any, split: str) -> Iterator[Sample]:
        row = 1
        if self.is_local and not _rows_in(split_files(Path(self.location))[split]):
            return  # `datasets` would fail on it; the store says that the split is empty
        try:
            for record in rows:
                if row == 1:
                    image_column = _column(record, self.config.image_column, IMAGE_COLUMNS, "image")
                    label_column = _column(record, self.config.label_column, LABEL_COLUMNS, "label")
                label = _label(record[label_column])
                image = as_image(record[image_column])
                if self._mode != "RGB":
                    before, self._mode = self._mode, mode_of(image)
                    if before == "L" and self._mode == "RGB":
                        raise BeginAgain  # those before were decoded as grey
                yield pixels_of(image, self._mode, self.config.image_size), label
                row += 1
        except BeginAgain:
            raise
        except _ColumnError as error:
            raise DataError(f"split {split}, row {row}: {error}") from None
        except Exception as error:  # a torn file or image: name the place, whatever the reader calls it
            raise DataError(
                f"split {split}, row {row}: {one_line(error)[:200]}; check or fetch the files again"
            ) from None


class _ColumnError(DataError):
    """A column that is not there or holds something else: fetching the files again would not help."""


def _rows_in(files: Sequence[Path]) -> int:
    """Return how many rows files promise; at least one where they cannot be read."""
    from pyarrow import parquet

    try:
        return sum(parquet.read_metadata(str(file)).num_rows for file in files)
    except Exception:  # torn: reading it says more
        return 1


def _column(record: dict[str, Any], wanted: str | None, names: tuple[str, ...], what: str) -> str:
    found = next((name for name in ([wanted] if wanted is not None else names) if name in record), None)
    if found is None:
        missing = f"{wanted!r}" if wanted is not None else f"(one of {', '.join(names)})"
        there = ", ".join(record)
        raise _ColumnError(f"no {what} column {missing}; found: {there[:200]}; name one by data.{what}_column")
    return found


def _label(value: Any) -> int:
    if value is None:
        raise _ColumnError("label None: it is missing; leave such rows out, or name another data.label_column")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _ColumnError(f"label {repr(value)[:60]} is not a whole number; number the classes 0 to n-1")
    return value
