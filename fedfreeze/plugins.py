"""Classes and functions of the user's own, named `package.module:Name` in the configuration."""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        # who needs values did nothing wrong: whoever runs it on tensors without any runs it again with some
        if not is_own(name) or needs_values(error):
            raise
        raise ConfigError(f"{key}: {name} raised {told(error)}") from None


def needs_values(error: BaseException) -> bool:
    """Tell whether something failed because tensors that have shapes only were asked for a value."""
    # by name, so that a mistake in a configuration is told without importing torch
    return type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException")


def code_digests(names: Iterable[str | None]) -> dict[str, str]:
    """Return a digest of each source file that the named objects (package.module:Name) are made of, by module. [ours]

    These are the files of the named modules and of what they import, in turn, from the user's own folders: not of
    Python, of fedfreeze or of installed packages, but of a named module that is installed, its whole package. The
    imports are read, not run; one by a name that is computed is not found. Copies have the same digests wherever they
    lie. The modules must have been imported (`load_own`).
    """
    roots = {name.partition(":")[0] for name in names if name is not None and is_own(name)}
    found: dict[str, str] = {}
    waiting = sorted(roots)
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in found or not (name in roots or (file is not None and _is_users(file))):
            continue
        try:
            content = file.read_bytes() if file is not None else None
        except OSError:
            content = None
        if file is None or content is None:
            found[name] = "no source"
            continue
        found[name] = hashlib.sha256(content).hexdigest()[:16]
        if not _is_users(file):
            found |= _package_digests(name, file)
            continue
        with contextlib.suppress(SyntaxError, ValueError):  # no source text of Python
            waiting += _imported(ast.parse(content), name, is_package=file.name == "__init__.py")
        waiting += [name.rsplit(".", number)[0] for number in range(1, name.count(".") + 1)]  # imported before it
    return dict(sorted(found.items()))


def _file_of(name: str) -> Path | None:
    """Return the file of a module that is imported or could be; None if there is none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None:
        return Path(file)
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not rest:
        return None if spec is None or not spec.has_location else Path(str(spec.origin))
    places = (_source(Path(place, *rest.split("."))) for place in spec.submodule_search_locations or ())
    return next((place for place in places if place is not None), None)


def _is_users(file: Path) -> bool:
    """Tell whether a file is of the user's own: not of Python, an installed package or fedfreeze."""
    file = file.resolve()
    python = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    if {"site-packages", "dist-packages"} & set(file.parts):
        return False
    return not any(file.is_relative_to(place) for place in (*python, Path(__file__).resolve().parent))


def _package_digests(name: str, file: Path) -> dict[str, str]:
    """Return the digests of all modules of the installed package that a module is part of."""
    depth = name.count(".") + (file.name == "__init__.py")
    if depth == 0:
        return {}
    top = file.parents[depth - 1]
    modules = {path.relative_to(top.parent).with_suffix("").as_posix(): path for path in sorted(top.rglob("*.py"))}
    return {
        module.removesuffix("/__init__").replace("/", "."): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for module, path in modules.items()
    }


def _imported(tree: ast.AST, importer: str, *, is_package: bool) -> list[str]:
    """Return the names that a source text may import as modules, absolute, wherever in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = importer.split(".") if is_package else importer.split(".")[:-1]
                base = package[: len(package) - (node.level - 1)] + base
            names += [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.append(node.args[0].value)
    return [name for name in names if name]


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
