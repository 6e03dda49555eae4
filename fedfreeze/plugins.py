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

    The folder in which fedfreeze was started is searched last, after installed packages, as a console script's own
    search path does not hold it.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # the user's module may be there and import something that is not
        what = "module" if module_name.startswith(error.name or "") else f"{module_name} imports"
        raise ConfigError(
            f"{key}: {what} {error.name} is not found; looked in {os.getcwd()} and in what is installed"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: importing {module_name} failed: {told(error)}") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [other for other in vars(module) if not other.startswith("_")]
        raise ConfigError(f"{key}: {module_name} has no {attribute}; it has: {', '.join(names) or 'nothing'}") from None


@contextmanager
def own_code(key: str, name: str) -> Iterator[None]:
    """Turn what the user's own code raises inside into one line that says where. Raises ConfigError."""
    try:
        yield
    except FedfreezeError:
        raise
    except RuntimeError as error:
        if needs_values(error):
            raise  # it did nothing wrong: whoever runs it on tensors without values runs it again with some
        if not is_own(name):
            raise
        raise ConfigError(f"{key}: {name} raised {told(error)}") from None
    except (Exception, SystemExit) as error:  # a script that is imported may end the program
        if not is_own(name):
            raise
        raise ConfigError(f"{key}: {name} raised {told(error)}") from None


def needs_values(error: BaseException) -> bool:
    """Tell whether something failed because tensors that have shapes only were asked for a value."""
    # by name, so that a mistake in a configuration is told without importing torch
    return type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException")


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
