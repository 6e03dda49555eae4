"""Where the predicted peak of each stage comes from: what is held, what is saved for backward, the frozen forward.

    python benchmarks/memory_breakdown.py [--model resnet18] [--width 64] [--batch 128] [--output-module conv]
        [--way recompute2] [--prefix streamed]

Held: weights, buffers, momentum, batch. Gradients: those of all trained parameters. Saved: activations that autograd
keeps for the backward pass. Frozen forward: the peak while the prefix runs, held bytes included. The peak is less than
held + gradients + saved where gradients come while activations go, and more where the backward pass needs transients.
With a `--way` other than `whole`: instead of that, what is there at the peak of each stage, tensor by tensor.
"""

import argparse
import sys
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import ways_of
from fedfreeze.device.cap import TensorByteCounter, count_peak
from fedfreeze.device.cost import fake_tensors
from fedfreeze.methods import full_model_stage, make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.units import MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--output-module", default="conv_norm")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--way", default="whole")
    parser.add_argument("--prefix", default="recomputed", choices=["recomputed", "streamed"])
    options = parser.parse_args()
    config = make_config(
        {
            "model": {"name": options.model, "width": options.width},
            "method": {"output_module": options.output_module},
            "train": {"batch_size": options.batch, "fit": options.way, "prefix": options.prefix},
        }
    )
    if options.way != "whole":
        at_peaks(config, options.batch)
        return 0
    print("| stage | held MiB | gradients | saved | held + gradients + saved | frozen forward | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    with FakeTensorMode():
        blocked = build_network(config.model, (3, 32, 32), 10, 0)
        method = make_method(config, blocked)
        for index, name in enumerate(method.stage_names):
            stage = method.enter_stage(index, torch.device("cpu"))
            print(row(name, stage, LocalTrainer(stage, config.train), options.batch))
            method.leave_stage(stage)
        stage = full_model_stage(blocked, torch.device("cpu"))
        print(row("full model", stage, LocalTrainer(stage, config.train), options.batch))
    return 0


class Inventory(TensorByteCounter):
    """Counts, and notes at the peak what is there: the operation that made it, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[str, tuple[int, ...], int]] = {}
        self.at_peak: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.operation = "held"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation = str(func).removeprefix("aten.").removesuffix(".default")
        before = self.peak_bytes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.peak_bytes > before:
            self.at_peak.clear()
            for key in self._alive:
                operation, shape, size = self.alive[key]
                self.at_peak[operation, shape] += size
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        known = set(self._alive)
        super()._count(tensor)
        for key in set(self._alive) - known:
            self.alive[key] = (self.operation, tuple(tensor.shape), tensor.untyped_storage().nbytes())


def at_peaks(config: Config, batch: int) -> None:
    """Print what is there at the peak of each stage by the first way of a configuration, what is under 0.5 % apart."""
    with fake_tensors():
        method = make_method(config, build_network(config.model, (3, 32, 32), 10, 0))
        for index, name in enumerate(method.stage_names):
            stage = method.enter_stage(index, torch.device("cpu"))
            trainer = LocalTrainer(stage, config.train)
            trainer.go(ways_of(config.train.fit)[0])
            images, labels = torch.zeros(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)
            counter = Inventory()
            counter.adopt([*trainer.held_tensors(), images, labels])
            with counter:
                trainer.counted_step(images, labels)
            print(f"\n{name}: {counter.peak_bytes / MIB:.1f} MiB\n\n| MiB | made by | shape |\n|--:|---|---|")
            for (operation, shape), size in counter.at_peak.most_common():
                if size > 0.005 * counter.peak_bytes:
                    print(f"| {size / MIB:.1f} | {operation} | {'x'.join(map(str, shape))} |")
            method.leave_stage(stage)


def row(name: str, stage: Stage, trainer: LocalTrainer, batch: int) -> str:
    """Return one line of the table."""
    images, labels = torch.zeros(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)
    held = [*trainer.held_tensors(), images, labels]
    held_bytes = count_peak(lambda: None, held)
    held_storages = {tensor.untyped_storage()._cdata for tensor in held}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held_storages:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(stage(images), labels)
        del loss
    gradients = 4 * stage.flat.parameters
    frozen = count_peak(lambda: stage.frozen_forward(images), held) if len(stage.frozen) else 0
    peak = count_peak(lambda: trainer.step(images, labels), held)
    total = held_bytes + gradients + sum(saved.values())
    figures = [held_bytes, gradients, sum(saved.values()), total, frozen, peak]
    return f"| {name} | " + " | ".join(f"{figure / MIB:.1f}" for figure in figures) + " |"


if __name__ == "__main__":
    sys.exit(main())
