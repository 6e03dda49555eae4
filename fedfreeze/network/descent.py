"""SGD with momentum on a flat part, which holds gradients no longer than it must."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.sgd import sgd

from fedfreeze.config.schema import TrainConfig
from fedfreeze.network.flat import FlatPart

# Gradients of this many elements or more, 1 MiB, are applied as soon as they are there: with fewer the time that it
# takes counts for more than the memory.
LARGE_ELEMENTS = 2**18


class Descent:
    """SGD by torch's functional form: with the first torch.optim.Optimizer torch imports its compiler, for seconds.

    A step of several passes adds their gradients to the momentum, where there is one, so that none is held from pass to
    pass: the same as the momentum of their sum, up to rounding.
    """

    def __init__(self, parts: Sequence[nn.Module], flat: FlatPart, config: TrainConfig):
        self.config = config
        self.learning_rate = config.learning_rate
        self.momentum = torch.zeros(flat.parameters if config.momentum else 0, device=flat.buffer.device)
        self._parameters = list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())
        self._momentum_of = flat.views(self.momentum) if config.momentum else {}
        self._large = [p for p in used_once(parts) if p.requires_grad and p.numel() >= LARGE_ELEMENTS]
        self._begun: dict[nn.Parameter, None] = {}
        """Of a step of several passes the parameters whose momentum has taken a gradient."""

    def begin(self, learning_rate: float) -> None:
        """Forget the momentum, and let go of all gradients."""
        self.momentum.zero_()
        self.drop_gradients()
        self.learning_rate = learning_rate

    @contextmanager
    def one_pass(self, *, last: bool, first: bool) -> Iterator[None]:
        """Run a backward pass inside, the only one of a step or one of several; after the last the step is taken."""
        several = not (first and last)
        take = None if several and not self._momentum_of else self._add if several else self._apply
        hooks = []
        if take is not None:
            hooks = [parameter.register_post_accumulate_grad_hook(_taking(take)) for parameter in self._large]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if take is not None:
            take([parameter for parameter in self._parameters if parameter.grad is not None])
        elif last:
            self._apply([parameter for parameter in self._parameters if parameter.grad is not None])
        if last and self._begun:
            self._descend()

    @torch.no_grad()
    def _apply(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the step of some parameters and let go of their gradients."""
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sgd(
            list(parameters),
            gradients,
            [self._momentum_of[parameter] for parameter in parameters] if self._momentum_of else [],
            fused=True,  # one pass and no temporaries: on a device, memory is what we are short of
            weight_decay=self.config.weight_decay,
            momentum=self.config.momentum,
            lr=self.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        del gradients
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _add(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of some parameters to their momentum, and let go of them."""
        for parameter in parameters:
            momentum = self._momentum_of[parameter]
            if parameter not in self._begun:
                self._begun[parameter] = None
                momentum.mul_(self.config.momentum).add_(parameter, alpha=self.config.weight_decay)
            assert parameter.grad is not None
            momentum.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def _descend(self) -> None:
        for parameter in self._begun:
            parameter.add_(self._momentum_of[parameter], alpha=-self.learning_rate)
        self._begun.clear()

    def drop_gradients(self) -> None:
        """Let go of the memory of all gradients, and of a step that was broken off."""
        self._begun.clear()
        for parameter in self._parameters:
            parameter.grad = None


def _taking(take: Callable[[Sequence[nn.Parameter]], None]) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        take([parameter])

    return hook


def used_once(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of torch's own layers that no other module holds: with their gradient their use is over.

    A module of a user's own may read a parameter again where torch does not see it.
    """
    held: dict[int, int] = {}
    found: list[nn.Parameter] = []
    for part in parts:
        for _, module in part.named_modules(remove_duplicate=False):
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                held[id(parameter)] = held.get(id(parameter), 0) + 1
                if type(module).__module__.startswith("torch.nn.modules."):
                    found.append(parameter)
    return [parameter for parameter in found if held[id(parameter)] == 1]
