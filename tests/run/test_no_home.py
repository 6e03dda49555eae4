"""Users without a home that can be written, or without a name: with good places for data, all works."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checks import ROOT
from tests.support.in_process import assert_refused, attempt, image_folder, parquet
from tests.support.tiny_runs import go, write


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny run, whose user has a file where a home should be (root may write in any folder)."""
    import datasets

    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # what `datasets` took from HOME when it was imported
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / ".cache")
    write(tmp_path)
    return tmp_path


def test_parquet_with_a_place_for_decoded_data_needs_no_home(homeless: Path) -> None:
    parquet(homeless, "train", [0, 1] * 8)
    parquet(homeless, "test", [0, 1])
    outcome = go(homeless, "run", "--data.path=data", "--data.cache_dir=cache")
    assert (outcome.code, outcome.err) == (0, "")
    assert not [name for name in outcome.changed if not name.startswith(("run", "cache"))]


def test_image_folders_and_embedded_data_need_no_home(homeless: Path) -> None:
    image_folder(homeless, each=8)
    for options in (("--data.path=data",), ("--data.name=digits",)):
        outcome = attempt(homeless, "fetch", "small.yaml", *options, "--data.cache_dir=cache")
        assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("command", ["run", "fetch", "plan"])
def test_where_a_cache_is_needed_the_error_names_its_key(homeless: Path, command: str) -> None:
    options = ("--run-dir", "run") if command == "run" else ()
    outcome = attempt(homeless, command, "small.yaml", *options)
    assert_refused(outcome, 74, "home/.cache/fedfreeze", "Not a directory", "--data.cache_dir=FOLDER")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/home"), RuntimeError("Could not determine home directory.")]
)
def test_the_hub_says_which_place_it_needs(homeless: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    outcome = attempt(homeless, "fetch", "small.yaml", "--data.name=some/flowers", "--data.cache_dir=cache")
    assert_refused(outcome, 65, "some/flowers", str(error), "set HF_HOME to a folder that can be written")


# --- a real user without a name


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


AS_ANOTHER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_user_id_without_a_name(open_folder: Path) -> None:
    write(open_folder)
    parquet(open_folder, "train", [0, 1] * 8)
    parquet(open_folder, "test", [0, 1])
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AS_ANOTHER, sys.executable, "-m", "fedfreeze", "run", "small.yaml", "--run-dir=run", *options],
            cwd=open_folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    lost = start("--data.path=data")
    if "fedfreeze: error" not in lost.stderr:
        pytest.skip(f"another user may not read this checkout or its Python: {lost.stderr[-200:]}")
    assert lost.returncode == 74
    assert "HOME is not set and user 54321 has no home; give a folder by --data.cache_dir=FOLDER" in lost.stderr
    found = start("--data.path=data", "--data.cache_dir=cache", "--nproc=2")
    assert (found.returncode, found.stderr) == (0, "")
    assert sorted(path.name for path in open_folder.iterdir()) == ["cache", "data", "mine.py", "run", "small.yaml"]
