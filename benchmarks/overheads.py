"""What ways to fit a step into memory cost in time: each beside `whole` with the frozen blocks in one piece, in turns.

    python benchmarks/overheads.py [--model resnet18] [--width 64] [--batch 64] [--repeats 3] [--json FILE]

Each repeat takes a step by each way, one after the other, so that whatever else the machine does meets all of them;
printed are the medians of the ratios of a repeat, wall and processor time, and beside them the operations by the cost
model. One thread.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.ways import ways_of
from fedfreeze.device.cost import measure_costs
from fedfreeze.methods import full_model_stage, make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage

SHAPE, CLASSES = (3, 32, 32), 10
WAYS = "whole, recompute, recompute2, recompute3, micro(4)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train = {"batch_size": options.batch, "fit": WAYS}
    config = make_config({"model": {"name": options.model, "width": options.width}, "train": train})
    costs = measure_costs(config, SHAPE, CLASSES)
    method = make_method(config, build_network(config.model, SHAPE, CLASSES, 0))
    found = {}
    print("| stage | frozen blocks | way | wall | processor | FLOPs |\n|---|---|---|--:|--:|--:|")
    for index, cost in enumerate((*costs.stages, costs.full)):
        is_full = index == method.num_stages
        cpu = torch.device("cpu")
        stage = full_model_stage(method.blocked, cpu) if is_full else method.enter_stage(index, cpu)
        trainer = LocalTrainer(stage, config.train)
        ratios = timed(stage, trainer, options.batch, options.repeats)
        for (chunk, way), (wall, processor) in ratios.items():
            number = [each.name for each in ways_of(WAYS)].index(way)
            flops = cost.ways[number].step_flops / cost.step_flops
            print(f"| {cost.name} | {chunk} | `{way}` | {wall:.2f} | {processor:.2f} | {flops:.2f} |", flush=True)
            found[f"{cost.name}, {chunk}, {way}"] = {"wall": wall, "processor": processor, "flops": flops}
        stage.leave()
    command = "python benchmarks/overheads.py " + " ".join(sys.argv[1:])
    print(f"\n{platform.machine()}, torch {torch.__version__}: `{command.strip()}`")
    if options.json:
        options.json.write_text(json.dumps({"command": command, "torch": torch.__version__, "ratios": found}, indent=1))
    return 0


def timed(stage: Stage, trainer: LocalTrainer, batch: int, repeats: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the medians of wall and processor time beside the first case, by how the frozen blocks run and way."""
    images, labels = torch.randn(batch, *SHAPE), torch.randint(0, CLASSES, (batch,))
    cases = [("whole batch", "whole")] if len(stage.frozen) else []
    cases += [("in chunks" if len(stage.frozen) else "-", way.name) for way in ways_of(WAYS)]
    if not len(stage.frozen):
        cases = [case for case in cases if case[1] != "recompute3"]
    ways = {way.name: way for way in ways_of(WAYS)}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):  # the first one warms up
        first = (1.0, 1.0)
        for number, (chunk, way) in enumerate(cases):
            stage.send_in_chunks(None if chunk == "whole batch" else "auto")
            trainer.go(ways[way])
            wall, processor = time.perf_counter(), time.process_time()
            trainer.step(images, labels)
            seconds = time.perf_counter() - wall, time.process_time() - processor
            if number == 0:
                first = seconds
            if repeat:
                taken[chunk, way].append((seconds[0] / first[0], seconds[1] / first[1]))
    return {case: (median(r[0] for r in some), median(r[1] for r in some)) for case, some in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
