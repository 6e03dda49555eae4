"""Sums over MPI's ranks: along a ring where they are long, the same bits on every rank."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.support.launching import MPIRUN, needs_mpirun, run

needs_mpi4py = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")

SCRIPT = """
import os
import torch
from fedfreeze.comm.launcher import detect_launch
from fedfreeze.comm.mpi_transport import _RING_ELEMENTS, launch_by_mpi
from fedfreeze.comm.ranks import Ranks
from fedfreeze.config.schema import CommConfig

ranks = Ranks(launch_by_mpi(detect_launch(os.environ)), torch.device("cpu"), CommConfig(transport="mpi"))
size = ranks.world_size
for elements in (1, size - 1, _RING_ELEMENTS - 1, _RING_ELEMENTS, _RING_ELEMENTS + 1, 70_001, 0):
    for kind in (torch.int64, torch.float32):
        for times in range(2):
            seeds = [torch.Generator().manual_seed(rank) for rank in range(size)]
            each = [torch.randint(-99, 99, (elements,), generator=seed).to(kind) for seed in seeds]
            summed = each[ranks.rank].clone()
            ranks.all_reduce(summed)
            assert torch.equal(summed, sum(each)), (elements, kind)
odd = torch.rand(70_001, generator=torch.Generator().manual_seed(ranks.rank))
ranks.all_reduce(odd)
bits = ranks.all_gather(odd.view(torch.int32).sum().item())
assert len(set(bits)) == 1, bits
if ranks.is_root:
    print("all summed")
ranks.close()
ranks.leave(0)
"""


@needs_mpirun
@needs_mpi4py
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_sum(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "sums.py"
    script.write_text(SCRIPT)
    done = run([*MPIRUN, "-n", str(ranks), sys.executable, str(script)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all summed"
