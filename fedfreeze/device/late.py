"""A device's outcome on a GPU, judged and summed there, and read when the work of the next devices is queued."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedfreeze.messages import DeviceReport
from fedfreeze.methods.aggregate import STATISTICS_LIMIT, UPDATE_LIMIT, UpdateSum

_PAUSE_S = 2e-4


class Outcome(NamedTuple):
    """What is known of a device when its work is done; the columns of a row."""

    loss_sum: float
    squared_loss_sum: float
    usable: float
    """Whether its update was added: losses and changes are numbers within their bounds."""
    large: float
    """Whether statistics needed the second sum."""
    position: float
    """Of the first element of its update that cannot be summed, where there is one."""
    value: float
    """Of that element."""


@dataclass(frozen=True)
class LateReport:
    """A report that is made when the GPU has come so far."""

    row: torch.Tensor
    """The outcome, (6,), float64, on the host, once `ready`."""
    ready: Callable[[], bool]
    make: Callable[[Outcome], DeviceReport]

    def report(self, check: Callable[[], None]) -> DeviceReport:
        """Wait for the GPU and return the report; `check` is called meanwhile and raises what must end the round."""
        while not self.ready():
            check()
            time.sleep(_PAUSE_S)
        return self.make(Outcome(*self.row.tolist()))


def sum_late(
    update: UpdateSum,
    change: torch.Tensor,
    losses: torch.Tensor,
    weight: int,
    index: torch.Tensor | None,
    statistics_from: int,
) -> torch.Tensor:
    """Add a device's change of values to the sum if it can be summed, and return its outcome, (6,), float64.

    All of it stays where the tensors are. `losses`: sums of its losses and of their squares, (2,). `index`: where its
    elements belong; -1: nowhere. `statistics_from`: where the elements begin that may change by more.
    """
    if index is not None:
        change = change.masked_fill(index < 0, 0.0)
    within = change.abs() <= UPDATE_LIMIT
    within[statistics_from:] = change[statistics_from:].abs() <= STATISTICS_LIMIT
    usable = within.all() & losses[0].isfinite()
    position = within.logical_not().int().argmax()
    large = update.add_if(usable, change, weight, index)
    value = change.index_select(0, position.view(1))[0]
    return torch.stack([losses[0], losses[1], *(each.double() for each in (usable, large, position, value))])


def told_later(row: torch.Tensor, make: Callable[[Outcome], DeviceReport]) -> LateReport:
    """Begin to bring an outcome to the host, behind what is queued on the GPU."""
    if not row.is_cuda:
        return LateReport(row, lambda: True, make)
    host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
    host.copy_(row, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return LateReport(host, there.query, make)
