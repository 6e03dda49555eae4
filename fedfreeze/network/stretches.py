"""A piece of a chain as stretches of steps, of which each can be run again alone, once what it takes is there."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.network.following import follow_at
from fedfreeze.network.program import Called, Held, OfImages, Program, Region, Step, Value, mapped
from fedfreeze.network.recording import is_plain_sequential
from fedfreeze.network.state import tensors_by_name

_META = torch.device("meta")
_RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)


@dataclass(frozen=True)
class Stretch:
    """Steps between two places of a segment."""

    steps: tuple[Step, ...]
    takes: tuple[int, ...]
    """Values from before it."""
    gives: tuple[int, ...]
    """Values that something after it takes."""
    writes: frozenset[int] = frozenset()
    """Of the values that it takes those that it writes into."""
    relu: tuple[int, int] | None = None
    """Where its last step is a ReLU: what that takes, which nothing else does, and what it gives."""


@dataclass(frozen=True)
class Plan:
    """A segment in stretches."""

    region: Region
    """Makes the calls."""
    stretches: tuple[Stretch, ...]
    outgoing: int

    def trained(self, from_incoming: bool) -> set[int]:
        """Return the values through which a gradient goes; value 0 among them if `from_incoming`."""
        found = {0} if from_incoming else set()
        for stretch in self.stretches:
            for step in stretch.steps:
                if step.gradients and (self.region.trains(step) or found & step.values()):
                    found |= {output for output in step.outputs if output is not None}
        return found


def plan_of(modules: Sequence[nn.Module], shape: Sequence[int], within: bool) -> Plan:
    """Return modules that run one after the other as stretches: one; with `within` one for each layer with weights.

    With `within`, the forward of a module that has several layers is followed, such as a residual block's, so that a
    stretch is a layer with the normalisation and activation behind it, and what joins shortcuts. `shape`: that of what
    comes in, (batch, ...), for which alone the plan holds. What cannot be followed is a step of its own.
    """
    names = {str(number): module for number, module in enumerate(modules)}
    metas = _on_meta(names)
    steps: tuple[Step, ...] | None = None
    if metas is not None and within:
        steps = _steps_within(metas, shape)
    if steps is None:
        steps = tuple(_call(name, number) for number, name in enumerate(names))
    outgoing = steps[-1].outputs[-1] if steps else 0
    assert outgoing is not None
    kinds = _Kinds(_with_parameters(names, 2), _with_parameters(names, 1), _relus(names))
    cut = _cut(steps, outgoing, kinds) if within else [_stretch(steps, (), outgoing, kinds)]
    writes = None if metas is None else _written(cut, metas, shape)
    if writes is None or any(len(each) > 1 for each in writes):  # nothing is known of it, or what writes is entangled
        whole = _stretch(steps, (), outgoing, kinds)
        return Plan(_region(steps, names), (replace(whole, writes=frozenset({0}), relu=None),), outgoing)
    found = tuple(replace(stretch, writes=each) for stretch, each in zip(cut, writes, strict=True))
    return Plan(_region(steps, names), found, outgoing)


def _call(name: str, number: int) -> Step:
    return Step(name, None, (Value(number),), {}, (number + 1,), "")


def _steps_within(metas: dict[str, nn.Module], shape: Sequence[int]) -> tuple[Step, ...] | None:
    """Return the steps inside of modules, each value with a number of its own; None where they are not known."""
    found: list[Step] = []
    last = 0
    numbers = 1
    x = torch.empty(*shape, device=_META)
    for name, module in metas.items():
        steps: Sequence[Step] = (_call("", 0),)
        incoming, outgoing = 0, 1
        if _is_composite(module):
            try:
                followed = follow_at(module, x)
                steps, outgoing = followed.steps, followed.outgoing
            except Exception:  # whatever a forward of a user's own does that cannot be followed: it is one step
                steps = (_call("", 0),)
        now: dict[int, int] = {incoming: last}
        for step in steps:
            rename = partial(_renamed, prefix=name, numbers=now)
            args, kwargs = mapped(step.args, rename), mapped(dict(step.kwargs), rename)
            outputs: list[int | None] = []
            for output in step.outputs:  # what is written into gets a new number: it is another value
                if output is None:
                    outputs.append(None)
                    continue
                now[output] = numbers
                outputs.append(numbers)
                numbers += 1
            module_name = None if step.module is None else f"{name}.{step.module}".rstrip(".")
            found.append(replace(step, module=module_name, args=args, kwargs=kwargs, outputs=tuple(outputs)))
        last = now[outgoing]
        try:
            with torch.no_grad():
                x = module(x)
        except Exception:  # as above
            return None
    if not found or found[-1].outputs[-1:] != (last,):
        return None
    return tuple(found)


def _renamed(leaf: Any, prefix: str, numbers: dict[int, int]) -> Any:
    if isinstance(leaf, Value):
        return Value(numbers[leaf.index])
    if isinstance(leaf, Held | Called):
        return type(leaf)(f"{prefix}.{leaf.name}")
    return leaf


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has several layers with weights, and nothing is hooked to it as a whole."""
    if module._forward_hooks or module._forward_pre_hooks or is_plain_sequential(module):
        return False
    return sum(any(p.dim() > 1 for p in inner.parameters(recurse=False)) for inner in module.modules()) > 1


@dataclass(frozen=True)
class _Kinds:
    """Names of modules and tensors."""

    weighty: set[str]
    """Of what has weights that are more than vectors."""
    trained: set[str]
    """Of what has parameters."""
    relus: set[str]


def _relus(names: dict[str, nn.Module]) -> set[str]:
    """Return the names of modules that are torch's ReLU and nothing else."""
    return {
        f"{prefix}.{name}".rstrip(".")
        for prefix, module in names.items()
        for name, inner in module.named_modules(remove_duplicate=False)
        if type(inner) is nn.ReLU and not (inner._forward_hooks or inner._forward_pre_hooks)
    }


def _with_parameters(names: dict[str, nn.Module], dimensions: int) -> set[str]:
    """Return the names, of modules and tensors, of what has parameters of so many dimensions or more."""
    found = set()
    for prefix, module in names.items():
        for name, inner in module.named_modules(remove_duplicate=False):
            if any(parameter.dim() >= dimensions for parameter in inner.parameters()):
                found.add(f"{prefix}.{name}".rstrip("."))
        for name, parameter in module.named_parameters():
            if parameter.dim() >= dimensions:
                found.add(f"{prefix}.{name}")
    return found


def _cut(steps: Sequence[Step], outgoing: int, kinds: _Kinds) -> list[Stretch]:
    """Return stretches that begin at each step with weights and behind each ReLU; those that share a weight are one.

    Behind a ReLU, as the gradient before it can lie in the memory of that behind it where it is the last step.
    """
    begins = [0]
    for number, step in enumerate(steps):
        if number and (_names_of([step]) & kinds.weighty or _is_relu(steps[number - 1], kinds.relus)):
            begins.append(number)
    parts = [list(steps[a:b]) for a, b in zip(begins, [*begins[1:], len(steps)], strict=True)]
    number = 0
    while number < len(parts):
        used = kinds.trained & _names_of(parts[number])
        shares = [i for i in range(number + 1, len(parts)) if used & _names_of(parts[i])]
        if shares:
            parts[number : shares[-1] + 1] = [[step for part in parts[number : shares[-1] + 1] for step in part]]
        else:
            number += 1
    return [_stretch(part, [s for p in parts[i + 1 :] for s in p], outgoing, kinds) for i, part in enumerate(parts)]


def _names_of(steps: Sequence[Step]) -> set[str]:
    """Return the names of modules and tensors that steps use."""
    called = {read.name for step in steps for read in step.reads() if isinstance(read, Held | Called)}
    return called | {step.module for step in steps if step.module is not None}


def _stretch(steps: Sequence[Step], behind: Sequence[Step], outgoing: int, kinds: _Kinds) -> Stretch:
    made = {output for step in steps for output in step.outputs if output is not None}
    takes = sorted({value for step in steps for value in step.values()} - made)
    later = {value for step in behind for value in step.values()} | {outgoing}
    gives = sorted(made & later)
    return Stretch(tuple(steps), tuple(takes), tuple(gives), relu=_last_relu(steps, gives, kinds.relus))


def _is_relu(step: Step, relus: set[str]) -> bool:
    return step.function in _RELUS or step.module in relus


def _last_relu(steps: Sequence[Step], gives: Sequence[int], relus: set[str]) -> tuple[int, int] | None:
    """Return what a last step takes and gives that is a ReLU and the only user of what it takes."""
    last = steps[-1] if len(steps) > 1 else None
    if last is None or last.kwargs or len(last.args) != 1 or not isinstance(last.args[0], Value):
        return None
    if not _is_relu(last, relus):
        return None
    taken, given = last.args[0].index, last.outputs[0]
    uses = sum(taken in step.values() for step in steps)
    made = any(taken in step.outputs for step in steps[:-1])
    if given is None or uses != 1 or not made or taken in gives:
        return None
    return taken, given


def _region(steps: tuple[Step, ...], names: dict[str, nn.Module]) -> Region:
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in names.items():
        modules |= {f"{prefix}.{n}".rstrip("."): inner for n, inner in module.named_modules(remove_duplicate=False)}
        tensors |= {f"{prefix}.{n}": tensor for n, tensor in tensors_by_name(module).items()}
    return Region({True: Program(steps, 0, 0)}, modules, tensors)


def _on_meta(names: dict[str, nn.Module]) -> dict[str, nn.Module] | None:
    """Return copies of modules whose tensors have shapes only; None where they cannot be copied."""
    memo: dict[int, Any] = {}
    for module in names.values():
        for tensor in [*module.parameters(), *module.buffers()]:
            empty = torch.empty_like(tensor, device=_META)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    try:
        return {name: copy.deepcopy(module, memo) for name, module in names.items()}
    except Exception:  # a module of a user's own may hold what cannot be copied
        return None


def _written(cut: Sequence[Stretch], metas: dict[str, nn.Module], shape: Sequence[int]) -> list[frozenset[int]] | None:
    """Return for each stretch which of the values that it takes it writes into; None where that is not known."""
    steps = tuple(step for stretch in cut for step in stretch.steps)
    region = _region(steps, metas)
    values: dict[int, torch.Tensor] = {0: torch.empty(*shape, device=_META)}
    batch = OfImages(len(values[0]), _META)
    found = []
    try:
        with torch.no_grad():
            for stretch in cut:
                before = {value: values[value]._version for value in stretch.takes}
                for step in stretch.steps:
                    region.call(step, values, batch)
                found.append(frozenset(value for value in stretch.takes if values[value]._version != before[value]))
    except Exception:  # it asks for values, or for a device
        return None
    return found
