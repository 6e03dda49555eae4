"""What the tests of spoilt folders, checkpoints and interrupted runs share."""

from pathlib import Path
from typing import Any

from tests.support.in_process import TINY, TINY_RUN, Outcome, attempt, tree
from tests.support.launching import metrics, sha256, summary, without_wall_time, write_config

# A layer that fails on one rank, in round 2, while the file `fault` is there.
FAULTY = """
import os
import torch.distributed as dist
from pathlib import Path

class Faulty(nn.Conv2d):
    def forward(self, x):
        if self.training and Path("fault").exists() and Path("run/metrics.jsonl").exists():
            done = Path("run/metrics.jsonl").read_text().count('"kind": "round"')
            if done >= 1 and str(dist.get_rank()) == Path("fault").read_text():
                raise RuntimeError("a fault of this rank alone")
        return super().forward(x)

def faulty(num_classes, in_channels, image_size):
    network = tiny(num_classes, in_channels, image_size)
    network.a = Faulty(in_channels, 4, 3, padding=1)
    return network
"""


def write(folder: Path, **sections: Any) -> None:
    """Write the tiny run and its network into a folder."""
    values = {key: dict(value) for key, value in TINY_RUN.items()}
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    (folder / "mine.py").write_text(TINY + FAULTY)
    write_config(folder, **values)


def go(folder: Path, run_dir: str = "run", *options: str) -> Outcome:
    """Run, or go on, in this process."""
    return attempt(folder, "run", "small.yaml", "--run-dir", run_dir, *options)


def assert_same(run_dir: Path, whole: Path) -> None:
    """Whatever came between, the run has given what an undisturbed one gives, and nothing else is left."""
    assert sha256(run_dir) == sha256(whole)
    assert without_wall_time(metrics(run_dir)) == without_wall_time(metrics(whole))
    assert (summary(run_dir)["status"], summary(run_dir)["exit_code"]) == ("finished", 0)
    assert sorted(tree(run_dir)) == sorted(tree(whole))


def leftovers(folder: Path) -> list[str]:
    """Return locks and files under a temporary name."""
    return [name for name in tree(folder) if Path(name).name.startswith(".") or Path(name).name in ("lock", "store")]


def assert_no_leftovers(folder: Path) -> None:
    left = leftovers(folder)
    assert not left, left
