"""A network as a chain of modules that run one after the other: where it can be cut."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fedfreeze.errors import ConfigError
from fedfreeze.network.following import BATCH_SIZES, follow
from fedfreeze.network.program import Called, Followed, Held, Program, Region, Step, Value
from fedfreeze.network.recording import UnfollowedError, is_plain_sequential, may_enter
from fedfreeze.network.state import tensors_by_name


@dataclass(frozen=True)
class Link:
    """One piece of a chain: takes one tensor, gives one tensor."""

    name: str | None
    """The module's name in the network; None for operations between modules, where no block can begin."""
    module: nn.Module
    other_names: tuple[str, ...] = ()
    """The same module's further names in the network, and those of modules that begin with it."""
    owner: nn.Module | None = None
    """Of operations: the module of whose forward they are, and whose mode they take."""

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train in it."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def has_weights(self) -> bool:
        """Whether it trains more than a normalisation layer's vectors: a place where a block usually begins."""
        return any(parameter.dim() > 1 and parameter.requires_grad for parameter in self.module.parameters())


def chain_of(network: nn.Module, image_shape: tuple[int, int, int], *, enter: bool = True) -> list[Link]:
    """Return the network as a chain whose links, applied in order, are its forward pass.

    Nested Sequentials are unfolded. Another module's own forward is followed, in training and in evaluation: each
    module that it calls is a link, with the tensor operations between them; where more than one value is alive (a
    shortcut around several modules), all that it spans is one link. With `enter`, a module that is itself a chain of
    several with weights is its links. Raises ConfigError where the forward cannot be followed.
    """
    if is_plain_sequential(network) and not (enter and any(may_enter(module) for module in network.modules())):
        return [Link(name, module) for name, module in unfold(network)]
    try:
        followed = follow(network, image_shape)
    except UnfollowedError as error:
        raise ConfigError(
            f"model.factory: the forward of {type(network).__name__} cannot be followed ({error}); it may call modules "
            "and tensor operations in any order, but not branch on values; `method.name=fedavg` trains it as it is"
        ) from None
    return _links(network, followed, _Contents(network, enter))


def unfold(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a Sequential that run, in order, with nested Sequentials unfolded and their full names."""
    for name, child in network._modules.items():  # not named_children, which leaves out a module that runs twice
        if child is None:
            continue
        if is_plain_sequential(child):
            yield from unfold(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _Contents:
    """Modules and tensors of a network by the names that steps use."""

    def __init__(self, network: nn.Module, enter: bool):
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.tensors = tensors_by_name(network)
        self.enter = enter


def _links(owner: nn.Module, followed: dict[bool, Followed], contents: _Contents) -> list[Link]:
    """Return the links of a forward: the network's, or that of a module in it."""
    crossings = {mode: _crossings(each, contents) for mode, each in followed.items()}
    begins = dict.fromkeys(followed, 0)
    incoming = dict.fromkeys(followed, 0)
    links: list[Link] = []
    for end in [*_common_places(followed, crossings), {mode: len(each.steps) for mode, each in followed.items()}]:
        programs = {}
        for mode, each in followed.items():
            crossing = crossings[mode].get(end[mode])
            outgoing = each.outgoing if crossing is None else crossing.value
            programs[mode] = Program(each.steps[begins[mode] : end[mode]], incoming[mode], outgoing)
            begins[mode], incoming[mode] = end[mode], outgoing
        links += _stretch(owner, programs, contents)
    return links


def _stretch(owner: nn.Module, programs: dict[bool, Program], contents: _Contents) -> list[Link]:
    """Return a stretch as the one module that it calls, that module's own links, or a module made of it."""
    first = next((program.steps[0] for program in programs.values() if program.steps), None)
    if first is None:
        return []
    name, modules = first.module, contents.modules
    others = tuple(n for n, m in modules.items() if name is not None and m is modules[name] and n != name)
    if name is None or not all(_only_calls(program, name) for program in programs.values()):
        # a block can begin here only by the name of the module that runs first in it
        return [Link(name, Region(programs, modules, contents.tensors), others, owner)]
    inside = {mode: program.steps[0].inside for mode, program in programs.items()}
    known = {mode: each for mode, each in inside.items() if each is not None}
    if contents.enter and len(known) == len(inside):
        links = _links(modules[name], known, contents)
        if sum(link.has_weights for link in links) > 1:
            return [replace(links[0], other_names=(*links[0].other_names, name, *others)), *links[1:]]
    return [Link(name, modules[name], others)]


def _only_calls(program: Program, module: str) -> bool:
    if len(program.steps) != 1:
        return False
    (step,) = program.steps
    handed_on = step.args == (Value(program.incoming),) and not step.kwargs
    return step.module == module and handed_on and step.gradients and step.outputs == (program.outgoing,)


@dataclass(frozen=True)
class _Crossing:
    """The only value that is needed on both sides of a place, with its shape for each of BATCH_SIZES."""

    value: int
    shapes: tuple[tuple[int, ...], ...]


def _crossings(followed: Followed, contents: _Contents) -> dict[int, _Crossing]:
    """Return the positions between steps at which a network can be cut, each with the value that crosses it.

    There a single tensor of floats with a row for each image is alive, and no weight is used on both sides.
    """
    end = len(followed.steps)
    last = {followed.outgoing: end}
    for number, step in enumerate(followed.steps):
        for read in step.reads():
            if isinstance(read, Value):
                last[read.index] = max(last.get(read.index, 0), number)
    spans = _shared_spans(followed.steps, contents)
    shapes: dict[int, tuple[tuple[int, ...], ...]] = {0: tuple((size,) for size in BATCH_SIZES)}
    alive, found = {0}, {}
    for place in range(1, end):
        made = zip(followed.steps[place - 1].outputs, followed.shapes[place - 1], strict=True)
        shapes |= {output: shape for output, shape in made if output is not None}
        alive |= {output for output in followed.steps[place - 1].outputs if output is not None}
        alive = {value for value in alive if last.get(value, -1) >= place}
        if len(alive) != 1 or any(first < place <= final for first, final in spans):
            continue
        (value,) = alive
        rows = [shape[:1] for shape in shapes[value]]
        if value in followed.floats and rows == [(size,) for size in BATCH_SIZES]:
            found[place] = _Crossing(value, shapes[value])
    return found


def _common_places(
    followed: dict[bool, Followed], crossings: dict[bool, dict[int, _Crossing]]
) -> list[dict[bool, int]]:
    """Return the positions at which a network can be cut in training and in evaluation alike.

    Where both call the same, these are all that both have; else those before a module that both call once.
    """
    training, evaluation = followed[True].steps, followed[False].steps
    if [(step.module, step.label) for step in training] == [(step.module, step.label) for step in evaluation]:
        return [{True: place, False: place} for place in crossings[True] if place in crossings[False]]
    found: list[dict[bool, int]] = []
    in_evaluation = _places_by_module(evaluation, crossings[False])
    for name, place in _places_by_module(training, crossings[True]).items():
        other = in_evaluation.get(name)
        if other is not None and (not found or other > found[-1][False]):
            found.append({True: place, False: other})
    return found


def _places_by_module(steps: Sequence[Step], places: Iterable[int]) -> dict[str, int]:
    calls = Counter(step.module for step in steps)
    named = {place: steps[place].module for place in places}
    return {name: place for place, name in named.items() if name is not None and calls[name] == 1}


def _shared_spans(steps: Sequence[Step], contents: _Contents) -> set[tuple[int, int]]:
    """Return the first and last use of every tensor of the network that is used more than once."""
    uses: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for tensor in _tensors_of(step, contents):
            uses.setdefault(tensor, []).append(number)
    return {(min(places), max(places)) for places in uses.values() if min(places) != max(places)}


def _tensors_of(step: Step, contents: _Contents) -> set[int]:
    found = {id(contents.tensors[read.name]) for read in step.reads() if isinstance(read, Held)}
    called = [read.name for read in step.reads() if isinstance(read, Called)]
    for name in [*called, *([step.module] if step.module is not None else [])]:
        module = contents.modules[name]
        found |= {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    return found


def leaves_in_order(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that run, in order, with nested Sequentials unfolded.

    A Sequential inside a Sequential holds its own input until its last child is done. In a forward pass without
    gradients that is a whole activation more than is needed (32 MiB in ResNet-18 at batch 128).
    """
    for module in modules:
        if isinstance(module, nn.ModuleList) or is_plain_sequential(module):
            # not children(), which leaves out a module that runs twice
            yield from leaves_in_order(child for child in module._modules.values() if child is not None)
        else:
            yield module
