"""What fedfreeze's sum over the ranks takes beside one bare all-reduce of the same bytes; prints JSON on rank 0.

    torchrun --nproc-per-node=2 benchmarks/aggregation.py [--mib 0.1 1 10 100] [--repeats 15]
    mpirun -n 2 python benchmarks/aggregation.py --transport mpi

Ours is what `run_round` does with the flat sum (Ranks.all_reduce: it waits in short steps, so as to hear of a lost
rank); bare is the transport's own call and nothing else, torch.distributed.all_reduce or MPI_Allreduce in place. Both
sum int64, as `method.sum: exact` does, in turn in one process group, from a common start; the ratio is the median of
the neighbours'. Sizes are given ones, and those of each stage of ResNet-18 of width 64 (`--no-stages`: without).
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fedfreeze.comm.launcher import detect_launch
from fedfreeze.comm.mpi_transport import launch_by_mpi, load_mpi
from fedfreeze.comm.ranks import Ranks
from fedfreeze.config.file import make_config
from fedfreeze.device.cost import measure_costs
from fedfreeze.units import MIB

INT64_BYTES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", nargs="*", type=float, default=[0.1, 1, 10, 100])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--transport", choices=["torch", "mpi"], default="torch")
    parser.add_argument("--no-stages", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = make_config({"comm": {"transport": options.transport}, "model": {"name": "resnet18", "width": 64}})
    launch = detect_launch(os.environ)
    if options.transport == "mpi":
        launch = launch_by_mpi(launch)
    ranks = Ranks(launch, torch.device("cpu"), config.comm)
    if ranks.world_size < 2:
        raise SystemExit("start two ranks or more: torchrun --nproc-per-node=2, or mpirun -n 2")
    sizes = {f"{mib:g} MiB": round(mib * MIB / INT64_BYTES) for mib in options.mib}
    if not options.no_stages:
        costs = measure_costs(config, (3, 32, 32), 10)
        sizes |= {f"resnet18 {stage.name}": stage.trained_elements for stage in costs.stages}
        sizes["resnet18 full model"] = costs.full.trained_elements
    bare = bare_mpi if options.transport == "mpi" else dist.all_reduce
    rows = [{"what": what} | compared(ranks, bare, elements, options.repeats) for what, elements in sizes.items()]
    if ranks.is_root:
        facts = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        run = {"ranks": ranks.world_size, "backend": ranks.backend, "repeats": options.repeats}
        print(json.dumps(facts | run | {"sizes": rows}, indent=2))
    ranks.close()
    ranks.leave(0)


def bare_mpi(tensor: torch.Tensor) -> None:
    mpi = load_mpi()
    mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, tensor.numpy())


def compared(ranks: Ranks, bare: Callable[[torch.Tensor], Any], elements: int, repeats: int) -> dict[str, Any]:
    """Return medians of both and of the ratios of neighbours; seconds are those of the slowest rank."""
    ours_s, bare_s, ours_processor_s, bare_processor_s = [], [], [], []
    tensor = torch.arange(elements)
    for _ in range(repeats + 1):  # the first pair warms up
        for run, wall, processor in (
            (ranks.all_reduce, ours_s, ours_processor_s),
            (bare, bare_s, bare_processor_s),
        ):
            bare(torch.zeros(1, dtype=torch.int64))  # a common start
            began, used = time.perf_counter(), time.process_time()
            run(tensor)
            taken = torch.tensor([time.perf_counter() - began, time.process_time() - used], dtype=torch.float64)
            each = ranks.all_gather(taken.tolist())
            wall.append(max(seconds for seconds, _ in each))
            processor.append(sum(seconds for _, seconds in each))
            tensor.fill_(1)
    pairs = list(zip(ours_s[1:], bare_s[1:], strict=True))
    return {
        "mib": elements * INT64_BYTES / MIB,
        "ours_s": statistics.median(ours_s[1:]),
        "bare_s": statistics.median(bare_s[1:]),
        "ratio": round(statistics.median(ours / other for ours, other in pairs), 3),
        "ours_processor_s": statistics.median(ours_processor_s[1:]),
        "bare_processor_s": statistics.median(bare_processor_s[1:]),
    }


if __name__ == "__main__":
    main()
