"""Where the predicted peak of each stage comes from: what is held, what is saved for backward, the frozen forward.

    python benchmarks/memory_breakdown.py [--model resnet18] [--width 64] [--batch 128] [--output-module conv]

Held: weights, buffers, momentum, batch. Gradients: those of all trained parameters. Saved: activations that autograd
keeps for the backward pass. Frozen forward: the peak while the prefix runs, held bytes included. The peak is less than
held + gradients + saved where gradients come while activations go, and more where the backward pass needs transients.
"""

import argparse
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.device.cap import count_peak
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
    options = parser.parse_args()
    config = make_config(
        {
            "model": {"name": options.model, "width": options.width},
            "method": {"output_module": options.output_module},
            "train": {"batch_size": options.batch},
        }
    )
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
