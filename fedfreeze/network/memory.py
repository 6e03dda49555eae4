"""How the weights of convolutions lie in memory: one channel after the other, or channels last, which CPUs run faster.

With weights that lie channels last, torch computes convolutions, and all that follows them, in that order; images need
not be converted. Results differ by rounding alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from fedfreeze.network.state import untouched
from fedfreeze.seeds import global_seed

# Below this many convolutions over neighbouring pixels it gains nothing.
_CONVOLUTIONS = 2

# Of fewer channels than oneDNN takes at a time (8 by AVX2, 16 by AVX-512), a 1x1 convolution with a stride writes past
# its workspace in the backward pass when they lie last: wrong gradients, or the end of the process (oneDNN issue 6035).
_NARROW_CHANNELS = 16


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor (out, in, height, width) lies channels last, and not both ways at once."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def lay_channels_last(module: nn.Module) -> None:
    """Let the weights of convolutions lie channels last; what the values are does not change."""
    _lay(module, torch.channels_last)


def lay_contiguous(module: nn.Module) -> None:
    """Let the weights of convolutions lie one channel after the other; what the values are does not change."""
    _lay(module, torch.contiguous_format)


def _lay(module: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 4 and not isinstance(parameter, FakeTensor):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def gains(network: nn.Module) -> bool:
    """Tell whether a network has convolutions enough for it to matter."""
    convolutions = [
        module for module in network.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ]
    return len(convolutions) >= _CONVOLUTIONS


def spoils(network: nn.Module) -> bool:
    """Tell whether a network has a convolution that torch spoils memory with when its channels lie last."""
    return any(
        _is_spoilt(module.weight, module.stride) for module in network.modules() if isinstance(module, nn.Conv2d)
    )


def _is_spoilt(weight: torch.Tensor, stride: Any) -> bool:
    strides = stride if isinstance(stride, Sequence) else [stride]
    return tuple(weight.shape[2:]) == (1, 1) and max(strides) > 1 and weight.shape[1] < _NARROW_CHANNELS


class _WithoutFaults(TorchFunctionMode):
    """Fails where something is called that torch does wrong when channels lie last, as a module or as a function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if "group_norm" in name:
            raise RuntimeError("group normalisation")
        if name in ("conv2d", "convolution"):
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            stride = kwargs.get("stride", args[3] if len(args) > 3 else 1)
            if weight is not None and weight.dim() == 4 and _is_spoilt(weight, stride):
                raise RuntimeError("a 1x1 convolution with a stride")
        return func(*args, **kwargs)


def takes_channels_last(
    network: nn.Module, image_shape: tuple[int, int, int], parts: Sequence[tuple[nn.Module, tuple[int, ...]]] = ()
) -> bool:
    """Tell whether a network runs with weights that lie so: a forward that calls `view` may not. It is tried.

    Not with group normalisation: where what comes in needs no gradient, as behind a frozen block, torch's backward pass
    of it ends the process when that lies channels last (seen with 2.13). Nor with what `spoils` memory.
    `parts`: modules and what each takes of one image; a surrogate before them may put out channels last in any case.
    """
    with untouched(network), torch.enable_grad(), global_seed(0, "memory format"), _WithoutFaults():
        try:
            _lay(network, torch.channels_last)
            for mode in (True, False):
                network.train(mode)
                network(torch.full((2, *image_shape), 0.5)).sum().backward()
                for part, shape in parts:
                    part.train(mode)
                    if len(shape) == 3:
                        images = torch.full((2, *shape), 0.5)
                        out = part(images.contiguous(memory_format=torch.channels_last))
                        if out.requires_grad:
                            out.sum().backward()
        except Exception:  # whatever the user's code makes of it
            return False
        finally:
            _lay(network, torch.contiguous_format)
            network.zero_grad(set_to_none=True)
    return True
