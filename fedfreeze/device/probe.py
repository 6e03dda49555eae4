"""What a device tells of itself before a round: its loss and its signature, by one forward pass under its cap."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from fedfreeze.device.cap import DeviceMemory, MemoryCap
from fedfreeze.network.stage import Stage, classifier_of, squared_losses
from fedfreeze.seeds import numpy_generator

# Elements of gradients that are there at a time where devices are asked together: 64 MiB.
_MOST_GRADIENTS = 2**24
LOSSES = 2  # figures of a row before its signature: mean loss, mean squared loss


@dataclass(frozen=True)
class Sketch:
    """A seeded count sketch (Charikar et al., 2002): it keeps inner products in expectation, and hides the rest."""

    buckets: torch.Tensor
    signs: torch.Tensor
    size: int

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """Map (elements,) to (size,)."""
        return torch.zeros(self.size, dtype=gradient.dtype).index_add_(0, self.buckets, gradient * self.signs)

    def of_rows(self, gradients: torch.Tensor) -> torch.Tensor:
        """Map (devices, elements) to (devices, size)."""
        sketched = torch.zeros(self.size, len(gradients), dtype=gradients.dtype)
        return sketched.index_add_(0, self.buckets, (gradients * self.signs).T.contiguous()).T


def make_sketch(elements: int, size: int, seed: int) -> Sketch | None:
    """Return the sketch to `size` numbers that every device uses; None where the gradient is no larger."""
    if elements <= size:
        return None
    generator = numpy_generator(seed, "signature sketch")
    buckets = torch.from_numpy(generator.integers(size, size=elements))
    signs = torch.from_numpy(generator.integers(2, size=elements) * 2 - 1).to(torch.float32)
    return Sketch(buckets, signs, size)


class Probe:
    """Asks devices on this rank at the stage's global values."""

    def __init__(
        self, stage: Stage, cap: MemoryCap, num_classes: int, signature_size: int, seed: int, prefix: str = "recomputed"
    ):
        """`prefix`: what devices do with their frozen blocks (`train.prefix`).

        By `stored` they run them first, and let go of them before they run the others.
        """
        self.stage = stage
        self.stores = prefix == "stored" and len(stage.frozen) > 0
        self.streams = prefix == "streamed"
        self.cap = cap
        self.classifier = classifier_of(stage, num_classes)
        self.signature_size = signature_size
        elements = num_classes * (self.classifier.in_features + 1)
        self.sketch = make_sketch(elements, signature_size, seed) if signature_size else None
        self.numbers = min(elements, signature_size)
        """Numbers of a signature; 0: none is asked for."""
        self.stage.eval()  # once, as of all the modules of a small network it takes as long as a step

    def ask(
        self, memory: DeviceMemory, key: tuple[object, ...], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> np.ndarray:
        """Return mean loss, mean squared loss and signature over all the samples of a device, float32.

        Raises DeviceOutOfMemoryError.
        """
        sums = torch.zeros(LOSSES, dtype=torch.float64, device=self.stage.flat.buffer.device)
        gradient = torch.zeros(self.classifier.out_features, self.classifier.in_features + 1, device=sums.device)
        seen = 0
        inputs: list[torch.Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            for images, labels in batches:
                kind, of_device, taken = (*key, len(images)), self.stage.held_tensors, images
                forward: Callable[[torch.Tensor], torch.Tensor] = self.stage
                if self.stores:
                    before = partial(_held, self.stage.frozen_tensors, images)
                    run = partial(self.stage.frozen_forward, images)
                    taken = self.cap.step(memory, (*kind, "stores"), before, run)
                    of_device, forward = self.stage.trained_tensors, self.stage.behind
                if self.streams:
                    of_device = self.stage.trained_tensors
                step = self._step(inputs, forward, taken, labels, gradient)
                held = partial(_held, of_device, taken, labels, gradient)
                sums += self.cap.step(memory, kind, held, partial(self._streamed, step), step)
                seen += len(images)
        finally:
            hook.remove()
        row = (sums / max(1, seen)).to(torch.float32).cpu()
        if not self.numbers:
            return row.numpy()
        flat = (gradient / max(1, seen)).flatten().cpu()
        return torch.cat([row, flat if self.sketch is None else self.sketch(flat)]).numpy()

    @torch.no_grad()
    def ask_together(self, images: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> np.ndarray:
        """Return what `ask` does for several devices, (devices, numbers), by one forward pass.

        `images`, `labels`: their samples, one device after the other; `sizes`: how many each has, over 0. It counts no
        memory: that is for whoever asks to see to.
        """
        inputs: list[torch.Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        try:
            logits = self.stage(images)
        finally:
            hook.remove()
        losses = functional.cross_entropy(logits, labels, reduction="none").double()
        samples = torch.tensor(sizes, device=labels.device)
        device_of = torch.arange(len(sizes), device=labels.device).repeat_interleave(samples)
        sums = losses.new_zeros(len(sizes), LOSSES).index_add_(0, device_of, torch.stack([losses, losses.square()], 1))
        row = (sums / samples[:, None]).to(torch.float32).cpu()
        if not self.numbers:
            return row.numpy()
        error = torch.softmax(logits, 1)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        with_bias = torch.cat([inputs[-1], torch.ones_like(inputs[-1][:, :1])], 1)
        each = list(zip(error.split(sizes), with_bias.split(sizes), sizes, strict=True))
        at_once = max(1, _MOST_GRADIENTS // (error.shape[1] * with_bias.shape[1]))
        found = []
        for begin in range(0, len(each), at_once):
            some = each[begin : begin + at_once]
            flat = torch.stack([(part.T @ features).flatten() / size for part, features, size in some]).cpu()
            found.append(flat if self.sketch is None else self.sketch.of_rows(flat))
        return torch.cat([row, torch.cat(found)], 1).numpy()

    def _streamed(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self.stage.streaming() if self.streams else nullcontext():
            return step()

    def _step(
        self,
        inputs: list[torch.Tensor],
        forward: Callable[[torch.Tensor], torch.Tensor],
        taken: torch.Tensor,
        labels: torch.Tensor,
        gradient: torch.Tensor,
    ) -> Callable[[], torch.Tensor]:
        @torch.no_grad()
        def step() -> torch.Tensor:
            inputs.clear()
            logits = forward(taken)
            if self.numbers:
                # of the last layer alone, so there is no backward pass: (probabilities - one-hot) x its input
                error = torch.softmax(logits, 1)
                error[torch.arange(len(labels), device=labels.device), labels] -= 1
                gradient[:, :-1] += error.T @ inputs[-1]
                gradient[:, -1] += error.sum(0)
            losses = functional.cross_entropy(logits, labels, reduction="sum")
            inputs.clear()
            return torch.stack([losses, squared_losses(logits, labels)])

        return step


def _held(of_device: Callable[[], list[torch.Tensor]], *batch: torch.Tensor) -> list[torch.Tensor]:
    return [*of_device(), *batch]
