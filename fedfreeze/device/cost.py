"""What a stage costs a device, before anything is trained: memory, FLOPs, bytes, by running a step or its shapes."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.config.schema import Config, ModelConfig, TrainConfig
from fedfreeze.config.ways import WHOLE, Way, ways_of
from fedfreeze.device.cap import count_peak
from fedfreeze.device.flops import count_flops
from fedfreeze.device.reserved import predicted
from fedfreeze.errors import ConfigError
from fedfreeze.methods import Method, full_model_stage, make_method, method_class
from fedfreeze.network.blocks import BlockedNetwork, build_network
from fedfreeze.network.models import MODELS
from fedfreeze.network.probing import ImageShape
from fedfreeze.network.stage import LocalTrainer, Stage, has_batch_norm, least_samples, sees_one_value
from fedfreeze.plugins import needs_values, own_code
from fedfreeze.seeds import global_seed
from fedfreeze.units import FLOAT_BYTES

T = TypeVar("T")

# A network is small if one core runs the steps below in a second or two, and its weights take 64 MiB.
_SMALL_FLOPS = 50 * 10**9
_SMALL_PARAMETERS = 2**24
# Forward passes' worth of what is run for a stage: two steps of three a way, the frozen prefix, and a forward pass.
_STEPS_OF_A_STAGE = 8


@dataclass(frozen=True)
class WayCost:
    """What a training step takes that is made one way."""

    way: Way
    memory_bytes: int
    """Peak of live tensor bytes: weights, gradients, momentum, activations, batch."""
    step_flops: int
    """Floating-point operations, frozen forward included (torch's counter: 2 a multiply-add)."""
    reserved_bytes: int | None = None
    """What a device's first steps would reserve on a GPU, predicted (reserved.py); None: it was not asked for."""
    by_segments: bool = False
    """Whether that is what a cap holds (`fleet.accounting`)."""

    @property
    def needed_bytes(self) -> int:
        """What a cap must hold."""
        return self.memory_bytes if self.reserved_bytes is None or not self.by_segments else self.reserved_bytes


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage (or of the full model) for one device."""

    name: str
    """The blocks that train."""
    ways: tuple[WayCost, ...]
    """Those of `train.fit`, in its order."""
    frozen_flops: int
    """Operations of the forward pass of the frozen prefix, in each of them."""
    forward_flops: int
    """Floating-point operations of one forward pass of a batch, as a device makes that is asked for its loss."""
    trained_elements: int
    """Floats that train or are averaged: active block + output module. What one all-reduce carries."""
    watched_parameters: int
    """Parameters of what is frozen when the stage ends: the active block, or the first of several."""
    frozen_elements: int
    """Floats of the frozen prefix, sent down once to a device that lacks them."""
    feature_bytes: int = 0
    """What the frozen prefix puts out for one image; 0: nothing is frozen."""
    batch_norm: bool = False
    """Whether it normalises over the batch, which one sample is too few for."""
    received_elements: int = 0
    """Floats of blocks that it runs and others train: sent down in each round beside the trained ones."""

    @property
    def memory_bytes(self) -> int:
        """What a cap must hold for training by the first way: peak of live tensor bytes, or reserved bytes."""
        return self.ways[0].needed_bytes

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one training step, by the first way."""
        return self.ways[0].step_flops

    @property
    def least_bytes(self) -> int:
        """The same by the way that needs least memory: what a device needs to join."""
        return min(way.needed_bytes for way in self.ways)

    def way_for(self, cap_bytes: int | None) -> int:
        """Return which way a device takes: the first that its cap holds; where it holds none, that of least memory."""
        for number, way in enumerate(self.ways):
            if cap_bytes is None or way.needed_bytes <= cap_bytes:
                return number
        return min(range(len(self.ways)), key=lambda number: self.ways[number].needed_bytes)

    @property
    def bytes_up(self) -> int:
        """Bytes that a device sends a round, fp32."""
        return self.trained_elements * FLOAT_BYTES

    @property
    def bytes_down(self) -> int:
        """Bytes that a device is sent in each round, fp32; once the frozen prefix comes on top."""
        return (self.trained_elements + self.received_elements) * FLOAT_BYTES


@dataclass(frozen=True)
class Costs:
    """The stages of the configured method, and the full model at the same batch for comparison."""

    levels: tuple[tuple[StageCost, ...], ...]
    """For each stage its sub-models, the smallest first; most methods have one."""
    full: StageCost

    @property
    def stages(self) -> tuple[StageCost, ...]:
        """Each stage as a device trains it that holds all of it."""
        return tuple(levels[-1] for levels in self.levels)

    @property
    def needed_bytes(self) -> tuple[int, ...]:
        """For each stage the memory of its smallest sub-model: what a device needs to join."""
        return tuple(levels[0].least_bytes for levels in self.levels)

    @property
    def least_samples(self) -> tuple[int, ...]:
        """For each stage the samples that a device needs to train in it."""
        return tuple(least_samples(any(cost.batch_norm for cost in levels)) for levels in self.levels)

    def level_of(self, stage: int, cap_bytes: int | None) -> int:
        """Return the largest sub-model of a stage that a cap holds; the smallest where it holds none."""
        held = [i for i, cost in enumerate(self.levels[stage]) if cap_bytes is None or cost.least_bytes <= cap_bytes]
        return max(held, default=0)


def measure_costs(
    config: Config,
    image_shape: ImageShape,
    num_classes: int,
    fitted: dict[str, Any] | None = None,
    values: bool | None = None,
    *,
    reserved: bool = False,
) -> Costs:
    """Predict the cost of every stage and of the full model; nothing is trained.

    `values`: True runs steps on tensors that have values, False on such that have a shape only, which allocates
    nothing; None: whichever is quicker. The result is the same. A network that branches on values has them in any case.
    `fitted` is what `fit_method` returned. `reserved`: with what each way would reserve on a GPU, as is the case where
    caps go by that (`fleet.accounting`). Raises ConfigError for a batch that the network's normalisation layers cannot
    take.
    """
    with _batch_told(config, image_shape):
        if values is None:
            values = _is_small(config, image_shape, num_classes)
        reserved = reserved or config.fleet.accounting == "cuda_segments"
        as_laid = laid_as_on_gpu(config) if reserved else config
        return _measured(lambda: _measure(as_laid, image_shape, num_classes, fitted or {}, reserved), values)


def laid_as_on_gpu(config: Config) -> Config:
    """Return the configuration whose network lies in memory as where GPUs compute."""
    if config.model.memory_format != "auto":
        return config
    # what GPUs gain by another layout has not been measured
    return replace(config, model=replace(config.model, memory_format="contiguous"))


def chunked_as_on_gpu(train: TrainConfig) -> TrainConfig:
    """Return the settings by which a batch goes through frozen blocks as where GPUs compute (`train.prefix_chunk`)."""
    return replace(train, prefix_chunk=None) if train.prefix_chunk == "auto" else train


def fit_method(config: Config, image_shape: ImageShape, num_classes: int, caps: Sequence[int | None]) -> dict[str, Any]:
    """Return what the method makes of the fleet's caps, as plain values (Method.fit). Raises ConfigError."""
    if config.fleet.accounting == "cuda_segments":
        config = laid_as_on_gpu(config)
    is_small = cache(partial(_is_small, config, image_shape, num_classes))

    def level_memory(model: ModelConfig) -> list[int]:
        def measure() -> list[int]:
            blocked = build_network(model, image_shape, num_classes, config.seed)
            method = make_method(config, blocked)
            return [least_needed(stage, config, image_shape) for stage in _levels(config, method, 0)]

        return _measured(measure, is_small())

    method = method_class(config)
    with _batch_told(config, image_shape), own_code("method.name", config.method.name):
        return method.fit(config, caps, level_memory)


@contextmanager
def _batch_told(config: Config, image_shape: ImageShape) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not sees_one_value(error):
            raise
        height, width = image_shape[1:]
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is too small for the normalisation layers of "
            f"{config.model.label} on {height}x{width} images, where the last block puts out one pixel; use 2 or more"
        ) from None


def _is_small(config: Config, image_shape: ImageShape, num_classes: int) -> bool:
    """Whether to run a few steps of a network takes less than tensors without values, which cost seconds to set up."""
    if config.model.factory is None:
        with torch.device("meta"):
            network, _ = MODELS[config.model.name](config.model, num_classes, image_shape)
        if sum(parameter.numel() for parameter in network.parameters()) > _SMALL_PARAMETERS:
            return False
    images = torch.full((2, *image_shape), 0.5)
    with global_seed(0, "cost"), own_code("model.factory", config.model.factory or ""), torch.no_grad():
        blocked = build_network(config.model, image_shape, num_classes, config.seed)
        blocked.network.eval()
        flops = count_flops(lambda: blocked.network(images))
    steps = _STEPS_OF_A_STAGE * len(ways_of(config.train.fit)) * (len(blocked.blocks) + 1)
    return flops * config.train.batch_size // len(images) * steps <= _SMALL_FLOPS


def _measured(measure: Callable[[], T], values: bool) -> T:
    """Measure on tensors with values or without; where a network branches on values, with them in any case."""
    if not values:
        try:
            with fake_tensors():
                return measure()
        except RuntimeError as error:
            if not needs_values(error):
                raise
    with global_seed(0, "cost"):
        return measure()


def _measure(
    config: Config, image_shape: ImageShape, num_classes: int, fitted: dict[str, Any], reserved: bool
) -> Costs:
    model = method_class(config).network(config.model, fitted)
    blocked = build_network(model, image_shape, num_classes, config.seed)
    method = make_method(config, blocked, fitted)
    found = []
    for index in range(method.num_stages):
        stages = enumerate(_levels(config, method, index))
        names = partial(method.level_name, index)
        found.append(tuple(_stage_cost(config, names(i), stage, image_shape, reserved) for i, stage in stages))
    if model != config.model:
        blocked = build_network(config.model, image_shape, num_classes, config.seed)
    full = _full_cost(config, blocked, image_shape, reserved)
    return Costs(tuple(found), full)


def _levels(config: Config, method: Method, index: int) -> Iterator[Stage]:
    """Yield the sub-models of a stage, the smallest first; what one holds is given back before the next is made."""
    for level in range(method.num_levels(index)):
        with trained_stage(config, method, index, level, torch.device("cpu")) as stage:
            yield stage


@contextmanager
def trained_stage(config: Config, method: Method, index: int, level: int, device: torch.device) -> Iterator[Stage]:
    """Give what a device trains in a stage: the sub-model of a level, or the stage itself."""
    with own_code("method.name", config.method.name):
        stage = method.enter_level(index, level, device) if method.counted else method.enter_stage(index, device)
    yield stage
    if not method.counted:
        with own_code("method.name", config.method.name):
            method.leave_stage(stage)


@contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Allocate nothing inside: tensors have shapes only.

    With a `mode` of its own, what was made inside can be used in it again; another would take it for new.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails there is told by our own line
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.setLevel(level)


def _full_cost(config: Config, blocked: BlockedNetwork, image_shape: ImageShape, reserved: bool) -> StageCost:
    stage = full_model_stage(blocked, torch.device("cpu"))
    return _stage_cost(config, "full model", stage, image_shape, reserved)


def _stage_cost(config: Config, name: str, stage: Stage, image_shape: ImageShape, reserved: bool) -> StageCost:
    with own_code("model.factory", config.model.factory or ""):
        ways = tuple(_way_cost(config, way, stage, image_shape, reserved) for way in ways_of(config.train.fit))
        trainer, images, _ = _one_step(stage, config.train, image_shape)
        frozen_flops = sum(count_flops(lambda: trainer.frozen_forward(images)) for _ in trainer.pieces())
        features = stage.frozen_forward(images).numel() * FLOAT_BYTES // len(images) if len(stage.frozen) else 0
        stage.eval()
        with torch.no_grad():
            forward_flops = count_flops(lambda: stage(images))
    return StageCost(
        name=name,
        ways=ways,
        frozen_flops=frozen_flops,
        forward_flops=forward_flops,
        trained_elements=len(stage.flat) - stage.received_elements,
        watched_parameters=stage.watched_parameters,
        frozen_elements=stage.frozen_elements,
        feature_bytes=features,
        batch_norm=has_batch_norm(stage),
        received_elements=stage.received_elements,
    )


def _way_cost(config: Config, way: Way, stage: Stage, image_shape: ImageShape, reserved: bool) -> WayCost:
    memory = reserved_bytes = None
    if reserved and config.train.prefix == "recomputed":  # the others are on CPUs only
        memory, reserved_bytes = predicted(stage, chunked_as_on_gpu(config.train), image_shape, way)
    if memory is None or (config.fleet.accounting == "tensor_bytes" and len(stage.frozen)):
        memory = step_memory(stage, config.train, image_shape, way)
    trainer, images, labels = _one_step(stage, config.train, image_shape)
    trainer.go(way)
    flops = sum(count_flops(lambda: trainer.step(images, labels)) for _ in trainer.pieces())
    return WayCost(way, memory, flops, reserved_bytes, config.fleet.accounting == "cuda_segments")


def least_memory(stage: Stage, train: TrainConfig, image_shape: ImageShape) -> int:
    """Return `step_memory` by that of the ways of `train.fit` that needs least."""
    return min(step_memory(stage, train, image_shape, way) for way in ways_of(train.fit))


def least_needed(stage: Stage, config: Config, image_shape: ImageShape) -> int:
    """Return what a cap must hold by the way that needs least: `least_memory`, or what is reserved by it."""
    if config.fleet.accounting == "tensor_bytes":
        return least_memory(stage, config.train, image_shape)
    train = chunked_as_on_gpu(config.train)
    return min(predicted(stage, train, image_shape, way)[1] for way in ways_of(config.train.fit))


def step_memory(stage: Stage, train: TrainConfig, image_shape: ImageShape, way: Way = WHOLE) -> int:
    """Return the peak of live tensor bytes in one training step of a stage by a way; tensors may have shapes only.

    With `train.prefix: stored` it is that of a step behind the frozen blocks, or of their forward pass if that is more;
    where a device trains piece by piece, it is that of the largest piece.
    """
    trainer, images, labels = _one_step(stage, train, image_shape)
    trainer.go(way)
    if train.prefix != "stored" or not len(stage.frozen):
        return max(
            count_peak(lambda: trainer.counted_step(images, labels), [*trainer.held_tensors(), images, labels])
            for _ in trainer.pieces()
        )
    filling = count_peak(lambda: stage.frozen_forward(images), [*stage.frozen_tensors(), images])
    found = stage.frozen_forward(images)

    def read() -> torch.Tensor:
        return torch.empty_strided(found.shape, found.stride()).copy_(found)

    return max(filling, count_peak(lambda: trainer.step_behind(read, labels), [*trainer.held_behind(), labels]))


def _one_step(
    stage: Stage, train: TrainConfig, image_shape: ImageShape
) -> tuple[LocalTrainer, torch.Tensor, torch.Tensor]:
    batch = train.batch_size
    return (
        stage.trainer(train),
        torch.zeros(batch, *image_shape),
        torch.zeros(batch, dtype=torch.int64),
    )
