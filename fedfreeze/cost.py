"""What a stage costs a device, before anything is trained: memory, FLOPs, bytes, by running it on fake tensors."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedfreeze.blocks import BlockedNetwork, ImageShape, build_network
from fedfreeze.cap import count_peak
from fedfreeze.config import Config, TrainConfig
from fedfreeze.errors import ConfigError
from fedfreeze.methods import full_model_stage, make_method
from fedfreeze.plugins import own_code
from fedfreeze.stage import LocalTrainer, Stage, sees_one_value

FLOAT_BYTES = 4


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage (or of the full model) for one device."""

    name: str
    """The blocks that train."""
    memory_bytes: int
    """Peak of live tensor bytes in one training step: weights, gradients, momentum, activations, batch."""
    step_flops: int
    """Floating-point operations of one training step, frozen forward included (torch's counter: 2 a multiply-add)."""
    frozen_flops: int
    """Of these, the forward pass of the frozen prefix."""
    trained_elements: int
    """Floats that train or are averaged: active block + output module. What one all-reduce carries."""
    active_parameters: int
    """Parameters of the active block alone."""
    frozen_elements: int
    """Floats of the frozen prefix, sent down once to a device that lacks them."""

    @property
    def bytes_up(self) -> int:
        """Bytes that a device sends a round, fp32."""
        return self.trained_elements * FLOAT_BYTES


@dataclass(frozen=True)
class Costs:
    """The stages of the configured method, and the full model at the same batch for comparison."""

    stages: tuple[StageCost, ...]
    full: StageCost


def measure_costs(config: Config, image_shape: ImageShape, num_classes: int) -> Costs:
    """Predict the cost of every stage and of the full model; nothing is allocated and nothing is trained.

    Raises ConfigError for a batch that the network's normalisation layers cannot take.
    """
    try:
        return _measure(config, image_shape, num_classes)
    except ValueError as error:
        if not sees_one_value(error):
            raise
        height, width = image_shape[1:]
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is too small for the normalisation layers of "
            f"{config.model.label} on {height}x{width} images, where the last block puts out one pixel; use 2 or more"
        ) from None


def _measure(config: Config, image_shape: ImageShape, num_classes: int) -> Costs:
    with fake_tensors():
        blocked = build_network(config.model, image_shape, num_classes, config.seed)
        method = make_method(config, blocked)
        cpu = torch.device("cpu")
        stages = []
        for index in range(method.num_stages):
            with own_code("method.name", config.method.name):
                stage = method.enter_stage(index, cpu)
            stages.append(_stage_cost(config, method.stage_names[index], stage, image_shape))
            with own_code("method.name", config.method.name):
                method.leave_stage(stage)
        full = _full_cost(config, blocked, image_shape)
    return Costs(tuple(stages), full)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Allocate nothing inside: tensors have shapes only."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails there is told by our own line
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.setLevel(level)


def _full_cost(config: Config, blocked: BlockedNetwork, image_shape: ImageShape) -> StageCost:
    stage = full_model_stage(blocked, torch.device("cpu"))
    return _stage_cost(config, "full model", stage, image_shape)


def _stage_cost(config: Config, name: str, stage: Stage, image_shape: ImageShape) -> StageCost:
    with own_code("model.factory", config.model.factory or ""):
        memory = step_memory(stage, config.train, image_shape)
        trainer, images, labels = _one_step(stage, config.train, image_shape)
        step_flops = _flops(lambda: trainer.step(images, labels))
        frozen_flops = _flops(lambda: stage.frozen_forward(images)) if len(stage.frozen) else 0
    return StageCost(
        name=name,
        memory_bytes=memory,
        step_flops=step_flops,
        frozen_flops=frozen_flops,
        trained_elements=len(stage.flat),
        active_parameters=stage.flat.active_parameters,
        frozen_elements=stage.frozen_elements,
    )


def step_memory(stage: Stage, train: TrainConfig, image_shape: ImageShape) -> int:
    """Return the peak of live tensor bytes in one training step of a stage; call it under FakeTensorMode."""
    trainer, images, labels = _one_step(stage, train, image_shape)
    return count_peak(lambda: trainer.step(images, labels), [*trainer.held_tensors(), images, labels])


def _one_step(
    stage: Stage, train: TrainConfig, image_shape: ImageShape
) -> tuple[LocalTrainer, torch.Tensor, torch.Tensor]:
    batch = train.batch_size
    return (
        LocalTrainer(stage, train),
        torch.zeros(batch, *image_shape),
        torch.zeros(batch, dtype=torch.int64),
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch counts attention on GPUs only
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        run()
    return counter.get_total_flops()
