"""Floating-point operations, counted by torch's formulas under the operations."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch counts attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


class FlopCounter(TorchDispatchMode):
    """Counts what runs inside, 2 a multiply-add, as torch.utils.flop_counter.FlopCounterMode does.

    That one tells modules apart, which is not needed here, and has torch import its compiler, which takes seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see TensorByteCounter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and _is_composite(func):
            with self:  # what it is made of has formulas
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None and not _has_no_values(args):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _has_no_values(args: Any) -> bool:
    """Whether an operation asks for shapes alone (on the device meta), which is no work."""
    return any(isinstance(each, torch.Tensor) and each.device.type == "meta" for each in args)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is others in turn, as a linear layer is in inference mode."""
    if func.namespace != "aten":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of what runs."""
    with FlopCounter() as counter:
        run()
    return counter.flops
