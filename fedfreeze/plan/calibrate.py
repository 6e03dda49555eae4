"""`fedfreeze plan --calibrate`: what this machine makes of each stage, in real training steps."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from fedfreeze.compute import device_kind, torch_threads
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import ways_of
from fedfreeze.device.cost import Costs, trained_stage
from fedfreeze.errors import UnavailableError
from fedfreeze.methods import make_method, method_class
from fedfreeze.network.blocks import build_network
from fedfreeze.network.probing import ImageShape
from fedfreeze.network.stage import Stage
from fedfreeze.plugins import own_code
from fedfreeze.seeds import torch_generator

SECONDS_A_STAGE = 2.0
WARM_UP_STEPS = 3  # the first steps load kernels and fill the allocator
FEWEST_STEPS = 3  # also where one takes longer than all the time there is


@dataclass(frozen=True)
class StageSpeed:
    """How fast a stage trained here."""

    name: str
    """The blocks that train."""
    step_flops: int
    """By the cost model."""
    step_s: float
    """Median seconds of a step."""
    steps: int
    """How many were timed."""

    @property
    def gflops(self) -> float:
        """Return 10^9 floating-point operations a second."""
        return self.step_flops / self.step_s / 1e9


def calibrate(
    config: Config,
    image_shape: ImageShape,
    num_classes: int,
    costs: Costs,
    fitted: dict[str, Any] | None = None,
    *,
    seconds_a_stage: float | None = None,
) -> list[StageSpeed]:
    """Time training steps of every stage, of its largest sub-model where it has several; weights stay as they are.

    Raises UnavailableError for a device that is missing or too small.
    """
    device = torch.device(device_kind(config.train.device))
    seconds = SECONDS_A_STAGE if seconds_a_stage is None else seconds_a_stage
    model = method_class(config).network(config.model, fitted or {})
    method = make_method(config, build_network(model, image_shape, num_classes, config.seed), fitted)
    generator = torch_generator(config.seed, "calibration")
    images = torch.randn(config.train.batch_size, *image_shape, generator=generator)
    labels = torch.randint(num_classes, (config.train.batch_size,), generator=generator)
    batch = images.to(device), labels.to(device)
    found = []
    with torch_threads(config.train.threads_per_rank):
        for index, cost in enumerate(costs.stages):
            largest = method.num_levels(index) - 1
            with _memory_told(config, device), trained_stage(config, method, index, largest, device) as stage:
                taken = _time_steps(config, stage, batch, torch.arange(num_classes), seconds)
            found.append(StageSpeed(cost.name, cost.step_flops, statistics.median(taken), len(taken)))
    return found


@contextmanager
def _memory_told(config: Config, device: torch.device) -> Iterator[None]:
    try:
        with own_code("model.factory", config.model.factory or ""):
            yield
    except torch.OutOfMemoryError:
        raise UnavailableError(
            f"the memory of {device} is not enough for a step of {config.train.batch_size} samples; lower "
            "train.batch_size or model.width, or use train.device=cpu"
        ) from None


def _time_steps(
    config: Config, stage: Stage, batch: tuple[torch.Tensor, torch.Tensor], classes: torch.Tensor, seconds: float
) -> list[float]:
    """Return the seconds of single steps, of all pieces one each, the first ones left out."""
    trainer = stage.trainer(config.train)
    stage.begin_device(classes)
    # at a learning rate of 0 a step costs the same, and nothing can diverge
    trainer.begin(stage.flat.buffer.clone(), 0.0, ways_of(config.train.fit)[0])
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < WARM_UP_STEPS + FEWEST_STEPS or time.perf_counter() - started < seconds:
        seconds_of_pieces = 0.0
        for _ in trainer.pieces():
            begun = time.perf_counter()
            trainer.step(*batch)
            if batch[0].is_cuda:
                torch.cuda.synchronize()
            seconds_of_pieces += time.perf_counter() - begun
        taken.append(seconds_of_pieces)
    return taken[WARM_UP_STEPS:]


def speed_rows(speeds: list[StageSpeed]) -> list[dict[str, Any]]:
    """Return one row a stage, as `--json` prints it."""
    return [
        {
            "stage": index,
            "blocks": speed.name,
            "step_gflop": speed.step_flops / 1e9,
            "step_s": speed.step_s,
            "steps": speed.steps,
            "speed_gflops": speed.gflops,
        }
        for index, speed in enumerate(speeds)
    ]


def machine_gflops(speeds: list[StageSpeed]) -> float:
    """Return the one speed that stands for this machine: all stages' operations by all their seconds. [ours]"""
    return sum(speed.step_flops for speed in speeds) / sum(speed.step_s for speed in speeds) / 1e9


def spread(speeds: list[StageSpeed]) -> float:
    """Return how many times as fast as the slowest stage the fastest is."""
    return max(speed.gflops for speed in speeds) / min(speed.gflops for speed in speeds)


def speed_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Return the rows as a table for a terminal."""
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="underline", title_justify="left")
    for heading in ("stage", "blocks", "GFLOP/step", "s/step", "steps", "GFLOP/s"):
        table.add_column(heading, justify="left" if heading == "blocks" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            str(row["stage"] + 1),
            row["blocks"],
            f"{row['step_gflop']:.3g}",
            f"{row['step_s']:.3g}",
            str(row["steps"]),
            f"{row['speed_gflops']:.3g}",
        )
    return table
