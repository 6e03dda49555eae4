"""The network cut into consecutive blocks."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fedfreeze.config.schema import ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.network.chain import Link, chain_of
from fedfreeze.network.memory import gains, lay_channels_last, spoils, takes_channels_last
from fedfreeze.network.models import MODELS
from fedfreeze.network.modes import Block, Exceptions, exceptions_of
from fedfreeze.network.own_network import make_fake, own_network
from fedfreeze.network.probing import ImageShape, Shape, check_whole, head_start_of, shapes_behind
from fedfreeze.network.verify import difference, repeats, unsaved
from fedfreeze.plugins import own_code, told
from fedfreeze.seeds import global_seed

_NAMES_SHOWN = 40


@dataclass(frozen=True)
class BlockedNetwork:
    """A network and its cut: `blocks` and `head` share the modules of `network`; applied in order they are it."""

    network: nn.Module
    blocks: tuple[nn.Sequential, ...]
    head: nn.Sequential
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """What each block puts out for one image."""
    num_classes: int
    places: tuple[str, ...]
    """Names at which a block can sensibly begin: modules with weights, before the head."""
    image_shape: ImageShape
    """What it takes."""
    widest: tuple[int, ...] = ()
    """The most numbers that a module of each block puts out for one image."""
    uncut: str | None = None
    """Why it cannot be cut: then it is one block, and its head is empty."""
    channels_last: bool = False
    """Whether weights of convolutions lie channels last (memory.py)."""

    def check_cut(self) -> None:
        """Raise ConfigError for a network that cannot be cut."""
        if self.uncut is not None:
            raise ConfigError(self.uncut)


@dataclass(frozen=True)
class Outline:
    """A network that was followed and probed, to be cut any number of times."""

    network: nn.Module
    links: tuple[Link, ...]
    shapes: tuple[Shape, ...]
    """What each link puts out for one image."""
    head_start: int
    num_classes: int
    usual_split: tuple[str, ...]
    image_shape: ImageShape
    exceptions: Exceptions
    """Modules that do not follow the mode that they are told (modes.py)."""
    uncut: str | None = None
    """Why it could not be followed, and cannot be cut."""
    channels_last: bool = False
    """Whether weights of convolutions lie channels last (memory.py)."""

    @property
    def places(self) -> tuple[str, ...]:
        """Names at which a block can sensibly begin: modules with weights, before the head."""
        return tuple(_places(self.links[: self.head_start]))

    def cut(self, split: Sequence[str]) -> BlockedNetwork:
        """Cut at the modules named in `split`; the first block begins with the network, named or not.

        Raises ConfigError for names at which no block can begin. What could not be followed is one block.
        """
        if self.uncut is not None:
            return BlockedNetwork(
                network=self.network,
                blocks=(nn.Sequential(self.network),),
                head=nn.Sequential(),
                names=("network",),
                shapes=((self.num_classes,),),
                num_classes=self.num_classes,
                places=(),
                image_shape=self.image_shape,
                uncut=self.uncut,
                channels_last=self.channels_last,
            )
        starts = _starts(self.network, self.links[: self.head_start], split)
        ends = [*starts[1:], self.head_start]
        blocks, names = [], []
        for begin, end in zip(starts, ends, strict=True):
            blocks.append(_block(self.links[begin:end], self.exceptions))
            names.append(_block_name(self.links, begin, end))
        head = _block(self.links[self.head_start :], self.exceptions)
        _check_nothing_shared(self.network, [*blocks, head], [*names, "the head"])
        return BlockedNetwork(
            network=self.network,
            blocks=tuple(blocks),
            head=head,
            names=tuple(names),
            shapes=tuple(self.shapes[end - 1] for end in ends),
            num_classes=self.num_classes,
            places=self.places,
            image_shape=self.image_shape,
            widest=tuple(max(map(math.prod, self.shapes[a:b])) for a, b in zip(starts, ends, strict=True)),
            channels_last=self.channels_last,
        )


def build_network(config: ModelConfig, image_shape: ImageShape, num_classes: int, seed: int) -> BlockedNetwork:
    """Build and cut the configured network; its initial weights follow from the seed alone. Raises ConfigError.

    A network of the user's own that cannot be cut comes whole, with `uncut`, the reason.
    """
    outline = build_outline(config, image_shape, num_classes, seed)
    return outline.cut(config.split or outline.usual_split)


def build_outline(config: ModelConfig, image_shape: ImageShape, num_classes: int, seed: int) -> Outline:
    """Build the configured network, ready to be cut. Raises ConfigError."""
    with global_seed(seed, "network"):
        if config.factory is None:
            network, usual_split = MODELS[config.name](config, num_classes, image_shape)
            outline = outline_of(network, image_shape, num_classes, usual_split, verified_as=repr(config))
            return _laid(outline, config, takes=True)
        fake_mode = detect_fake_mode()
        # for real even where costs are predicted: a factory may load, convert or look at weights, and following a
        # forward needs values
        with unset_fake_temporarily(), own_code("model.factory", config.factory):
            own, factory = own_network(config, image_shape, num_classes)
            outline = outline_or_whole(own, image_shape, num_classes, verified_as=(factory, repr(config)))
            outline = _laid(outline, config, verified_as=(factory, repr(config)))
        if fake_mode is not None:
            make_fake([own, *(link.module for link in outline.links)], fake_mode)
        return outline


def _laid(outline: Outline, config: ModelConfig, takes: bool | None = None, verified_as: Hashable = None) -> Outline:
    """Let weights lie as the configuration says; `takes`: whether it is known that the network runs channels last.

    Raises ConfigError where it is asked for and the network does not.
    """
    wanted = config.memory_format
    if wanted == "contiguous" or (wanted == "auto" and not gains(outline.network)):
        return outline
    if spoils(outline.network):
        if wanted == "auto":
            return outline
        raise ConfigError(
            "model.memory_format: with channels_last torch spoils its own memory in 1x1 convolutions with a stride "
            "over fewer than 16 channels, as the network has; use contiguous, or a larger model.width"
        )
    if takes is None:
        if verified_as not in _takes_channels_last:
            parts = [(link.module, shape) for link, shape in zip(outline.links[1:], outline.shapes, strict=False)]
            _takes_channels_last[verified_as] = takes_channels_last(outline.network, outline.image_shape, parts)
        takes = _takes_channels_last[verified_as]
    if not takes:
        if wanted == "auto":
            return outline
        raise ConfigError(
            "model.memory_format: the network fails with channels_last, as one does that calls view where reshape "
            "would do, or has group normalisation; use contiguous"
        )
    lay_channels_last(outline.network)
    return replace(outline, channels_last=True)


def outline_or_whole(
    network: nn.Module, image_shape: ImageShape, num_classes: int, verified_as: Hashable = None
) -> Outline:
    """Follow a network; one that cannot be followed is whole, with the reason. Raises ConfigError."""
    check_whole(network, image_shape, num_classes)
    lost = unsaved(network, image_shape)
    if lost is not None:
        raise ConfigError(f"model.factory: {lost}; register it without that")
    try:
        return outline_of(network, image_shape, num_classes, verified_as=verified_as)
    except Exception as error:  # also what the user's code makes of being followed
        reason = repeats(network, image_shape)
        if reason is not None:
            raise ConfigError(f"model.factory: {reason}; a run could not be repeated") from None
        uncut = str(error) if isinstance(error, ConfigError) else f"model.factory: it cannot be cut: {told(error)}"
        return Outline(network, (), (), 0, num_classes, (), image_shape, {}, uncut)


def outline_of(
    network: nn.Module,
    image_shape: ImageShape,
    num_classes: int,
    usual_split: Sequence[str] = (),
    verified_as: Hashable = None,
) -> Outline:
    """Follow and probe a network; the classifier and the pooling before it are its head.

    The chain that it becomes is held against the network itself (verify.py), where `verified_as` was given before,
    once a process. Raises ConfigError for one that does not map images (batch, *image_shape) to logits (batch,
    num_classes), or that cannot be followed.
    """
    fake = any(isinstance(tensor, FakeTensor) for tensor in network.parameters())
    enters = _verified.get(verified_as)
    for enter in (True, False) if enters is None else (enters,):
        links = chain_of(network, image_shape, enter=enter)
        shapes = shapes_behind(network, links, image_shape, num_classes)
        head_start = head_start_of(links, shapes, num_classes)
        exceptions = exceptions_of(network, {link.module: link.owner for link in links if link.owner is not None})
        differs = None
        if not fake and enters is None:
            differs = difference(network, _block(links, exceptions), links, image_shape)
        if differs is None:
            if not fake and verified_as is not None:
                _verified[verified_as] = enter
            return Outline(
                network,
                tuple(links),
                tuple(shapes),
                head_start,
                num_classes,
                tuple(usual_split),
                image_shape,
                exceptions,
            )
    raise ConfigError(f"model: cut into blocks, the network would not train as its own forward does: {differs}")


# Of networks that were tried: whether they run channels last.
_takes_channels_last: dict[Hashable, bool] = {}
# Of networks that were held against themselves: whether their modules were entered (chain.py).
_verified: dict[Hashable, bool] = {}


def _check_nothing_shared(network: nn.Module, parts: Sequence[nn.Module], names: Sequence[str]) -> None:
    """A frozen block must not change, so no tensor of it may be in another block. Raises ConfigError."""
    owner: dict[int, str] = {}
    for part, name in zip(parts, names, strict=True):
        for tensor in [*part.parameters(), *part.buffers()]:
            if owner.setdefault(id(tensor), name) != name:
                known = [
                    *network.named_parameters(remove_duplicate=False),
                    *network.named_buffers(remove_duplicate=False),
                ]
                shared = " = ".join(full for full, other in known if other is tensor)
                raise ConfigError(
                    f"model.split: {shared} of {name} is also in {owner[id(tensor)]}; what is frozen in one block "
                    "must not train in another: let no block begin between the two"
                )


def _block(links: Sequence[Link], exceptions: Exceptions) -> Block:
    named: OrderedDict[str, nn.Module] = OrderedDict()
    for i, link in enumerate(links):
        named[(link.name or f"operation{i}").replace(".", "_")] = link.module
    if len(named) == len(links):
        return Block(named, exceptions=exceptions)
    return Block(*(link.module for link in links), exceptions=exceptions)


def _starts(network: nn.Module, links: Sequence[Link], split: Sequence[str]) -> list[int]:
    """Return the positions at which blocks begin, the first always 0. Raises ConfigError."""
    starts: dict[int, str] = {}
    for name in split:
        found = next((i for i, link in enumerate(links) if _is_or_begins(link, name)), None)
        if found is None:
            known = name in dict(network.named_modules())
            why = "no block can begin at" if known else "the network has no module"
            raise ConfigError(f"model.split: {why} {name!r}; blocks can begin at: {_listed(_places(links))}")
        if found in starts:
            raise ConfigError(f"model.split: {name!r} and {starts[found]!r} begin at the same place; drop one")
        starts[found] = name
    positions = sorted({0, *starts})
    if len(positions) > 1 and not any(link.has_parameters for link in links[: positions[1]]):
        del positions[1]  # the first block begins with the network: what only prepares the images is its own
    for begin, end in zip(positions, [*positions[1:], len(links)], strict=True):
        if not any(link.has_parameters for link in links[begin:end]):
            raise ConfigError(
                f"model.split: the block that begins at {starts.get(begin, 'the start')!r} has nothing to train; "
                f"blocks can begin at: {_listed(_places(links))}"
            )
    return positions


def _is_or_begins(link: Link, name: str) -> bool:
    """Whether a name is the link's own or that of a Sequential in which it comes first."""
    names = [*link.other_names, *([link.name] if link.name is not None else [])]
    return any(own == name or own.startswith(f"{name}.") for own in names)


def _places(links: Sequence[Link]) -> list[str]:
    """Return the modules with weights, each by the largest Sequential that it begins."""
    found = []
    begun: set[str] = set()
    for link in links:
        if link.name is not None and link.has_weights:
            found.append(next(name for name in _outer(link.name) if name not in begun or name == link.name))
        for name in [*([link.name] if link.name is not None else []), *link.other_names]:
            begun.update(_outer(name))
    return found


def _outer(name: str) -> list[str]:
    """Return the names of the modules around one, the outermost first, and its own."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


def _block_name(links: Sequence[Link], begin: int, end: int) -> str:
    """Return the first and last module with parameters, each by the largest Sequential that lies in the block."""
    named = [i for i in range(begin, end) if links[i].name is not None and links[i].has_parameters]
    first, last = (_largest(links, begin, end, i) for i in (named[0], named[-1])) if named else ("?", "?")
    return first if first == last else f"{first}..{last}"


def _largest(links: Sequence[Link], begin: int, end: int, position: int) -> str:
    name = links[position].name or ""
    parts = name.split(".")
    for length in range(1, len(parts)):
        outer = ".".join(parts[:length])
        if all(begin <= i < end for i, link in enumerate(links) if _is_or_begins(link, outer)):
            return outer
    return name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
