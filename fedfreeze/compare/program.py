"""The program of `fedfreeze compare`: reads runs, prints the comparison, and writes the page with its pictures."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fedfreeze.compare.figures_of import Comparison, make_comparison
from fedfreeze.compare.read import read_run
from fedfreeze.compare.table import as_json, markdown_page, terminal_text
from fedfreeze.errors import ConfigError, UnavailableError, storage_error
from fedfreeze.storage.files import write_whole

Style = Literal["terminal", "markdown", "json"]
_FORMATS: dict[Style, Callable[[Comparison], str]] = {
    "terminal": terminal_text,
    "markdown": markdown_page,
    "json": as_json,
}


def compare(
    folders: Sequence[str],
    *,
    target_accuracy: float | None = None,
    out: Path | None = None,
    style: Style = "terminal",
) -> Comparison:
    """Compare runs and print the result; with `out`, write pictures, tables and report.html there, too.

    Raises ConfigError for runs that cannot be compared, DataError for damaged ones, UnavailableError where pictures are
    wanted and matplotlib is missing, StorageError.
    """
    if out is not None:
        _check_matplotlib()
    comparison = make_comparison([read_run(path) for path in _different(folders)], target_accuracy)
    if out is not None:
        write_report(comparison, out)
    _say(_FORMATS[style](comparison))
    if out is not None and style == "terminal":
        _say(f"wrote {out / 'report.html'}, and tables and pictures beside it")
    return comparison


def write_report(comparison: Comparison, out: Path) -> None:
    """Write report.html, table.md, compare.json and the pictures into a folder, each whole or not at all.

    Raises StorageError.
    """
    from fedfreeze.compare.page import report_page
    from fedfreeze.compare.pictures import draw_pictures

    made = _make_folder(out)  # before anything is drawn: that takes seconds
    pictures = draw_pictures(comparison)
    contents: dict[str, str | bytes] = {picture.file_name: picture.png for picture in pictures}
    contents["table.md"] = markdown_page(comparison) + "\n"
    contents["compare.json"] = as_json(comparison) + "\n"
    contents["report.html"] = report_page(comparison, pictures)
    for name, content in contents.items():
        try:
            write_whole(out / name, content)
        except OSError as error:
            _unmake(made)
            raise storage_error("write", out / name, error) from None


def _make_folder(path: Path) -> list[Path]:
    """Make a folder and return those that were not there, the deepest first. Raises StorageError."""
    made: list[Path] = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _unmake(made)
        raise storage_error("make the folder", path, error) from None
    return made


def _unmake(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _different(folders: Sequence[str]) -> list[Path]:
    """Return the folders as paths. Raises ConfigError where one is given twice, under whatever name."""
    seen: dict[Path, str] = {}
    for folder in folders:
        try:
            real = Path(folder).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL: reading tells it
            real = Path(folder)
        if real in seen:
            raise ConfigError(f"{folder} is the same run folder as {seen[real]}; give each run once")
        seen[real] = folder
    if not seen:
        raise ConfigError("no run folder is given")
    return [Path(folder) for folder in folders]


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError(
            "--out draws pictures and needs matplotlib; pip install 'fedfreeze[plot]', or leave --out away"
        ) from None


def _say(text: str) -> None:
    """Print, with what this terminal does not have replaced: a figure must not be lost for a sign beside it."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("±", "+-").encode(encoding, errors="replace").decode(encoding)
    print(text)
