"""Classes and functions of the user's own, named `package.module:Name` in the configuration."""

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fedfreeze.errors import ConfigError, FedfreezeError, one_line

T = TypeVar("T")


def is_own(name: str) -> bool:
    """Tell whether a configured name is the user's own object, not one of a registry."""
    return ":" in name


def choose_class(key: str, name: str, registry: Mapping[str, type[T]], base: type) -> type[T]:
    """Return the registered class of that name, or the user's own. Raises ConfigError, naming `key`."""
    if not is_own(name):
        return registry[name]
    found: Any = load_own(key, name)
    own_class = isinstance(found, type) and issubclass(found, base)
    if not own_class:
        raise ConfigError(f"{key}: {name} is no subclass of {base.__module__}.{base.__name__} (docs/extending.md)")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{key}: {name} lacks {', '.join(missing)}, which {base.__name__} asks for")
    return found


def load_own(key: str, name: str) -> Any:
    """Import the user's own object `package.module:Name`. Raises ConfigError.

    The folder in which fedfreeze was started is searched last, after installed packages: neither a console script's own
    search path holds it, nor that of `python -m fedfreeze` (see __main__.py). What is hidden there by a package of the
    same name is refused, not taken for it.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # the user's module may be there and import something that is not
        what = "module" if module_name.startswith(error.name or "") else f"{module_name} imports"
        _check_not_hidden(key, error.name or module_name, "" if what == "module" else f"{module_name} imports ")
        raise ConfigError(
            f"{key}: {what} {error.name} is not found; looked in {os.getcwd()} and in what is installed"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: importing {module_name} failed: {told(error)}") from None
    _check_not_hidden(key, module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [other for other in vars(module) if not other.startswith("_")]
        raise ConfigError(f"{key}: {module_name} has no {attribute}; it has: {', '.join(names) or 'nothing'}") from None


def _check_not_hidden(key: str, module_name: str, importer: str = "") -> None:
    """Raise ConfigError where a module of the working folder is hidden by another of its name, found before it."""
    parts = module_name.split(".")
    mine = _source(Path.cwd().joinpath(*parts))
    if mine is None:
        return
    for length in range(1, len(parts) + 1):
        found = sys.modules.get(".".join(parts[:length]))
        here = _source(Path.cwd().joinpath(*parts[:length]))
        file = getattr(found, "__file__", None)
        if found is None or (file is None and hasattr(found, "__path__")):
            continue  # not reached, or a folder without __init__.py: it holds what lies in all the folders of its name
        if file is None or here is None or not _is_same_code(here, Path(file)):
            raise ConfigError(
                f"{key}: {importer}{module_name} is {file or 'a part of Python'}, which is found before your own "
                f"{mine}; give yours another name"
            )


def _source(path: Path) -> Path | None:
    """Return the file of a module that would lie at `path`, which has no ending; None if there is none."""
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None


def _is_same_code(mine: Path, other: Path) -> bool:
    """Tell whether two files of modules, and all below them where they are packages, are the same or copies."""
    if not other.exists():  # within an archive
        return False
    if mine.samefile(other):
        return True
    if mine.name != "__init__.py" or other.name != "__init__.py":
        return mine.read_bytes() == other.read_bytes()
    both = [{file.relative_to(top.parent) for file in top.parent.rglob("*.py")} for top in (mine, other)]
    return both[0] == both[1] and all(
        (mine.parent / file).read_bytes() == (other.parent / file).read_bytes() for file in both[0]
    )


@contextmanager
def own_code(key: str, name: str) -> Iterator[None]:
    """Turn what the user's own code raises inside into one line that says where. Raises ConfigError."""
    try:
        yield
    except FedfreezeError:
        raise
    except (Exception, SystemExit) as error:  # a script that is imported may end the program
        if not is_own(name):
            raise
        raise ConfigError(f"{key}: {name} raised {told(error)}") from None


def told(error: BaseException) -> str:
    """Return an exception on one line: its type, message, and the file and line of the innermost frame."""
    # a call that fails as such, by a wrong keyword, has no frame but ours
    ours = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({Path(error.filename).name}:{error.lineno})"
    return f"{type(error).__name__}: {one_line(error)[:200]}{where}"


def own_frame(error: BaseException, names: Sequence[str | None]) -> str | None:
    """Return file and line of the user's own code through which an exception came; None if it came through none."""
    modules = [sys.modules.get(name.partition(":")[0]) for name in names if name is not None and is_own(name)]
    files = {module.__file__ for module in modules if module is not None}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
