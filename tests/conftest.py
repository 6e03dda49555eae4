"""Shared fixtures: the real CIFAR-10 folder, and tiny Parquet data sets of real PNG images."""

import io
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checks import ROOT
from tests.support.launching import command, run, write_config
from tests.support.slurm_fixture import slurm
from tests.support.tiny_runs import go, write

__all__ = ["slurm"]

pytest_plugins = ["tests.support.by_room"]

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test may reach for the network
torch.set_num_threads(1)  # test files run side by side, and threads that wait for a core cost more than they bring

# Under nohup, or in the background of a script, these are ignored, and so would be in every program that the tests
# start. Handlers are not handed on to another program: it begins with the default again.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)


# The files that take longest, so that none of them is begun when the others are done.
LONGEST = [
    "methods/test_every_method",
    "run/test_preempted_runs",
    "slurm/test_jobs",
    "launch/test_scripts",
    "comm/test_every_launcher",
    "test_documents",
    "run/test_resume",
    "run/test_interrupts",
    "device/test_cost",
    "methods/test_levels",
    "doctor/test_doctor",
    "comm/test_ranks",
    "comm/test_lost_ranks",
    "plan/test_cut",
    "track/test_sync",
    "track/test_synced_run",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the longest files to the front; within a file the order stays."""
    place = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """The Parquet files of CIFAR-10, which lie beside the checkout and are not part of it."""
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not sorted(folder.glob("*.parquet")):
        pytest.skip(f"the CIFAR-10 Parquet files are not in {folder}")
    return folder


@pytest.fixture(scope="session")
def png() -> Callable[[np.ndarray], bytes]:
    """Encode pixels (height, width) or (height, width, 3) as PNG, which is lossless."""
    from PIL import Image

    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_parquet(png: Callable[[np.ndarray], bytes]) -> Callable[..., Path]:
    """Write a Parquet file with the columns `img` (bytes, path) and `label`; encode pixels, take bytes as they are."""
    import pyarrow
    from pyarrow import parquet

    def write(
        file: Path,
        images: Sequence[np.ndarray | bytes | None],
        labels: Sequence[object],
        *,
        image_column: str = "img",
        label_column: str = "label",
        metadata: dict[str, str] | None = None,
    ) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        encoded = [png(image) if isinstance(image, np.ndarray) else image for image in images]
        rows = [{"bytes": data, "path": f"{index}.png"} for index, data in enumerate(encoded)]
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        column = pyarrow.array(labels) if len(labels) else pyarrow.array([], pyarrow.int64())
        table = pyarrow.table({image_column: pyarrow.array(rows, kind), label_column: column})
        parquet.write_table(table.replace_schema_metadata(metadata), file)
        return file

    return write


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration SMALL, and its run on one rank with nothing in its way. To be read only."""
    folder = tmp_path_factory.mktemp("small")
    config = write_config(folder)
    done = run(command(config, folder / "whole"))
    assert done.returncode == 0, done.stderr
    return config, folder / "whole"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    outcome = go(folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder / "run"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path
