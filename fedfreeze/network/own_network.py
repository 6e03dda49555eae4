"""The network that a user's own factory builds."""

import inspect
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.lazy import LazyModuleMixin

from fedfreeze.config.schema import ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.plugins import load_own, own_code

_KEY = "model.factory"


def own_network(
    config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[nn.Module, Callable[..., Any]]:
    """Return what the user's factory builds, and the factory. Raises ConfigError."""
    assert config.factory is not None
    factory = load_own(_KEY, config.factory)
    if not callable(factory):
        raise ConfigError(f"{_KEY}: {config.factory} is a {type(factory).__name__}, not a function")
    keywords = {"num_classes": num_classes, "in_channels": image_shape[0], "image_size": image_shape[1:]}
    _check_keywords(config, factory, keywords | config.options)
    with own_code(_KEY, config.factory):
        network = factory(**keywords, **config.options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{_KEY}: {config.factory} returned a {type(network).__name__}, not a torch.nn.Module")
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{_KEY}: {name or 'the network'} is compiled by torch.jit, which hides its tensors; return it as it "
                "was before"
            )
    with own_code(_KEY, config.factory):
        if any(isinstance(module, LazyModuleMixin) for module in network.modules()):
            with torch.no_grad():  # the first images give its parameters their sizes
                network.eval()(torch.full((2, *image_shape), 0.5))
        network.train()  # what it does to its parameters, such as freezing some of them, is meant
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"{_KEY}: parameter {name} is {parameter.dtype}; networks train in float32 here")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"{_KEY}: no parameter of {config.factory} requires gradients, so there is nothing to train")
    _check_overlap(network)
    return network, factory


def _check_keywords(config: ModelConfig, factory: Any, keywords: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**keywords)
    except ValueError:
        return  # not written in Python: it has no signature to look at
    except TypeError as error:
        raise ConfigError(
            f"{_KEY}: {config.factory}: {error}; it is called with the keywords {', '.join(keywords)}; those of "
            "model.options come last"
        ) from None


def _check_overlap(network: nn.Module) -> None:
    """Refuse tensors that share memory without being one: each would be given memory of its own. Raises ConfigError."""
    places: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.numel():
            begin = tensor.data_ptr()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            storage = tensor.untyped_storage().data_ptr()
            places.setdefault(storage, []).append((begin, begin + reach * tensor.element_size(), name))
    for inside in places.values():
        for (_, end, one), (begin, _, other) in pairwise(sorted(inside)):
            if begin < end:
                raise ConfigError(
                    f"{_KEY}: {one} and {other} share memory and are two tensors; to tie weights, let both names hold "
                    "the same nn.Parameter"
                )


def make_fake(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replace every tensor of some modules by one that has a shape only; what was shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # or a tensor that is let go of could give its id to another

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            shape_only = mode.from_tensor(tensor.detach())
            made[id(tensor)] = (
                nn.Parameter(shape_only, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape_only
            )
        return made[id(tensor)]

    done: set[nn.Module] = set()
    for module in [inner for outer in modules for inner in outer.modules()]:
        if module in done:
            continue
        done.add(module)
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
