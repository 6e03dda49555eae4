"""Which Parquet files of a folder are its data: those of one data set, each part of a split once."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfreeze.data.decode import SPLITS
from fedfreeze.errors import DataError

_FILES_SHOWN = 4  # in an error
_COMPARED_BYTES = 2**20  # read at once where two files may be the same

# What tells the parts of a split apart: digests, numbers, single letters. All else in a name says which data set it is.
_PART = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<![a-z0-9])(?=[a-f]*[0-9])[0-9a-f]{8,}(?![a-z0-9])"
    r"|[0-9]+|(?<![a-z])[a-z](?![a-z])"
)
_DIGEST_OF_A_SHARD = re.compile(r"(-of-[0-9]+)-[0-9a-f]{6,}$")  # as the hub once wrote them


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder and below it, sorted; none where it has none.

    What is hidden, or under an underscore as other readers of Parquet have it, is nobody's data: the leftovers of
    editors, downloads and writers.
    """
    found = (file for file in folder.glob("**/*.parquet") if not file.is_dir())
    return sorted(f for f in found if not any(part.startswith((".", "_")) for part in f.relative_to(folder).parts))


def named(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split: its name, then an end or something that is not a letter (`val` is not `valid`)."""
    return [file for file in files if re.match(rf"{split}(?![a-z])", file.name.lower())]


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of `train` and `test` in a folder, in order; a split that is not there is left out.

    Raises DataError where they are not of one data set, or a part is there twice: nobody means that as data.
    """
    files = parquet_files(folder)
    found = {}
    for split, names in SPLITS.items():
        there = next((there for name in names if (there := named(files, name))), None)
        if there is not None:
            found[split] = there
    _check_one_data_set(folder, [file for there in found.values() for file in there])
    for split, there in found.items():
        _check_parts(folder, split, there)
    return found


def class_names(files: Sequence[Path], column: str | None, columns: Sequence[str]) -> list[str] | None:
    """Return the names of the classes, by label, as the hub's metadata in the files has them; None where none has any.

    `column` is the one of the labels; None: the first of `columns` that is there. Raises DataError where a file gives a
    label another name than the first that has names: the splits would not speak of the same classes.
    """
    first: tuple[Path, list[str]] | None = None
    for file in files:
        schema = _schema(file)
        wanted = [column] if column is not None else [name for name in columns if schema and name in schema.names][:1]
        names = next((_names_in(schema, name) for name in wanted), None)
        if names is None:
            continue
        if first is None:
            first = file, names
        check_same_names(first[1], names, first[0].name, file.name)
    return None if first is None else first[1]


def check_same_names(one: Sequence[str], other: Sequence[str], one_place: str, other_place: str) -> None:
    """Raise DataError where a label has one name in one place and another in the other."""
    for label, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            raise DataError(
                f"label {label} is {first!r} in {one_place} and {second!r} in {other_place}; number the classes alike "
                "in both"
            )


def _check_one_data_set(folder: Path, files: Sequence[Path]) -> None:
    splits = {name for names in SPLITS.values() for name in names}
    places: dict[Path, Path] = {}
    for file in files:
        place = file.parent
        if place != folder and place.name.lower() in splits:  # train/train-0.parquet beside test/test-0.parquet
            place = place.parent
        places.setdefault(place, file)
    if len(places) <= 1:
        return
    shown = [str(file.relative_to(folder)) for file in places.values()][:_FILES_SHOWN]
    more = f" and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
    one = next(iter(places))
    action = f"give the folder of one of them, such as --data.path={one}"
    if folder in places:
        action = "the folder itself is one of them: take the others out"
    raise DataError(f"it holds several data sets ({', '.join(shown)}{more}); {action}")


def _check_parts(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Raise DataError unless the names of a split's files differ by numbers alone, and no part is there twice."""
    series: dict[tuple[str, ...], Path] = {}
    parts: dict[tuple[object, ...], Path] = {}
    sizes: dict[int, list[Path]] = {}
    for file in files:
        stem = _DIGEST_OF_A_SHARD.sub(r"\1", file.stem.lower())
        numbers = tuple(int(text) if text.isdecimal() else text for text in _PART.findall(stem))
        total = re.findall(r"-of-([0-9]+)", stem)  # 3 of 8 and 3 of 9 are not of one series
        series.setdefault((_PART.sub("#", stem), *(str(int(text)) for text in total)), file)
        if len(series) > 1:
            one, other = (str(found.relative_to(folder)) for found in series.values())
            raise DataError(
                f"the {split} files {one} and {other} are not parts of one data set, whose names differ by numbers "
                f"alone ({split}-0.parquet, {split}-1.parquet); take out or rename what does not belong to it"
            )
        twin = parts.setdefault(numbers, file)
        if twin is file:
            twin = next((other for other in sizes.get(_size(file), []) if _same_rows(other, file)), file)
        if twin is not file:
            raise DataError(
                f"the {split} files {twin.relative_to(folder)} and {file.relative_to(folder)} are the same part twice; "
                "take out one of them"
            )
        sizes.setdefault(_size(file), []).append(file)
        _check_columns(folder, files[0], file)


def _check_columns(folder: Path, first: Path, file: Path) -> None:
    one, other = _schema(first), _schema(file)
    if one is None or other is None or set(one.names) == set(other.names):
        return
    columns = [", ".join(schema.names)[:200] for schema in (one, other)]
    raise DataError(
        f"{first.relative_to(folder)} has the columns {columns[0]}, and {file.relative_to(folder)} has {columns[1]}; "
        "take out the file that is not data"
    )


def _schema(file: Path) -> Any:
    """Return the schema of a file; None where it cannot be read: reading its rows says more."""
    from pyarrow import parquet

    try:
        return parquet.read_schema(str(file))
    except Exception:  # torn files raise all sorts
        return None


def _names_in(schema: Any, column: str) -> list[str] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere: reading says so
        return -1


def _same_rows(one: Path, other: Path) -> bool:
    """Tell whether two files hold the same bytes, and rows at all: parts without any look alike."""
    from pyarrow import parquet

    try:
        if parquet.read_metadata(str(one)).num_rows == 0:
            return False
        with open(one, "rb") as first, open(other, "rb") as second:
            while (block := first.read(_COMPARED_BYTES)) == second.read(_COMPARED_BYTES):
                if not block:
                    return True
    except Exception:  # torn: reading it says more
        return False
    return False
