"""Every stage tried on a GPU before anything is trained: what its allocator reserves, whether its kernels repeat."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedfreeze.config.schema import Config, ModelConfig
from fedfreeze.config.ways import WHOLE, Way, ways_of
from fedfreeze.data.batches import drawn_once, training_batches
from fedfreeze.data.store import Data, Split
from fedfreeze.device.cap import DeviceMemory, MemoryCap, make_cap
from fedfreeze.device.cost import Costs, StageCost, laid_as_on_gpu, trained_stage
from fedfreeze.device.on_gpu import held_for, warm_up
from fedfreeze.errors import ConfigError, UnavailableError
from fedfreeze.methods import full_model_stage, make_method, method_class
from fedfreeze.network.blocks import build_network
from fedfreeze.network.probing import ImageShape
from fedfreeze.network.stage import Stage
from fedfreeze.plugins import own_code
from fedfreeze.seeds import global_seed

_NO_KERNEL = " does not have a deterministic implementation"


def model_on(config: Config, fitted: dict[str, Any], device: torch.device) -> ModelConfig:
    """Return the configuration of the network that is built where `device` computes."""
    if device.type != "cpu" or config.fleet.accounting == "cuda_segments":
        config = laid_as_on_gpu(config)
    return method_class(config).network(config.model, fitted)


def config_on(config: Config, device: torch.device) -> Config:
    """Return the configuration by which devices are counted where `device` computes: a GPU's own allocator counts."""
    if device.type == "cpu":
        return config
    return replace(config, fleet=replace(config.fleet, accounting="tensor_bytes"))


def with_reserved(
    config: Config,
    costs: Costs,
    image_shape: ImageShape,
    num_classes: int,
    fitted: dict[str, Any],
    device: torch.device,
) -> Costs:
    """Return the costs with the memory that each stage, and each of its sub-models, reserves on this GPU, if larger.

    The allocator rounds up and leaves gaps, so a device whose cap lies between would be chosen and fail. Measured
    under no cap; the full model is left as predicted where this GPU cannot hold it. Raises UnavailableError for a stage
    that it cannot hold, ConfigError for a layer that has no kernel whose result repeats.
    """
    cap = make_cap(device)
    data = black_images(config.train.batch_size, image_shape, num_classes)
    model = model_on(config, fitted, device)
    method = make_method(config, build_network(model, image_shape, num_classes, config.seed), fitted)
    found = []
    for index, levels in enumerate(costs.levels):
        tried = []
        for level, cost in enumerate(levels):
            cap.begin_stage()
            with trained_stage(config, method, index, level, device) as stage:
                peaks = reserved_peaks(stage, config, data, cap, device)
            tried.append(_at_least(cost, peaks))
        found.append(tuple(tried))
    full = costs.full
    blocked = build_network(model, image_shape, num_classes, config.seed)
    cap.begin_stage()
    # nobody trains it, but where it is a stage, too
    with suppress(UnavailableError, ConfigError):
        full = _at_least(full, reserved_peaks(full_model_stage(blocked, device), config, data, cap, device))
    del blocked, method
    gc.collect()
    cap.begin_stage()
    return Costs(tuple(found), full)


class StageTrial:
    """A stage as the emulator holds it, and devices that train on all of some data.

    `cap.begin_stage` was called before the stage was made. Raises ConfigError for a layer whose kernel does not repeat.
    """

    def __init__(self, stage: Stage, config: Config, data: Data, cap: MemoryCap, device: torch.device):
        self.stage, self.config, self.data, self.cap, self.device = stage, config, data, cap, device
        self.rows = np.arange(len(data.train))
        self.trainer = stage.trainer(config.train)
        cap.holds(self.trainer)
        with cap.on_top(), own_code("model.factory", config.model.factory or ""), repeatable(stage, config):
            self.held = held_for(stage, config, data, [self.rows], device, counted=False)
            self.values = self.held.put("values", stage.flat.values())
            warm_up(stage, config, data, [self.rows], device, self.held.samples)

    def train(self, cap_bytes: int | None, way: Way = WHOLE) -> DeviceMemory:
        """Train one device by a way and return what it needed; its values are put back.

        Raises DeviceOutOfMemoryError.
        """
        config = self.config
        try:
            with self.cap.device(cap_bytes) as memory, global_seed(config.seed, "trial"):
                self.trainer.begin(self.values, config.train.learning_rate, way)
                for piece in self.trainer.pieces():
                    drawn = drawn_once(config, self.data, len(self.rows), "trial")
                    for images, labels in training_batches(self.data, self.rows, drawn, self.device, self.held.samples):
                        step, held = partial(self.trainer.step, images, labels), partial(self._held, images, labels)
                        self.cap.step(memory, (self, way, piece, len(images)), held, step)
        finally:
            self.trainer.drop_gradients()
        self.stage.flat.load(self.values)
        return memory

    def _held(self, *batch: torch.Tensor) -> list[torch.Tensor]:
        return [*self.trainer.held_tensors(), *batch]


def reserved_peaks(stage: Stage, config: Config, data: Data, cap: MemoryCap, device: torch.device) -> list[int]:
    """Return the peak that a cap governs, in bytes, of a device under no cap, by way; see StageTrial."""
    trial = StageTrial(stage, config, data, cap, device)
    return [trial.train(None, way).peak_bytes for way in ways_of(config.train.fit)]


def black_images(batch_size: int, image_shape: ImageShape, num_classes: int) -> Data:
    """Return black images for two batches and a half: the last of a device's is mostly smaller, which leaves gaps."""
    count = 2 * batch_size + max(2, batch_size // 2)
    split = Split(np.zeros((count, *image_shape), np.uint8), np.arange(count, dtype=np.int64) % num_classes)
    channels = image_shape[0]
    return Data(split, split, num_classes, (0.5,) * channels, (0.5,) * channels)


def _at_least(cost: StageCost, reserved_bytes: Sequence[int]) -> StageCost:
    found = zip(cost.ways, reserved_bytes, strict=True)
    return replace(cost, ways=tuple(replace(way, memory_bytes=max(way.memory_bytes, peak)) for way, peak in found))


@contextmanager
def repeatable(network: nn.Module, config: Config) -> Iterator[None]:
    """Raise ConfigError, naming layer and operation, if inside a layer runs that has no deterministic kernel."""
    at = ["the loss"]
    hooks = []
    for name, module in network.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_pre_hook(_noted(at, f"{type(module).__name__} ({name})")))
            hooks.append(module.register_forward_hook(_noted_backward(at, f"{type(module).__name__} ({name})")))
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(_NO_KERNEL)
        if not found:
            raise
        raise ConfigError(
            f"{config.model.label}: {at[0]} has no kernel on GPUs that gives the same bits again "
            f"({operation.split()[-1]}); use another layer there, or train.device=cpu"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()


def _noted(at: list[str], layer: str) -> Any:
    def hook(*_: Any) -> None:
        at[0] = layer

    return hook


def _noted_backward(at: list[str], layer: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(_noted(at, layer))

    return hook
