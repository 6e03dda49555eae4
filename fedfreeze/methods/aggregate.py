"""The order-free sum of the devices' updates: fixed-point int64, so that any order gives the same bits."""

from collections.abc import Callable
from copy import copy

import torch

# Gives memory for a named tensor of that many elements of a type, on the device where the sum is to be.
Room = Callable[[str, int, torch.dtype], torch.Tensor]

# Larger changes of a single scalar in one round count as divergence; the bound leaves the rest of 63 bits to precision.
UPDATE_LIMIT = 1024.0
_LIMIT_BITS = 10
# Running statistics have the scale of what passes through the network: the variance of raw pixels is in the thousands.
STATISTICS_LIMIT = 2.0**40


def fraction_bits(largest_weight_sum: int) -> int:
    """Return the bits after the binary point with which a sum of weights up to this cannot overflow.

    Example: 10 devices of 500 samples, 5,000 in sum, need 13 bits, UPDATE_LIMIT 10, and the sign and one to spare 2: of
    64 bits 39 are left, a resolution of 2e-12.
    """
    return 62 - _LIMIT_BITS - max(1, largest_weight_sum).bit_length()


def device_weight(weights: str, samples: int) -> int:
    """Return a device's weight in the average: its samples, or one (`method.weights`)."""
    return samples if weights == "samples" else 1


class UpdateSum:
    """Flat sum over devices of weight x update; with `counted`, also the weight that each element received.

    `exact` sums in 64-bit fixed point: the result does not depend on the order of devices or ranks, at twice the bytes
    of float32. From `statistics_from` on, elements may pass UPDATE_LIMIT: what is over goes into a second sum, `over`,
    which travels only in rounds that need it. Methods that train a part of the elements on some devices use `counted`
    and `index`.
    """

    def __init__(
        self,
        elements: int,
        bits: int,
        *,
        exact: bool = True,
        counted: bool = False,
        statistics_from: int | None = None,
    ):
        self.bits = bits
        self.exact = exact
        self.total = torch.zeros(elements, dtype=torch.int64 if exact else torch.float32)
        self.count = torch.zeros(elements, dtype=torch.int64) if counted else None
        self.statistics_from = elements if statistics_from is None else statistics_from
        self.over: torch.Tensor | None = None
        """Sum, for the statistics, of whole multiples of UPDATE_LIMIT; None: there are none."""
        self._room: Room = lambda name, count, dtype: torch.empty(count, dtype=dtype)

    def move(self, room: Room) -> None:
        """Have a sum to which nothing was added lie elsewhere, such as on a GPU."""
        self._room = room
        self.total = room("total", len(self.total), self.total.dtype).zero_()
        if self.count is not None:
            self.count = room("count", len(self.count), self.count.dtype).zero_()

    def on_host(self) -> "UpdateSum":
        """Return the same sum in host memory."""
        found = copy(self)
        found.total = self.total.cpu()
        found.count = None if self.count is None else self.count.cpu()
        found.over = None if self.over is None else self.over.cpu()
        return found

    def add(self, update: torch.Tensor, weight: int, index: torch.Tensor | None = None) -> bool:
        """Add one device's update (flat float32); `index` says where its elements belong, None: everywhere.

        Return whether it needed the second sum, `over`.
        """
        large = False
        if self.exact:
            # exact: a float32 times a power of two is a double, and rounding it is the only loss
            scaled = update.double().mul_(2.0**self.bits).round_()
            statistics = update[self.statistics_from :] if index is None else update[index >= self.statistics_from]
            large = bool((statistics.abs() > UPDATE_LIMIT).any())
            if large:
                self._add_over(scaled, weight, index)
            term = scaled.to(torch.int64).mul_(weight)
        else:
            term = update * weight
        if index is None:
            self.total += term
        else:
            self.total.index_add_(0, index, term)
        if self.count is not None:
            if index is None:
                self.count += weight
            else:
                self.count.index_add_(0, index, torch.full_like(index, weight))
        return large

    def add_if(
        self, usable: torch.Tensor, update: torch.Tensor, weight: int, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add one device's update as `add` does, if `usable`, (), bool, on the sum's device: nothing waits for it.

        Where `index` is -1, an element is the device's alone. Return whether it needed the second sum, (), bool.
        """
        update = torch.where(usable, update, 0.0)  # what is no number must not become a whole one
        share: int | torch.Tensor = weight
        if index is not None:
            update, share = self._spread(update, index), weight * self._spread(torch.ones_like(index), index)
        large = torch.zeros_like(usable)
        if self.exact:
            scaled = update.double().mul_(2.0**self.bits).round_()
            if self.statistics_from < len(self.total):
                large = self._add_over_if_large(update, scaled, share)
            term = scaled.to(torch.int64) * share
        else:
            term = update * share
        self.total += term
        if self.count is not None:
            self.count += usable * share
        return large

    def _spread(self, part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return a tensor as long as the sum that has the elements of a part where `index` says, else zero.

        What belongs nowhere has places of its own behind the end: on a GPU, sums and copies to one place would come one
        after the other, a second for a large network.
        """
        elements = len(self.total)
        behind = torch.arange(elements, elements + len(index), device=index.device)
        found = part.new_zeros(elements + len(index))
        return found.index_copy_(0, torch.where(index >= 0, index, behind), part)[:elements]

    def _add_over_if_large(self, update: torch.Tensor, scaled: torch.Tensor, share: int | torch.Tensor) -> torch.Tensor:
        """Do what `_add_over` does if a statistic is beyond UPDATE_LIMIT, and return whether one is, (), bool."""
        large = (update[self.statistics_from :].abs() > UPDATE_LIMIT).any()
        step = UPDATE_LIMIT * 2.0**self.bits
        multiples = torch.where(large, torch.trunc(scaled[self.statistics_from :] / step), 0.0)
        scaled[self.statistics_from :] -= multiples * step
        of_statistics = share[self.statistics_from :] if isinstance(share, torch.Tensor) else share
        self.make_over().add_(multiples.to(torch.int64) * of_statistics)
        return large

    def _add_over(self, scaled: torch.Tensor, weight: int, index: torch.Tensor | None) -> None:
        """Take whole multiples of UPDATE_LIMIT out of scaled statistics, in place, and add them to `over`."""
        step = UPDATE_LIMIT * 2.0**self.bits
        places = torch.arange(len(scaled)) if index is None else index
        statistics = places >= self.statistics_from
        multiples = torch.where(statistics, torch.trunc(scaled / step), 0.0)  # exact, as the steps are powers of two
        scaled.sub_(multiples * step)
        term = multiples[statistics].to(torch.int64).mul_(weight)
        self.make_over().index_add_(0, places[statistics] - self.statistics_from, term)

    def make_over(self) -> torch.Tensor:
        """Return the sum of what is over, zero where nothing was added."""
        if self.over is None:
            self.over = self._room("over", len(self.total) - self.statistics_from, torch.int64).zero_()
        return self.over

    def tensors(self, *, over: bool = False) -> list[torch.Tensor]:
        """Return what the ranks must sum: the flat sum, the counts where there are any, what is `over` if asked for."""
        found = [self.total] if self.count is None else [self.total, self.count]
        return [*found, self.make_over()] if over and self.exact else found

    def mean(self, weight_sum: int) -> torch.Tensor:
        """Return the weighted mean update, float32; zero where no device contributed."""
        total = self.total.double()
        weights = total.new_tensor(weight_sum) if self.count is None else self.count.double()
        if self.over is not None:
            total[self.statistics_from :] += self.over.double() * (UPDATE_LIMIT * 2.0**self.bits)
        if self.exact:
            total *= 2.0**-self.bits
        return torch.where(weights > 0, total / weights.clamp(min=1), 0.0).float()


def first_unusable(update: torch.Tensor, statistics_from: int) -> int | None:
    """Return the position of the first element that is no number or beyond its bound; None: all can be summed.

    The bound is UPDATE_LIMIT, and STATISTICS_LIMIT from `statistics_from` on.
    """
    within = update.abs() <= UPDATE_LIMIT
    within[statistics_from:] = update[statistics_from:].abs() <= STATISTICS_LIMIT
    return None if bool(within.all()) else int((~within).nonzero()[0])
