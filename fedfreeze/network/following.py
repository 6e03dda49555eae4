"""Follows a network's forward: runs it on a few images and writes down what it calls."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from fedfreeze.network.program import Called, Held, ImagesDevice, OfBatch, Step, Value, leaves, mapped
from fedfreeze.network.state import tensors_by_name, untouched
from fedfreeze.seeds import global_seed

# Two sizes, so that a number that follows the size of the batch is told from one that is fixed; not 1, which training
# with batch normalisation cannot take.
BATCH_SIZES = (2, 4)

# What takes a value out of a tensor: what follows may depend on it unseen.
_TAKES_VALUES = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
}
# What changes torch's settings, which a step notes for itself.
_SETTINGS = ("_set_grad_enabled", "set_grad_enabled")


class UnfollowedError(Exception):
    """A forward, or what a step of it does, that cannot be written down; the message says where."""


@dataclass(frozen=True)
class Followed:
    """A forward pass in one mode: value 0 are the images, `outgoing` are the logits."""

    steps: tuple[Step, ...]
    outgoing: int
    shapes: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    """For each step and each leaf of what it returned the shape at each of BATCH_SIZES; () for what is no tensor."""
    floats: frozenset[int]
    """The values of type float32."""


def follow(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[bool, Followed]:
    """Return what the forward of a network calls in training (True) and in evaluation (False).

    Plain Sequentials are gone into; any other module is one call. The network is left as it was. Raises
    UnfollowedError, and whatever the forward raises.
    """
    followed = {}
    for mode in (True, False):
        recordings = []
        for size in BATCH_SIZES:
            # no pass may see what another left in the buffers
            with untouched(network), global_seed(0, "following"), torch.enable_grad():
                network.train(mode)
                recordings.append(_Recorder(network).record(torch.rand(size, *image_shape)))
        followed[mode] = _joined(*recordings)
    return followed


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module does nothing but run its children in order."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


@dataclass(frozen=True)
class _Recording:
    steps: list[Step]
    shapes: list[tuple[tuple[int, ...], ...]]
    outgoing: int
    floats: frozenset[int]


class _Recorder(TorchFunctionMode):
    """Sees every call of a torch function in the forward itself, and of every module that it calls."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.names = {id(module): name for name, module in network.named_modules()}
        self.held = {id(tensor): name for name, tensor in tensors_by_name(network).items()}
        self.buffers = [(module, dict(module._buffers)) for module in network.modules()]
        self.steps: list[Step] = []
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []
        """Every tensor that has a number; what is let go of could give its id to another."""
        self.from_images: set[int] = set()
        self.open_calls: list[tuple[nn.Module | None, Any, Any]] = []
        """The calls of modules in progress; what happens inside of one is its own."""

    def record(self, images: torch.Tensor) -> _Recording:
        self._number(images)
        self.from_images.add(0)
        hooks = []
        for module in self.network.modules():
            if module is not self.network and not is_plain_sequential(module):
                hooks.append(module.register_forward_pre_hook(self._begin_module, prepend=True, with_kwargs=True))
                hooks.append(module.register_forward_hook(self._end_module, with_kwargs=True))
        try:
            with _custom_gradients_seen(self), self:
                out = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(out, torch.Tensor):
            raise UnfollowedError(f"it returns a {type(out).__name__}, not one tensor, the logits")
        if id(out) not in self.numbers:
            raise UnfollowedError("what it returns is not made by its steps from the images")
        self._check_assignments()
        floats = {number for number, tensor in enumerate(self.alive) if tensor.dtype == torch.float32}
        return _Recording(self.steps, self.shapes, self.numbers[id(out)], frozenset(floats))

    def _check_assignments(self) -> None:
        """Refuse a buffer that the forward itself replaces, rather than writes into: no step tells of that."""
        for module, before in self.buffers:
            name = self.names[id(module)]
            if module is self.network or is_plain_sequential(module):
                for buffer, tensor in before.items():
                    if module._buffers.get(buffer) is not tensor:
                        full = f"{name}.{buffer}".lstrip(".")
                        raise UnfollowedError(f"it assigns its buffer {full} anew; write self.{full}.copy_(...)")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.open_calls or name in _SETTINGS:
            return func(*args, **kwargs)
        if name in _TAKES_VALUES and self._depends(args, kwargs):
            raise UnfollowedError(f"it branches on values, or takes them out of a tensor, at {_place()}")
        return self._step(None, func, args, kwargs, lambda: func(*args, **kwargs))

    def _step(self, module: str | None, function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        where, gradients = _place(), torch.is_grad_enabled()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise UnfollowedError(f"it uses torch.autocast at {where}; networks train in float32 here")
        told = mapped(args, self._told), mapped(dict(kwargs), self._told)
        drawn = torch.get_rng_state()
        depends = module is not None or self._depends(args, kwargs)
        out = run()
        found = list(leaves(out))
        tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        if not tensors and out is not None and module is None:
            return out  # a shape, a type: what is made of it is seen where it is used
        depends = depends or not torch.equal(drawn, torch.get_rng_state())
        outputs = tuple(self._number(leaf) for leaf in found)
        if depends:
            self.from_images.update(number for number in outputs if number is not None)
        self.steps.append(Step(module, None if module is not None else function, *told, outputs, where, gradients))
        self.shapes.append(tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else () for leaf in found))
        return out

    def custom_gradient(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Note the call of a torch.autograd.Function as one step; its gradient is its own."""

        self.open_calls.append((None, args, kwargs))
        try:
            return self._step(None, function, args, kwargs, lambda: function(*args, **kwargs))
        finally:
            self.open_calls.pop()

    def _begin_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.open_calls.append((module, args, kwargs))

    def _end_module(self, module: nn.Module, _: Any, __: Any, out: Any) -> None:
        _, args, kwargs = self.open_calls[-1]
        if len(self.open_calls) == 1:
            self._step(self.names[id(module)], None, args, kwargs, lambda: out)
        self.open_calls.pop()

    def _number(self, tensor: Any) -> int | None:
        """Return the number of a value; None for what is none: no tensor, or one of the network's own, written into."""
        if not isinstance(tensor, torch.Tensor) or id(tensor) in self.held:
            return None
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.alive)
            self.alive.append(tensor)
        return number

    def _told(self, leaf: Any) -> Any:
        """Return what stands for an argument in a step."""
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in self.numbers:
                return Value(self.numbers[id(leaf)])
            return Held(self.held[id(leaf)]) if id(leaf) in self.held else leaf
        if isinstance(leaf, nn.Module) and id(leaf) in self.names:
            return Called(self.names[id(leaf)])
        return ImagesDevice() if isinstance(leaf, torch.device) else leaf

    def _depends(self, args: Any, kwargs: Any) -> bool:
        """Whether an argument comes from the images, from what trains, or from a draw."""
        tensors = [leaf for leaf in [*leaves(args), *leaves(dict(kwargs))] if isinstance(leaf, torch.Tensor)]
        return any(id(t) in self.held or self.numbers.get(id(t), -1) in self.from_images for t in tensors)


_active = threading.local()
_patching = threading.RLock()
_apply = torch.autograd.Function.__dict__["apply"].__func__


@contextmanager
def _custom_gradients_seen(recorder: _Recorder) -> Iterator[None]:
    """Have calls of the user's own torch.autograd.Function told to a recorder: torch has no other way to see them."""

    def seen(cls: Any, *args: Any, **kwargs: Any) -> Any:
        current: _Recorder | None = getattr(_active, "recorder", None)
        if current is None or current.open_calls:
            return _apply(cls, *args, **kwargs)
        if cls is CheckpointFunction:  # activations are stored here: what saves memory is the cut
            run, _, *inputs = args
            return run(*inputs)
        return current.custom_gradient(MethodType(_apply, cls), args, kwargs)

    with _patching:
        _active.recorder = recorder
        torch.autograd.Function.apply = classmethod(seen)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment]
            _active.recorder = None


_OURS = (str(Path(torch.__file__).parent), __file__)


def _place() -> str:
    """Return file and line of the user's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _joined(small: _Recording, large: _Recording) -> Followed:
    """Join the recordings of two sizes of the batch: what differs between them follows the size. Raises."""
    for one, other in zip(small.steps, large.steps, strict=False):
        if (one.module, one.function, one.outputs) != (other.module, other.function, other.outputs):
            raise UnfollowedError(f"what it calls depends on the size of the batch, at {one.where}")
    if len(small.steps) != len(large.steps) or small.outgoing != large.outgoing:
        raise UnfollowedError("how many calls it makes depends on the size of the batch")
    steps = []
    for one, other in zip(small.steps, large.steps, strict=True):
        args = _same(one.args, other.args, one)
        kwargs: Mapping[str, Any] = _same(dict(one.kwargs), dict(other.kwargs), one)
        steps.append(replace(one, args=args, kwargs=kwargs))
    shapes = [tuple(zip(a, b, strict=True)) for a, b in zip(small.shapes, large.shapes, strict=True)]
    return Followed(tuple(steps), small.outgoing, tuple(shapes), small.floats)


def _same(one: Any, other: Any, step: Step) -> Any:
    """Return an argument of a step in terms that hold for any size of the batch. Raises UnfollowedError."""
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        items = [_same(a, b, step) for a, b in zip(one, other, strict=True)]
        return items if isinstance(one, list) else type(one)(*items) if hasattr(one, "_fields") else tuple(items)
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return {key: _same(one[key], other[key], step) for key in one}
    if isinstance(one, slice) and isinstance(other, slice):
        return slice(*(_same(getattr(one, p), getattr(other, p), step) for p in ("start", "stop", "step")))
    if one is other or isinstance(one, ImagesDevice):
        return one
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other):
            return one
    elif type(one) is type(other) and isinstance(one, int | float) and not isinstance(one, bool) and one != other:
        return _of_batch(one, other)
    else:
        try:
            if bool(one == other):
                return one
        except Exception:  # what has no comparison is not the same
            pass
    raise UnfollowedError(f"an argument of {step.label} at {step.where} is made outside of torch, or anew in each pass")


def _of_batch(one: float, other: float) -> OfBatch:
    """Return the straight line in the size of the batch, or in one over it, through two numbers."""
    small, large = BATCH_SIZES
    slope = (other - one) / (large - small)
    if isinstance(one, int):
        return OfBatch(slope, one - small * slope)
    if abs(one * small - other * large) < 1e-9 * abs(one * small):
        return OfBatch(one * small, 0.0, inverse=True)
    return OfBatch(slope, one - small * slope, whole=False)
