"""Steps that run with gradients between values that have none, whose gradients are handed over and let go of."""

import sys
from collections.abc import Callable
from typing import Any

import torch

# References to a gradient that its only owner holds, while `_is_alone` looks: by its name there, as an argument, and
# by the look itself.
_REFERENCES = 3


class Opened:
    """Values that go into some steps, results of the steps, and the gradients that come back to the values.

    `gradients` has those of values so far; what comes back is added to it, in the order in which torch would.
    """

    def __init__(self, gradients: dict[int, torch.Tensor]):
        self.gradients = gradients
        self._results: list[torch.Tensor] = []

    def enter(self, value: int, x: torch.Tensor) -> torch.Tensor:
        """Return a value, by its number and without a gradient, to calculate with in one step."""
        trains = torch.empty(0, device=x.device, requires_grad=True)
        with torch.enable_grad():
            found: torch.Tensor = _Enter.apply(x, trains, lambda gradient: self._tell(value, gradient))
        return found

    def _tell(self, value: int, gradient: torch.Tensor) -> None:
        before = self.gradients.pop(value, None)
        self.gradients[value] = gradient if before is None else before + gradient

    def leave(self, result: torch.Tensor, gradient: list[torch.Tensor]) -> None:
        """Note a result and, alone in a list that will be emptied, its gradient; nothing here holds the result."""
        if result.requires_grad:
            with torch.enable_grad():
                self._results.append(_Leave.apply(result, gradient))

    def backward(self) -> None:
        """Have the gradients of all values told, and those of parameters added."""
        results, self._results = self._results, []
        if results:
            torch.autograd.backward(results)


class _Enter(torch.autograd.Function):
    """Hands on a value; tells its gradient. Without `trains`, which needs one, torch would see no need for any."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, trains: torch.Tensor, tell: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.tell = tell
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.tell(gradients[0])
        return None, None, None


class _Leave(torch.autograd.Function):
    """Stands for a result that is let go of, where the backward pass begins with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, gradient: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradient = gradient
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.gradient.pop(), None


def through_relu(gradient: list[torch.Tensor], taken: torch.Tensor) -> torch.Tensor:
    """Return the gradient before a ReLU that took `taken`, in the memory of that behind it where nobody else holds it.

    `gradient`: that behind it, alone in a list, which is emptied.
    """
    behind, taken = gradient.pop(), taken.detach()
    # where they lie otherwise a new one would, too, and kernels behind it may sum up in another order
    if behind.stride() == taken.stride() and _is_alone(behind):
        torch.ops.aten.threshold_backward.grad_input(behind, taken, 0, grad_input=behind)
        return behind
    found: torch.Tensor = torch.ops.aten.threshold_backward(behind, taken, 0)
    return found


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether nobody but the caller, by one name, holds a tensor or another one in the same memory.

    By torch's own counts of who holds it; where a version of torch has none, nothing is alone.
    """
    if not _COUNTS or torch._debug_has_internal_overlap(tensor) != 0:
        return False
    if sys.getrefcount(tensor) > _REFERENCES or tensor._use_count() > 1:  # type: ignore[attr-defined]
        return False
    # the tensor, and the object that is asked
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2


_COUNTS = hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
