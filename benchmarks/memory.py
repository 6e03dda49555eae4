"""Predicted against measured peak memory of every stage and the full model, and whether the cap holds at the peak.

    python benchmarks/memory.py [--model resnet18] [--width 64] [--batch 32 128] [--device cpu|cuda] [--json FILE]

Predicted: tensor bytes of one step counted on fake tensors (what `fedfreeze plan` prints). Measured: the same count on
a real step; on a GPU also the reserved bytes, which the CUDA memory fraction governs. Then the step runs under a cap of
exactly the measured peak, which must pass, and of less (1 MiB on CPU, one 2 MiB segment on a GPU), which must fail.
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
            "train": {"batch_size": batch},
        }
        started = time.monotonic()
        costs = measure_costs(make_config(values), SHAPE, CLASSES)
        print(f"batch {batch}: predicted in {time.monotonic() - started:.1f} s", file=sys.stderr)
        rows += [measure(make_config(values), i, cost, device) for i, cost in enumerate(costs.stages)]
        values["method"]["name"] = "fedavg"
        rows.append(measure(make_config(values), 0, costs.full, device))
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


def measure(config: Config, index: int, cost: StageCost, device: torch.device) -> dict[str, Any]:
    """Measure one stage on real tensors, and try the cap at the measured peak and below."""
    batch = config.train.batch_size
    method = make_method(config, build_network(config.model, SHAPE, CLASSES, 0))
    cap = make_cap(device)
    cap.begin_stage()
    stage = method.enter_stage(index, device)
    trainer = LocalTrainer(stage, config.train)
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
    below = 2 * MIB if device.type == "cuda" else MIB
    row = {
        "batch": batch,
        "blocks": cost.name,
        "predicted_mib": cost.memory_bytes / MIB,
        "tensor_peak_mib": tensor_peak / MIB,
        "peak_mib": peak / MIB,
        "difference": cost.memory_bytes / tensor_peak - 1,
        "passes_at_peak": holds(train, peak),
        "fails_below": not holds(train, peak - below),
    }
    trainer.drop_gradients()
    method.leave_stage(stage)
    return row


def one_step(cap: MemoryCap, memory: Any, trainer: LocalTrainer, x: torch.Tensor, y: torch.Tensor) -> None:
    """Take one step as the emulator does."""
    cap.step(memory, len(x), lambda: [*trainer.held_tensors(), x, y], lambda: trainer.step(x, y))


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
    print("| batch | stage | predicted MiB | measured tensor MiB | difference | governed peak MiB | at peak | below |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['batch']} | {row['blocks']} | {row['predicted_mib']:.1f} | {row['tensor_peak_mib']:.1f} | "
            f"{row['difference']:+.2%} | {row['peak_mib']:.1f} | {'passes' if row['passes_at_peak'] else 'FAILS'} | "
            f"{'fails' if row['fails_below'] else 'PASSES'} |"
        )


if __name__ == "__main__":
    sys.exit(main())
