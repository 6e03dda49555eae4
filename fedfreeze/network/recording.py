"""Writes down what a network calls while its forward runs."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from fedfreeze.network.program import Called, Held, ImagesDevice, Step, Value, leaves, mapped
from fedfreeze.network.state import tensors_by_name

# What takes a value out of a tensor: what follows may depend on it unseen.
_TAKES_VALUES = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
}
# What changes torch's settings, which a step notes for itself, and what marks a place for a profiler.
_SETTINGS = ("_set_grad_enabled", "set_grad_enabled")
_MARKS = "torch._ops.profiler"


class UnfollowedError(Exception):
    """A forward, or what a step of it does, that cannot be written down; the message says where."""


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module does nothing but run its children in order."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


class Recording:
    """What a forward calls, while it runs: that of the network, or of a module that it calls.

    Values have numbers of their own in each, so that one does not depend on what happens inside of another.
    """

    def __init__(self, recorder: "Recorder", owner: nn.Module, args: Any, kwargs: Any, *, is_followed: bool):
        """`args`, `kwargs`: what the owner was called with."""
        self.recorder = recorder
        self.owner = owner
        self.args, self.kwargs = args, kwargs
        self.is_followed = is_followed
        self.steps: list[Step] = []
        self.inside: list[Recording | None] = []
        """For each step what the module called in turn, where that was followed."""
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []
        """Every tensor that has a number; what is let go of could give its id to another."""
        self.from_images: set[int] = {0}
        self.outgoing = 0
        if is_followed:
            self.number(args[0])
            inner = [module for module in owner.modules() if module is owner or is_plain_sequential(module)]
            self.buffers = [(module, dict(module._buffers)) for module in inner]

    @property
    def floats(self) -> frozenset[int]:
        """The values of type float32."""
        return frozenset(number for number, tensor in enumerate(self.alive) if tensor.dtype == torch.float32)

    def number(self, tensor: Any) -> int | None:
        """Return the number of a value; None for what is none: no tensor, or one of the network's own, written into."""
        if not isinstance(tensor, torch.Tensor) or id(tensor) in self.recorder.held:
            return None
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.alive)
            self.alive.append(tensor)
        return number

    def told(self, leaf: Any) -> Any:
        """Return what stands for an argument in a step. Raises UnfollowedError."""
        names, held = self.recorder.names, self.recorder.held
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in self.numbers:
                return Value(self.numbers[id(leaf)])
            if id(leaf) in held:
                return Held(held[id(leaf)])
            if any(id(leaf) in outer.numbers for outer in self.recorder.open):
                raise UnfollowedError("it uses a tensor that it was not called with")
            return leaf
        if isinstance(leaf, nn.Module) and id(leaf) in names:
            return Called(names[id(leaf)])
        return ImagesDevice() if isinstance(leaf, torch.device) else leaf

    def depends(self, args: Any, kwargs: Any) -> bool:
        """Whether an argument comes from the images, from what trains, or from a draw."""
        tensors = [leaf for leaf in [*leaves(args), *leaves(dict(kwargs))] if isinstance(leaf, torch.Tensor)]
        held, numbers = self.recorder.held, self.numbers
        return any(id(t) in held or numbers.get(id(t), -1) in self.from_images for t in tensors)

    def end(self, out: Any) -> None:
        """Note what came out. Raises UnfollowedError."""
        if not isinstance(out, torch.Tensor):
            raise UnfollowedError(f"it returns a {type(out).__name__}, not one tensor, the logits")
        if id(out) not in self.numbers:
            raise UnfollowedError("what it returns is not made by its steps from the images")
        self._check_assignments()
        self.outgoing = self.numbers[id(out)]

    def _check_assignments(self) -> None:
        """Refuse a buffer that the forward itself replaces, rather than writes into: no step tells of that."""
        for module, before in self.buffers:
            for buffer, tensor in before.items():
                if module._buffers.get(buffer) is not tensor:
                    full = f"{self.recorder.names[id(module)]}.{buffer}".lstrip(".")
                    raise UnfollowedError(f"it assigns its buffer {full} anew; write self.{full}.copy_(...)")


class Recorder(TorchFunctionMode):
    """Sees every call of a torch function in a forward, and of every module that it calls."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.names = {id(module): name for name, module in network.named_modules()}
        self.held = {id(tensor): name for name, tensor in tensors_by_name(network).items()}
        self.may_enter = {id(module) for module in network.modules() if may_enter(module)}
        self.open: list[Recording] = []
        """The network's forward, and the calls of modules in progress, one inside the other."""

    def record(self, images: torch.Tensor) -> Recording:
        """Run the forward and return what it called. Raises UnfollowedError, and whatever the forward raises."""
        whole = Recording(self, self.network, (images,), {}, is_followed=True)
        self.open.append(whole)
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
        whole.end(out)
        return whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        current = self.open[-1]
        if not current.is_followed or name in _SETTINGS or getattr(func, "__module__", "") == _MARKS:
            return func(*args, **kwargs)
        if name in _TAKES_VALUES and current.depends(args, kwargs):
            self._refuse(f"it branches on values, or takes them out of a tensor, at {_place()}")
            return func(*args, **kwargs)
        return self._step(None, func, args, kwargs, lambda: func(*args, **kwargs))

    def _refuse(self, reason: str) -> None:
        """Raise UnfollowedError; inside of a module that is called, take the call as a whole instead."""
        if len(self.open) == 1:
            raise UnfollowedError(reason)
        self.open[-1].is_followed = False

    def _step(
        self,
        module: str | None,
        function: Any,
        args: Any,
        kwargs: Any,
        run: Callable[[], Any],
        inside: Recording | None = None,
    ) -> Any:
        current = self.open[-1]
        where, gradients = _place(), torch.is_grad_enabled()
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self._refuse(f"it uses torch.autocast at {where}; networks train in float32 here")
            return run()
        try:
            told = mapped(args, current.told), mapped(dict(kwargs), current.told)
        except UnfollowedError as error:
            self._refuse(str(error))
            return run()
        depends = module is not None or current.depends(args, kwargs)
        drawn = None if depends else torch.get_rng_state()
        out = run()
        found = list(leaves(out))
        tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        if not tensors and out is not None and module is None:
            return out  # a shape, a type: what is made of it is seen where it is used
        depends = drawn is None or not torch.equal(drawn, torch.get_rng_state())
        outputs = tuple(current.number(leaf) for leaf in found)
        if depends:
            current.from_images.update(number for number in outputs if number is not None)
        current.steps.append(Step(module, None if module is not None else function, *told, outputs, where, gradients))
        current.inside.append(inside)
        current.shapes.append(tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else () for leaf in found))
        return out

    def custom_gradient(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Note the call of a torch.autograd.Function as one step; its gradient is its own."""

        def run() -> Any:
            self.open.append(Recording(self, self.network, args, kwargs, is_followed=False))
            try:
                return function(*args, **kwargs)
            finally:
                self.open.pop()

        return self._step(None, function, args, kwargs, run)

    def _begin_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        takes_one = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        is_followed = takes_one and self.open[-1].is_followed and id(module) in self.may_enter
        self.open.append(Recording(self, module, args, kwargs, is_followed=is_followed))

    def _end_module(self, module: nn.Module, _: Any, __: Any, out: Any) -> None:
        ended = self.open.pop()
        if ended.is_followed:
            try:
                ended.end(out)
            except UnfollowedError:
                ended.is_followed = False
        if self.open[-1].is_followed:
            inside = ended if ended.is_followed else None
            self._step(self.names[id(module)], None, ended.args, ended.kwargs, lambda: out, inside)


def may_enter(module: nn.Module) -> bool:
    """Whether it is worth a look what a module calls in turn: one of the user's own, with several that have weights.

    A layer of torch is a call, but for what only holds others; so are the layers of the networks that come with us.
    """
    if is_plain_sequential(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    is_wrapper = isinstance(module, nn.DataParallel | nn.TransformerEncoder)
    if type(module).__module__.startswith(("torch.", f"{__package__}.")) and not is_wrapper:
        return False
    direct = [inner.parameters(recurse=False) for inner in module.modules()]
    return sum(any(parameter.dim() > 1 for parameter in own) for own in direct) > 1


_active = threading.local()
_patching = threading.RLock()
_apply = torch.autograd.Function.__dict__["apply"].__func__


@contextmanager
def _custom_gradients_seen(recorder: Recorder) -> Iterator[None]:
    """Have calls of the user's own torch.autograd.Function told to a recorder: torch has no other way to see them."""

    def seen(cls: Any, *args: Any, **kwargs: Any) -> Any:
        current: Recorder | None = getattr(_active, "recorder", None)
        if current is None or not current.open[-1].is_followed:
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


_OURS = (str(Path(torch.__file__).parent), __file__, str(Path(__file__).with_name("following.py")))


def _place() -> str:
    """Return file and line of the user's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
