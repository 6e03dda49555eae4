"""A forward pass written down as steps, and a stretch of such steps as a module."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Value:
    """A tensor that a step put out, by its number; 0 are the images."""

    index: int


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, by its name there."""

    name: str


@dataclass(frozen=True)
class Called:
    """A module of the network that is handed to a function, by its name."""

    name: str


@dataclass(frozen=True)
class OfBatch:
    """A number that follows the size of the batch: slope x size + offset, or with `inverse` slope / size + offset."""

    slope: float
    offset: float
    inverse: bool = False
    whole: bool = True

    def at(self, size: int) -> float:
        """Return the number for a batch of this size; a whole one is rounded down, as n // 2 is."""
        if self.inverse:
            return self.slope / size + self.offset
        number = self.slope * size + self.offset
        return math.floor(number) if self.whole else number


class ImagesDevice:
    """Stands for the compute device of the images."""


@dataclass(frozen=True)
class Step:
    """One call: of a module of the network by its name, or of a function."""

    module: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    """Plain values, and what stands for tensors and numbers above, nested as in the call."""
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    """The numbers of the tensors among the leaves of what it returns; None for a leaf that is no tensor."""
    where: str
    """File and line of the user's code that makes the call."""
    gradients: bool = True
    """False: the user's code makes the call under torch.no_grad."""
    inside: "Followed | None" = None
    """What the module calls in turn, from the one tensor that it takes, value 0 there, to the one that it gives."""

    def __deepcopy__(self, memo: Any) -> "Step":
        return self  # it names modules and tensors and holds none

    @property
    def label(self) -> str:
        """What to call it in a message."""
        if self.module is not None:
            return self.module
        return str(getattr(self.function, "__name__", self.function)).strip("_")

    def reads(self) -> Iterator[Any]:
        """Yield what stands for tensors, modules and numbers among its arguments."""
        for leaf in [*leaves(self.args), *leaves(dict(self.kwargs))]:
            if isinstance(leaf, Value | Held | Called | OfBatch | ImagesDevice):
                yield leaf

    def values(self) -> set[int]:
        """Return the values among its arguments."""
        return {read.index for read in self.reads() if isinstance(read, Value)}

    def touches(self) -> set[int]:
        """Return the values among its arguments and its results."""
        return self.values() | {output for output in self.outputs if output is not None}


@dataclass(frozen=True)
class Followed:
    """A forward pass in one mode: value 0 is what it takes, `outgoing` what it gives."""

    steps: tuple[Step, ...]
    outgoing: int
    shapes: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    """For each step and each leaf of what it returned the shape at each size of the batch; () for what is no tensor."""
    floats: frozenset[int]
    """The values of type float32."""


@dataclass(frozen=True)
class Program:
    """Steps from one value to another; both have a row for each image."""

    steps: tuple[Step, ...]
    incoming: int
    outgoing: int

    def __deepcopy__(self, memo: Any) -> "Program":
        return self

    def last_uses(self) -> list[list[int]]:
        """Return, for each step, the values that nothing needs after it."""
        last = {value: number for number, step in enumerate(self.steps) for value in step.touches()}
        dead: list[list[int]] = [[] for _ in self.steps]
        for value, number in last.items():
            if value != self.outgoing:
                dead[number].append(value)
        return dead


class Region(nn.Module):
    """A stretch of a network's forward as a module; it holds the network's own modules and tensors.

    It has a program for training and one for evaluation, as a forward may differ between the two.
    """

    def __init__(
        self,
        programs: Mapping[bool, Program],
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, torch.Tensor],
    ):
        """`modules` and `tensors`: those of the network, by the names that the steps use."""
        super().__init__()
        self.programs = dict(programs)
        self._dead = {mode: program.last_uses() for mode, program in self.programs.items()}
        self._attributes: dict[str, str] = {}
        steps = [step for program in self.programs.values() for step in program.steps]
        for step in steps:
            names = [read.name for read in step.reads() if isinstance(read, Called)]
            for name in [*names, *([step.module] if step.module is not None else [])]:
                if name not in self._attributes:
                    self.add_module(self._attribute(name), modules[name])
            for read in step.reads():
                if isinstance(read, Held) and read.name not in self._attributes:
                    tensor = tensors[read.name]
                    if isinstance(tensor, nn.Parameter):
                        self.register_parameter(self._attribute(read.name), tensor)
                    else:
                        self.register_buffer(self._attribute(read.name), tensor)

    def _attribute(self, name: str) -> str:
        plain = name.replace(".", "_") or "network"
        while plain in self._attributes.values() or hasattr(self, plain):
            plain += "_"
        self._attributes[name] = plain
        return plain

    def forward(self, x: torch.Tensor, observe: Callable[[Step, Sequence[Any]], None] | None = None) -> torch.Tensor:
        """Map what comes in to what goes out; `observe` is told each step and the leaves of what it returned."""
        program, dead = self.programs[self.training], self._dead[self.training]
        batch = OfImages(len(x), x.device)
        values: dict[int, torch.Tensor] = {program.incoming: x}
        del x
        for step, unneeded in zip(program.steps, dead, strict=True):
            out = self.call(step, values, batch)
            if observe is not None:
                observe(step, out)
            del out
            for number in unneeded:
                values.pop(number, None)
        return values[program.outgoing]

    def trains(self, step: Step) -> bool:
        """Whether a step has parameters that train."""
        names = [read.name for read in step.reads() if isinstance(read, Called)]
        called = [self._modules[self._attributes[n]] for n in [*names, *([step.module] if step.module else [])]]
        held = [getattr(self, self._attributes[read.name]) for read in step.reads() if isinstance(read, Held)]
        parameters = [*held, *(p for module in called if module is not None for p in module.parameters())]
        return any(tensor.requires_grad for tensor in parameters)

    def call(self, step: Step, values: dict[int, torch.Tensor], batch: "OfImages") -> list[Any]:
        """Make the call of a step, add what it puts out to the values, and return the leaves of that."""

        def resolved(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.index]
            if isinstance(leaf, Held):
                return getattr(self, self._attributes[leaf.name])
            if isinstance(leaf, OfBatch):
                return leaf.at(batch.size)
            if isinstance(leaf, Called):
                return self._modules[self._attributes[leaf.name]]
            return batch.device if isinstance(leaf, ImagesDevice) else leaf

        if step.module is not None:
            function: Any = self._modules[self._attributes[step.module]]
        else:
            function = step.function
        with nullcontext() if step.gradients else torch.no_grad():
            out = list(leaves(function(*mapped(step.args, resolved), **mapped(dict(step.kwargs), resolved))))
        for number, tensor in zip(step.outputs, out, strict=True):
            if number is not None:
                values[number] = tensor
        return out


@dataclass(frozen=True)
class OfImages:
    """What steps ask of the batch that goes through."""

    size: int
    device: torch.device


def mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return nested tuples, lists, dictionaries and slices with every leaf replaced."""
    if isinstance(tree, tuple):
        items = [mapped(item, leaf) for item in tree]
        # torch.Size takes whole numbers only, and functions take any tuple in its place
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [mapped(item, leaf) for item in tree]
    if isinstance(tree, dict):
        return {key: mapped(item, leaf) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(mapped(tree.start, leaf), mapped(tree.stop, leaf), mapped(tree.step, leaf))
    return leaf(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the leaves of nested tuples, lists, dictionaries, slices and dataclasses, in order."""
    if isinstance(tree, Value | Held | Called | OfBatch):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    elif isinstance(tree, slice):
        for item in (tree.start, tree.stop, tree.step):
            yield from leaves(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name))
    else:
        yield tree
