"""Activations that are computed anew in the backward pass instead of stored (Chen et al., 2016): the same bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fedfreeze.network.chain import leaves_in_order
from fedfreeze.network.opened import Opened, through_relu
from fedfreeze.network.program import OfImages, Step
from fedfreeze.network.state import KeptTensors
from fedfreeze.network.stretches import Plan, Stretch, plan_of

_BatchNorm = nn.modules.batchnorm._BatchNorm


# A segment joins the one behind it if that has this many times its weights: it costs little to run once more, and what
# it puts out need not be stored.
_SMALL_BESIDE = 8


class Segment:
    """Modules that run one after the other: what goes into the first is stored, and no other activation."""

    def __init__(self, modules: Iterable[nn.Module], within: bool):
        self.modules = nn.ModuleList(modules)
        self.trains = any(parameter.requires_grad for parameter in self.modules.parameters())
        # what moves statistics of another kind may read them: it runs once more, and so all together
        self.within = within and not _kept_buffers(self.modules).values
        self._plans: dict[torch.Size, Plan] = {}

    def plan(self, x: torch.Tensor) -> Plan:
        """Return its steps, given what goes in: calls inside of a module may go by the size of the batch."""
        plan = self._plans.get(x.shape)
        if plan is None:
            plan = self._plans[x.shape] = plan_of(list(self.modules), x.shape, self.within)
        return plan

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map what goes in, which stays as it is, to what comes out."""
        if any(0 in stretch.writes for stretch in self.plan(x).stretches):
            x = x.clone()
        for module in self.modules:
            x = module(x)
        return x


def segments_of(parts: Iterable[nn.Module], *, within: bool) -> list[Segment]:
    """Return a chain of modules as segments.

    A segment begins at each module with weights (a residual block, an encoder layer, a convolution with the
    normalisation and activation behind it), the finest cut that a chain allows. With `within`, a segment that runs
    again stores what goes into each of its layers alone, and these run once more; and what is small beside the segment
    behind it is one with that. [ours; the paper's rule is one segment for each sqrt(n) of n layers]
    """
    groups: list[list[nn.Module]] = []
    for leaf in leaves_in_order(parts):
        if not groups or any(parameter.dim() > 1 for parameter in leaf.parameters()):
            groups.append([])
        groups[-1].append(leaf)
    joined: list[list[nn.Module]] = []
    for group in groups:
        if within and joined and _weights(joined[-1]) * _SMALL_BESIDE < _weights(group):
            joined[-1] += group
        else:
            joined.append(group)
    return [Segment(group, within) for group in joined]


def _weights(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def stored_from(segments: Sequence[Segment]) -> int:
    """Return from which segment on a chain that ends in logits is stored: the backward pass begins there at once.

    So it would hold the activations of the last segment with more than a classifier anyway, and what is within that.
    """
    if segments[-1].within:
        return max(1, len(segments) - 1)
    return max(0, len(segments) - 2)


def recomputed(
    segments: Sequence[Segment],
    x: torch.Tensor,
    *,
    stored_from: int | None = None,
    again: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Map what goes into a chain to what comes out; only the input of each segment is stored for the backward pass.

    From segment `stored_from` on all is stored; none: nowhere. `again`: what makes `x` anew, which is not stored then.
    """
    # without a tensor that needs a gradient, torch would see no need for a backward pass behind frozen blocks
    trains = torch.empty(0, device=x.device, requires_grad=True)
    from_here = len(segments) if stored_from is None else stored_from
    out: torch.Tensor = _Chain.apply(x, trains, segments, from_here, again)
    return out


class _Chain(torch.autograd.Function):
    """A chain of segments as one function, whose backward pass runs them again, the last one first."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        _: torch.Tensor,
        segments: Sequence[Segment],
        stored_from: int,
        again: Callable[[], torch.Tensor] | None,
    ) -> Any:
        x = x.detach()  # or what is calculated on it later would lead on to what made it
        needs = ctx.needs_input_grad[0]
        ctx.passes = []
        for segment in segments[:stored_from]:
            ctx.passes.append(_Pass(segment, needs, None if ctx.passes else again))
            x = ctx.passes[-1].run(x)
            needs = needs or segment.trains
        ctx.stored = None
        if stored_from < len(segments):
            opened = Opened({})
            with torch.enable_grad():
                if needs:
                    x = opened.enter(0, x)
                for segment in segments[stored_from:]:
                    x = segment(x)
            ctx.stored = opened, x
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        told = list(gradients)
        if ctx.stored is not None:
            opened, result = ctx.stored
            ctx.stored = None
            opened.leave(result, told)
            del result
            opened.backward()
            told = list(opened.gradients.values())
            opened.gradients.clear()
        while ctx.passes and told:
            told = ctx.passes.pop().backward(told)
        return (told.pop() if told else None), None, None, None, None


class _Pass:
    """A batch that went through a segment."""

    def __init__(self, segment: Segment, needs: bool, make: Callable[[], torch.Tensor] | None):
        """`needs`: whether what goes in needs a gradient; `make`: what makes it anew; None: it is stored."""
        self.segment = segment
        self.needs = needs
        self.make = make

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Run the segment, and note what is needed to run it again."""
        if self.make is None:
            self.make = [x].pop  # and has it no more afterwards
        self.buffers = _kept_buffers(self.segment.modules)
        self.drew_from: list[torch.Tensor] | None = None
        if isinstance(x, FakeTensor):  # which has no values that could differ
            return self.segment(x)
        before = _random_state(x.device)
        out = self.segment(x)
        if not all(map(torch.equal, before, _random_state(x.device))):
            self.drew_from = before
        return out

    def backward(self, told: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradient of what went in, alone in a list; nothing where it needs none.

        `told`: that of what came out, alone in a list, which is emptied.
        """
        assert self.make is not None
        again = _Again(self.segment, self.make(), self.needs, told)
        with statistics_held(self.segment.modules, self.buffers):
            again.all_the_way(self.drew_from)
        return [gradient for value, gradient in again.gradients.items() if value == 0]


class _Again:
    """A batch on its second way through a segment, stretch by stretch, and on its way back."""

    def __init__(self, segment: Segment, x: torch.Tensor, needs: bool, told: list[torch.Tensor]):
        self.plan = plan = segment.plan(x)
        self.batch = OfImages(len(x), x.device)
        self.values = {0: x}
        self.trained = plan.trained(needs)
        self.gradients = {plan.outgoing: told.pop()}
        self.last = len(plan.stretches) - 1

    def all_the_way(self, drew_from: list[torch.Tensor] | None) -> None:
        """Go through all stretches and back; `drew_from`: the generators at the first pass, if it drew from them."""
        if drew_from is None:
            for number in range(self.last):
                self.forward(number)
            for number in range(self.last, -1, -1):
                self.backward(number)
            return
        device, states = self.batch.device, [drew_from]
        with _generators_kept(device):
            _set_random_state(drew_from, device)
            for number in range(self.last):
                self.forward(number)
                states.append(_random_state(device))
            for number in range(self.last, -1, -1):
                _set_random_state(states[number], device)
                self.backward(number)

    @torch.no_grad()
    def forward(self, number: int) -> None:
        """Run a stretch for what later ones take; what it takes itself stays as it is, as it will run once more."""
        stretch = self.plan.stretches[number]
        here = {v: self.values[v].clone() if v in stretch.writes else self.values[v] for v in stretch.takes}
        self._run(stretch, stretch.steps, here, set(stretch.gives))
        self.values |= {value: here[value] for value in stretch.gives}

    def backward(self, number: int) -> None:
        """Run a stretch with gradients, and turn those of what it gives into those of what it takes."""
        stretch = self.plan.stretches[number]
        earlier = {value for each in self.plan.stretches[:number] for value in each.takes}
        here = {}
        for value in stretch.takes:
            taken = self.values[value]
            here[value] = taken.clone() if value in stretch.writes and value in earlier else taken
            del taken
        self.values = {value: tensor for value, tensor in self.values.items() if value in earlier}
        opened = Opened(self.gradients)
        results = dict.fromkeys((*stretch.gives, *(stretch.relu or ())))
        with torch.enable_grad():
            self._run(stretch, stretch.steps[:-1] if stretch.relu else stretch.steps, here, set(results), opened)
        for given in stretch.gives:
            if given not in self.gradients:
                continue
            told = [self.gradients.pop(given)]
            if stretch.relu is not None and given == stretch.relu[1]:
                given = stretch.relu[0]
                told = [through_relu(told, here[given])]
            opened.leave(here.pop(given), told)
        del here
        opened.backward()

    def _run(
        self,
        stretch: Stretch,
        steps: Sequence[Step],
        here: dict[int, torch.Tensor],
        wanted: set[int],
        opened: Opened | None = None,
    ) -> None:
        """Make the calls of some steps, and let go of each value but those wanted once nothing needs it."""
        last = {value: number for number, step in enumerate(steps) for value in step.touches()}
        for number, step in enumerate(steps):
            entered = here
            if opened is not None:
                needing = self.trained.intersection(stretch.takes, step.values(), here)
                entered = here | {v: opened.enter(v, here[v]) for v in needing if here[v].is_floating_point()}
            self.plan.region.call(step, entered, self.batch)
            for value in step.outputs:
                if value is not None:
                    here[value] = entered[value]
            del entered
            for value in [value for value, end in last.items() if end == number and value not in wanted]:
                here.pop(value, None)


def repeatable(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what runs something on `x` twice, with the same random draws; the first time on a copy."""
    state = _random_state(x.device)
    first = [True]

    def found() -> torch.Tensor:
        if first:
            first.clear()
            return run(x.clone())  # what writes into it must not spoil it for the second time
        with _generators_kept(x.device):
            _set_random_state(state, x.device)
            return run(x)

    return found


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators that networks on a device draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Have generators go on afterwards from where they are, whatever is drawn inside."""
    now = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _kept_buffers(modules: nn.Module) -> KeptTensors:
    """Note the buffers of modules but for those of the usual batch normalisation, which training does not read."""
    return KeptTensors([module for module in modules.modules() if not _is_usual(module)], ("_buffers",))


def _is_usual(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.momentum is not None


@contextmanager
def statistics_held(modules: nn.Module, before: KeptTensors | None = None) -> Iterator[None]:
    """Keep further forward passes from moving running statistics again: the bits are then those of one.

    They begin with the buffers that the first pass began with, and leave those that the first pass left.
    """
    norms = [module for module in modules.modules() if isinstance(module, _BatchNorm) and _is_usual(module)]
    momenta = [norm.momentum for norm in norms]
    after = _kept_buffers(modules)
    if before is not None:
        before.put_back()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        after.put_back()
