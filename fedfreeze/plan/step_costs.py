"""What a training step takes the devices of a fleet, of which each goes its own way: who goes which, and mean FLOPs."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.config.schema import Config
from fedfreeze.config.ways import ways_of
from fedfreeze.device.cost import StageCost, chunked_as_on_gpu, fake_tensors, step_memory
from fedfreeze.device.flops import FlopCounter, count_flops
from fedfreeze.device.reserved import predicted
from fedfreeze.fleet.devices import Fleet
from fedfreeze.methods import SmartFreeze
from fedfreeze.network.blocks import Outline
from fedfreeze.network.probing import ImageShape, Shape
from fedfreeze.network.stage import LocalTrainer, Stage


def with_split(config: Config, split: Sequence[str]) -> Config:
    """Return the configuration with another cut."""
    return replace(config, model=replace(config.model, split=list(split)))


def one_block_a_stage(config: Config) -> Config:
    """Return the configuration without a window: a stage of several blocks needs what one of all of them does."""
    return replace(config, method=replace(config.method, window=1))


class StepCost(NamedTuple):
    """What a training step takes by one way."""

    memory_bytes: int
    """What a cap must hold: peak of live tensor bytes, or what is reserved (`fleet.accounting`)."""
    flops: int
    """Floating-point operations; with `train.prefix: stored` without the frozen blocks, which run once a stage."""


def step_costs(cost: StageCost, config: Config) -> tuple[StepCost, ...]:
    """Return what a step of a stage takes by each of its ways, as the cost model has measured it."""
    once = cost.frozen_flops if config.train.prefix == "stored" else 0
    return tuple(StepCost(way.needed_bytes, way.step_flops - once) for way in cost.ways)


class Caps:
    """The memory caps of a fleet: which ways its devices go, and the mean of their operations."""

    def __init__(self, fleet: Fleet):
        self.ascending = sorted(math.inf if cap is None else cap for cap in fleet.memory_cap_bytes)

    def eligible(self, memory_bytes: float) -> int:
        """Return how many devices' caps hold `memory_bytes`."""
        return len(self.ascending) - bisect_left(self.ascending, memory_bytes)

    def limit_bytes(self, devices: int) -> float:
        """Return how much memory so many of the devices have at least; inf: they have no caps."""
        return self.ascending[len(self.ascending) - devices]

    def takers(self, steps: Sequence[StepCost]) -> tuple[int, ...]:
        """Return how many devices go each way, the first that their cap holds; who holds none is in no number."""
        counts, served = [], 0
        for step in steps:
            held = self.eligible(step.memory_bytes)
            counts.append(max(0, held - served))
            served = max(served, held)
        return tuple(counts)

    def mean_flops(self, steps: Sequence[StepCost]) -> float:
        """Return the floating-point operations of a step, the mean over the devices that can join; inf: none can."""
        takers = self.takers(steps)
        if not sum(takers):
            return math.inf
        return sum(count * step.flops for count, step in zip(takers, steps, strict=True)) / sum(takers)


class StageSteps:
    """Measures a step of any stage of any cut of a network, on tensors that have shapes only.

    A stage is named by places at which blocks can begin, as numbers: where what it trains begins, where that ends, and
    where the later ones of the missing blocks begin. The number of places is the end of the last block.
    """

    def __init__(self, config: Config, outline: Outline, image_shape: ImageShape, mode: FakeTensorMode):
        """`mode`: that in which the outline was made."""
        self.config = one_block_a_stage(config)
        self.outline = outline
        self.places = outline.places
        self.image_shape = image_shape
        self.mode = mode
        self._steps: dict[tuple[int, tuple[int, ...]], tuple[StepCost, ...]] = {}
        self._frozen: dict[int, int] = {}
        self._behind: dict[int, tuple[Shape, int]] = {}
        self._surrogates: dict[tuple[Shape, Shape], int] = {}

    def of(self, begin: int, tail: Sequence[int]) -> tuple[StepCost, ...]:
        """Return what a step takes by each way of `train.fit`; `tail`: the end, and where later blocks begin."""
        tail = tuple(place for place in tail if place < len(self.places))
        key = (begin, tail)
        if key not in self._steps:
            with fake_tensors(self.mode):
                method = self._method([begin, *tail])
                stage = method.enter_stage(0 if begin == 0 else 1, torch.device("cpu"))
                self._steps[key] = self._measured(stage)
                if begin not in self._frozen:
                    self._frozen[begin] = self._frozen_flops(stage)
                method.leave_stage(stage)
        return self._steps[key]

    def frozen_flops(self, begin: int) -> int:
        """Return the operations of a step in the blocks before a place; 0 if they run once a stage."""
        if begin not in self._frozen:
            self.of(begin, [begin + 1])
        return 0 if self.config.train.prefix == "stored" else self._frozen[begin]

    def output_flops(self, end: int) -> int:
        """Return the operations of the output module behind a place, for one missing block, activations stored."""
        return self._output(end)[1]

    def further_flops(self, begin: int, end: int) -> int:
        """Return the operations by which an output module that begins at `begin` grows by a cut at `end`.

        They add up over the missing blocks, as each has a surrogate that depends on that block alone.
        """
        if end == len(self.places) or self.config.method.output_module == "pool":
            return 0
        shapes = (self._output(begin)[0], self._output(end)[0])
        if shapes not in self._surrogates:
            with fake_tensors(self.mode):
                surrogate = self._method([begin, end]).output_modules.surrogates[0]
                self._surrogates[shapes] = self._trained_flops(surrogate, shapes[0])
        return self._surrogates[shapes] + self.output_flops(end) - self.output_flops(begin)

    def _output(self, end: int) -> tuple[Shape, int]:
        """Return what goes into the output module behind a place, and its operations."""
        if end not in self._behind:
            with fake_tensors(self.mode):
                method = self._method([end])
                shape = method.blocked.shapes[0]
                self._behind[end] = (shape, self._trained_flops(method.output_modules.behind(0), shape))
        return self._behind[end]

    def _method(self, places: Sequence[int]) -> SmartFreeze:
        split = [self.places[i] for i in places if 0 < i < len(self.places)]
        return SmartFreeze(with_split(self.config, split or self.places[:1]), self.outline.cut(split))

    def _measured(self, stage: Stage) -> tuple[StepCost, ...]:
        train, found = self.config.train, []
        for way in ways_of(train.fit):
            with FlopCounter() as counter:
                memory = step_memory(stage, train, self.image_shape, way)
            flops = counter.flops
            if self.config.fleet.accounting == "cuda_segments":
                memory = predicted(stage, chunked_as_on_gpu(train), self.image_shape, way)[1]
            if train.prefix == "stored":  # then what was counted is no whole step
                trainer = LocalTrainer(stage, train)
                trainer.go(way)
                images, labels = self._images(), torch.zeros(train.batch_size, dtype=torch.int64)
                flops = count_flops(lambda: trainer.step(images, labels)) - self._frozen_flops(stage)  # noqa: B023
            found.append(StepCost(memory, flops))
        return tuple(found)

    def _frozen_flops(self, stage: Stage) -> int:
        return count_flops(lambda: stage.frozen_forward(self._images())) if len(stage.frozen) else 0

    def _images(self) -> torch.Tensor:
        return torch.zeros(self.config.train.batch_size, *self.image_shape)

    def _trained_flops(self, module: nn.Module, shape: Shape) -> int:
        """Return the operations of a forward and a backward pass, that to what comes in included."""
        entering = torch.zeros(self.config.train.batch_size, *shape, requires_grad=True)
        wanted = [entering, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

        def run() -> None:
            out = module(entering.clone())  # a leaf must not be changed in place
            torch.autograd.grad(out.sum(), wanted, allow_unused=True)

        return count_flops(run)
