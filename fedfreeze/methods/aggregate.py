"""The order-free sum of the devices' updates: fixed-point int64, so that any order gives the same bits."""

import torch

# Larger changes of a single scalar in one round count as divergence; the bound leaves the rest of 63 bits to precision.
UPDATE_LIMIT = 1024.0
_LIMIT_BITS = 10


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
    of float32. Methods that train a part of the elements on some devices use `counted` and `index`.
    """

    def __init__(self, elements: int, bits: int, *, exact: bool = True, counted: bool = False):
        self.bits = bits
        self.exact = exact
        self.total = torch.zeros(elements, dtype=torch.int64 if exact else torch.float32)
        self.count = torch.zeros(elements, dtype=torch.int64) if counted else None

    def add(self, update: torch.Tensor, weight: int, index: torch.Tensor | None = None) -> None:
        """Add one device's update (flat float32); `index` says where its elements belong, None: everywhere."""
        if self.exact:
            # exact: a float32 times a power of two is a double, and rounding it is the only loss
            term = update.double().mul_(2.0**self.bits).round_().to(torch.int64).mul_(weight)
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

    def tensors(self) -> list[torch.Tensor]:
        """Return what the ranks must sum: the flat sum, and the counts where there are any."""
        return [self.total] if self.count is None else [self.total, self.count]

    def mean(self, weight_sum: int) -> torch.Tensor:
        """Return the weighted mean update, float32; zero where no device contributed."""
        weights = self.count.double() if self.count is not None else torch.tensor(weight_sum, dtype=torch.float64)
        total = self.total.double()
        if self.exact:
            total *= 2.0**-self.bits
        return torch.where(weights > 0, total / weights.clamp(min=1), 0.0).float()


def usable(update: torch.Tensor) -> bool:
    """Tell whether every element is a number within the bound of the fixed-point sum."""
    return bool((update.abs() <= UPDATE_LIMIT).all())
