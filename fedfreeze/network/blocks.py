"""The network cut into consecutive blocks."""

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from fedfreeze.config.schema import ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.network.chain import Link, chain_of
from fedfreeze.network.models import MODELS
from fedfreeze.plugins import load_own, own_code, told
from fedfreeze.seeds import global_seed

ImageShape = tuple[int, int, int]  # channels, height, width
# what a block puts out for one image: (channels, height, width), (tokens, features) or (features,)
Shape = tuple[int, ...]

_HEAD_TYPES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Dropout, nn.LayerNorm)
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

    @property
    def places(self) -> tuple[str, ...]:
        """Names at which a block can sensibly begin: modules with weights, before the head."""
        return tuple(_places(self.links[: self.head_start]))

    def cut(self, split: Sequence[str]) -> BlockedNetwork:
        """Cut at the modules named in `split`; the first block begins with the network, named or not.

        Raises ConfigError for names at which no block can begin.
        """
        starts = _starts(self.network, self.links[: self.head_start], split)
        ends = [*starts[1:], self.head_start]
        blocks, names = [], []
        for begin, end in zip(starts, ends, strict=True):
            blocks.append(_sequential(self.links[begin:end]))
            names.append(_block_name(self.links, begin, end))
        head = _sequential(self.links[self.head_start :])
        _check_nothing_shared([*blocks, head], [*names, "the head"])
        shapes = tuple(self.shapes[end - 1] for end in ends)
        return BlockedNetwork(
            network=self.network,
            blocks=tuple(blocks),
            head=head,
            names=tuple(names),
            shapes=shapes,
            num_classes=self.num_classes,
            places=self.places,
            image_shape=self.image_shape,
        )


def build_network(config: ModelConfig, image_shape: ImageShape, num_classes: int, seed: int) -> BlockedNetwork:
    """Build and cut the configured network; its initial weights follow from the seed alone. Raises ConfigError."""
    outline = build_outline(config, image_shape, num_classes, seed)
    return outline.cut(config.split or outline.usual_split)


def build_outline(config: ModelConfig, image_shape: ImageShape, num_classes: int, seed: int) -> Outline:
    """Build the configured network, ready to be cut. Raises ConfigError."""
    with global_seed(seed, "network"):
        if config.factory is None:
            network, usual_split = MODELS[config.name](config, num_classes, image_shape)
            return outline_of(network, image_shape, num_classes, usual_split)
        return outline_of(_own_network(config, image_shape, num_classes), image_shape, num_classes)


def _own_network(config: ModelConfig, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Return what the user's factory builds. Raises ConfigError."""
    assert config.factory is not None
    key = "model.factory"
    factory = load_own(key, config.factory)
    if not callable(factory):
        raise ConfigError(f"{key}: {config.factory} is a {type(factory).__name__}, not a function")
    keywords = {"num_classes": num_classes, "in_channels": image_shape[0], "image_size": image_shape[1:]}
    _check_keywords(key, config, factory, keywords | config.options)
    fake_mode = detect_fake_mode()
    # for real even where costs are predicted: a factory may load, convert or look at weights
    with unset_fake_temporarily(), own_code(key, config.factory):
        network = factory(**keywords, **config.options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{key}: {config.factory} returned a {type(network).__name__}, not a torch.nn.Module")
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{key}: parameter {name} is {parameter.dtype}; networks train in float32 here")
        if not parameter.requires_grad:
            raise ConfigError(f"{key}: parameter {name} does not require gradients; fedfreeze does the freezing")
    if fake_mode is not None:
        with unset_fake_temporarily():
            outline_of(network, image_shape, num_classes)  # here there are values to compare
            _make_fake(network, fake_mode)
    return network


def _check_keywords(key: str, config: ModelConfig, factory: Any, keywords: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**keywords)
    except ValueError:
        return  # not written in Python: it has no signature to look at
    except TypeError as error:
        raise ConfigError(
            f"{key}: {config.factory}: {error}; it is called with the keywords {', '.join(keywords)}; those of "
            "model.options come last"
        ) from None


def _make_fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every tensor of a network by one that has a shape only; what was shared stays shared."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            shape_only = mode.from_tensor(tensor.detach())
            made[id(tensor)] = nn.Parameter(shape_only) if isinstance(tensor, nn.Parameter) else shape_only
        return made[id(tensor)]

    for module in network.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def outline_of(
    network: nn.Module, image_shape: ImageShape, num_classes: int, usual_split: Sequence[str] = ()
) -> Outline:
    """Follow and probe a network; the classifier and the pooling before it are its head.

    Raises ConfigError for one that does not map images (batch, *image_shape) to logits (batch, num_classes).
    """
    links = chain_of(network)
    shapes = _probe(network, links, image_shape, num_classes)
    head_start = _head_start(links, shapes, num_classes)
    return Outline(network, tuple(links), tuple(shapes), head_start, num_classes, tuple(usual_split), image_shape)


def _check_nothing_shared(parts: Sequence[nn.Module], names: Sequence[str]) -> None:
    """A frozen block must not change, so no tensor of it may be in another block. Raises ConfigError."""
    owner: dict[int, str] = {}
    for part, name in zip(parts, names, strict=True):
        for tensor_name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            if owner.setdefault(id(tensor), name) != name:
                raise ConfigError(
                    f"model.split: {tensor_name} of {name} is also in {owner[id(tensor)]}; what is frozen in one block "
                    "must not train in another: let no block begin between the two"
                )


def _sequential(links: Sequence[Link]) -> nn.Sequential:
    named: OrderedDict[str, nn.Module] = OrderedDict()
    for i, link in enumerate(links):
        named[(link.name or f"operation{i}").replace(".", "_")] = link.module
    if len(named) == len(links):
        return nn.Sequential(named)
    return nn.Sequential(*(link.module for link in links))


def _probe(network: nn.Module, links: Sequence[Link], image_shape: ImageShape, num_classes: int) -> list[Shape]:
    """Run one grey image through the chain; return the shape behind each link. Raises ConfigError."""
    training = network.training
    network.eval()  # a probe must not move running statistics
    where = "the network"
    try:
        with torch.no_grad():
            x: torch.Tensor = torch.full((1, *image_shape), 0.5)
            shapes: list[Shape] = []
            for link in links:
                where = link.name or where
                x = link.module(x)
                shapes.append(tuple(x.shape[1:]))
            where = "the network"
            expected = network(torch.full((1, *image_shape), 0.5))
            fake = isinstance(x, FakeTensor)  # there are no values to compare
            finite = fake or bool(expected.isfinite().all())
            same = fake or torch.equal(x.nan_to_num(), expected.nan_to_num())
    except Exception as error:
        raise ConfigError(
            f"model: {where} fails on an image of {_sizes(image_shape)} (channels x height x width): {told(error)}"
        ) from None
    finally:
        network.train(training)
    if tuple(expected.shape) != (1, num_classes):
        raise ConfigError(
            f"model: the network maps one image of {_sizes(image_shape)} to {_sizes(tuple(expected.shape))}, not to "
            f"1x{num_classes} (one row, a logit for each class)"
        )
    if not finite:
        raise ConfigError("model: the network puts out what is not a number for a grey image; check its first weights")
    if not same:
        raise ConfigError(
            "model: the modules of the network, one after the other, do not compute what its forward does; blocks "
            "can be cut only where one value passes from one module to the next"
        )
    return shapes


def _head_start(links: Sequence[Link], shapes: Sequence[Shape], num_classes: int) -> int:
    """The head is the classifier and what stands directly before it: pooling, flattening, dropout, layer norm."""
    classifiers = [
        i
        for i, link in enumerate(links)
        for module in link.module.modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not classifiers:
        raise ConfigError(
            f"model: the network has no classifier, a torch.nn.Linear with {num_classes} outputs; end it with pooling, "
            "flattening and one of these"
        )
    start = classifiers[-1]
    while start > 1 and _belongs_to_head(links[start - 1], shapes[start - 2], shapes[start - 1]):
        start -= 1
    if not any(link.has_parameters for link in links[:start]):
        raise ConfigError("model: before its classifier the network has nothing to train, so there is no block")
    return start


def _belongs_to_head(link: Link, before: Shape, after: Shape) -> bool:
    if isinstance(link.module, _HEAD_TYPES):
        return True
    if link.has_parameters or isinstance(link.module, nn.MaxPool2d):
        return False
    pools_all = len(before) == 3 and after[1:] == (1, 1) and before[1:] != (1, 1)
    return len(after) < len(before) or pools_all


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
    for begin, end in zip(positions, [*positions[1:], len(links)], strict=True):
        if not any(link.has_parameters for link in links[begin:end]):
            raise ConfigError(
                f"model.split: the block that begins at {starts.get(begin, 'the start')!r} has nothing to train; "
                f"blocks can begin at: {_listed(_places(links))}"
            )
    return positions


def _is_or_begins(link: Link, name: str) -> bool:
    """Whether a name is the link's own or that of a Sequential in which it comes first."""
    return link.name is not None and (link.name == name or link.name.startswith(f"{name}."))


def _places(links: Sequence[Link]) -> list[str]:
    """Return the modules with weights, each by the largest Sequential that it begins."""
    found = []
    for i, link in enumerate(links):
        if link.name is not None and link.has_weights:
            outer = list(itertools.accumulate(link.name.split("."), "{}.{}".format))
            found.append(next(name for name in outer if i == 0 or not _is_or_begins(links[i - 1], name)))
    return found


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


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
