"""Predicted against measured peak memory of every stage and the full model, and whether the cap holds at the peak.

    python benchmarks/memory.py [--model resnet18] [--width 64] [--batch 32 128] [--fit whole] [--chunk N]
        [--prefix streamed] [--device cpu|cuda] [--json FILE]

Predicted: tensor bytes of one step counted on fake tensors (what `fedfreeze plan` prints). Measured: the same count on
a real step; on a GPU also the reserved bytes, which the CUDA memory fraction governs. Then the step runs under a cap of
exactly the measured peak, which must pass, and of less (1 MiB on CPU, one 2 MiB segment on a GPU), which must fail.
`--fit` lists ways to take a step (train.fit), each of which has its rows; `--chunk` is train.prefix_chunk. Seconds are
processor time of a step that is not counted, less than all of its threads' where it has several; the least of three.
"""

import argparse
import json
import platform
import sys
import time
from typing import Any

import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cap import DeviceOutOfMemoryError, MemoryCap, make_cap
from fedfreeze.device.cost import StageCost, measure_costs
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.units import MIB

SHAPE, CLASSES = (3, 32, 32), 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--output-module", default="conv_norm")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--fit", default="whole")
    parser.add_argument("--chunk", type=int, help="default: train.prefix_chunk=auto")
    parser.add_argument("--prefix", default="recomputed", choices=["recomputed", "streamed"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        values: dict[str, Any] = {
            "model": {"name": options.model, "width": options.width},
            "method": {"output_module": options.output_module},
            "train": {"batch_size": batch, "fit": options.fit, "prefix": options.prefix},
        }
        if options.chunk is not None:
            values["train"]["prefix_chunk"] = options.chunk
        started = time.monotonic()
        costs = measure_costs(make_config(values), SHAPE, CLASSES)
        print(f"batch {batch}: predicted in {time.monotonic() - started:.1f} s", file=sys.stderr)
        for number in range(len(costs.full.ways)):
            values["method"]["name"] = "smartfreeze"
            rows += [measure(make_config(values), i, cost, number, device) for i, cost in enumerate(costs.stages)]
            values["method"]["name"] = "fedavg"
            rows.append(measure(make_config(values), 0, costs.full, number, device))
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
    }
    print_table(rows, facts)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**facts, "rows": rows}, file, indent=2)
            file.write("\n")
    return 0 if all(row["passes_at_peak"] and row["fails_below"] for row in rows) else 1


def measure(config: Config, index: int, cost: StageCost, number: int, device: torch.device) -> dict[str, Any]:
    """Measure one stage on real tensors by one of its ways, and try the cap at the measured peak and below."""
    way = cost.ways[number]
    batch = config.train.batch_size
    method = make_method(config, build_network(config.model, SHAPE, CLASSES, 0))
    cap = make_cap(device)
    cap.begin_stage()
    stage = method.enter_stage(index, device)
    trainer = LocalTrainer(stage, config.train)
    trainer.go(way.way)
    images, labels = torch.randn(batch, *SHAPE), torch.randint(0, CLASSES, (batch,))

    def train(cap_bytes: int | None) -> tuple[int, int]:
        """Return (peak of what the cap governs, peak of tensor bytes) of two steps."""
        with cap.device(cap_bytes) as memory:
            for _ in range(2):
                one_step(cap, memory, trainer, images.to(device), labels.to(device))
        return memory.peak_bytes, memory.tensor_peak_bytes

    with cap.on_top():
        train(None)  # what libraries keep for themselves is no device's
        trainer.drop_gradients()
    peak, tensor_peak = train(None)
    taken = []
    for _ in range(3):
        began = time.process_time()
        trainer.step(images.to(device), labels.to(device))
        taken.append(time.process_time() - began)
    below = 2 * MIB if device.type == "cuda" else MIB
    row = {
        "batch": batch,
        "blocks": cost.name,
        "way": way.way.name,
        "predicted_mib": way.memory_bytes / MIB,
        "tensor_peak_mib": tensor_peak / MIB,
        "peak_mib": peak / MIB,
        "difference": way.memory_bytes / tensor_peak - 1,
        "step_processor_s": round(min(taken), 4),
        "passes_at_peak": holds(train, peak),
        "fails_below": not holds(train, peak - below),
    }
    trainer.drop_gradients()
    method.leave_stage(stage)
    return row


def one_step(cap: MemoryCap, memory: Any, trainer: LocalTrainer, x: torch.Tensor, y: torch.Tensor) -> None:
    """Take one step as the emulator does."""
    cap.step(memory, len(x), lambda: [*trainer.held_tensors(), x, y], lambda: trainer.counted_step(x, y))


def holds(train: Any, cap_bytes: int) -> bool:
    """Tell whether training completes under a cap."""
    try:
        train(cap_bytes)
    except DeviceOutOfMemoryError as error:
        print(f"  {error}", file=sys.stderr)
        return False
    return True


def print_table(rows: list[dict[str, Any]], facts: dict[str, str]) -> None:
    """Print the rows as Markdown."""
    print(f"{facts['device']}, torch {facts['torch']}, Python {facts['python']}: `{facts['command']}`\n")
    print(
        "| batch | stage | way | predicted MiB | measured tensor MiB | difference | governed peak MiB | at peak "
        "| below | processor s a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['batch']} | {row['blocks']} | {row['way']} | {row['predicted_mib']:.1f} | "
            f"{row['tensor_peak_mib']:.1f} | "
            f"{row['difference']:+.2%} | {row['peak_mib']:.1f} | {'passes' if row['passes_at_peak'] else 'FAILS'} | "
            f"{'fails' if row['fails_below'] else 'PASSES'} | {row['step_processor_s']:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
