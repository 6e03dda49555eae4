"""Runs grey images through a network: the shape behind each link of it, where its head begins, what it puts out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fedfreeze.errors import ConfigError
from fedfreeze.network.chain import Link
from fedfreeze.network.state import untouched
from fedfreeze.plugins import told
from fedfreeze.seeds import global_seed

ImageShape = tuple[int, int, int]  # channels, height, width
# what a block puts out for one image: (channels, height, width), (tokens, features) or (features,)
Shape = tuple[int, ...]

_HEAD_TYPES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Dropout, nn.LayerNorm)
# images of a probe; not one, of which a forward may drop the dimension
_PROBED = 2


def check_whole(network: nn.Module, image_shape: ImageShape, num_classes: int) -> None:
    """Run grey images through a network as it is.

    Raises ConfigError for one that does not map images (batch, *image_shape) to logits (batch, num_classes).
    """
    for mode in (False, True):  # some have further outputs in training
        running: list[str] = []
        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, now=running, name=name: now.append(name)))
            hooks.append(module.register_forward_hook(lambda *_, now=running: now.__delitem__(-1)))
        when = " in training mode" if mode else ""
        with untouched(network), torch.no_grad(), global_seed(0, "probing"):
            network.train(mode)
            try:
                logits = network(torch.full((_PROBED, *image_shape), 0.5))
            except Exception as error:
                where = next((name for name in reversed(running) if name), "the network")
                raise _fails(where + when, image_shape, error) from None
            finally:
                for hook in hooks:
                    hook.remove()
        _check_logits(logits, image_shape, num_classes, when)


def _fails(where: str, image_shape: ImageShape, error: Exception) -> ConfigError:
    return ConfigError(
        f"model: {where} fails on images of {_sizes(image_shape)} (channels x height x width): {told(error)}"
    )


def _check_logits(logits: Any, image_shape: ImageShape, num_classes: int, when: str = "") -> None:
    if not isinstance(logits, torch.Tensor):
        raise ConfigError(f"model: the network returns a {type(logits).__name__}{when}, not one tensor, the logits")
    if tuple(logits.shape) != (_PROBED, num_classes):
        raise ConfigError(
            f"model:{when} the network maps {_PROBED} images of {_sizes(image_shape)} to "
            f"{_sizes(tuple(logits.shape))}, not to {_PROBED}x{num_classes} (a row for each image, a logit for each "
            "class)"
        )
    # in training a device may diverge, which is its own matter
    if not when and not isinstance(logits, FakeTensor) and not bool(logits.isfinite().all()):
        raise ConfigError("model: the network puts out what is not a number for a grey image; check its first weights")


def shapes_behind(network: nn.Module, links: Sequence[Link], image_shape: ImageShape, num_classes: int) -> list[Shape]:
    """Run grey images through the chain; return the shape behind each link. Raises ConfigError."""
    where = "the network"
    with untouched(network), torch.no_grad():
        network.eval()  # dropout and the like must not draw
        for link in links:
            link.module.eval()
        try:
            x: torch.Tensor = torch.full((_PROBED, *image_shape), 0.5)
            shapes: list[Shape] = []
            for link in links:
                where = link.name or where
                x = link.module(x)
                shapes.append(tuple(x.shape[1:]))
        except Exception as error:
            raise _fails(where, image_shape, error) from None
    _check_logits(x, image_shape, num_classes)
    return shapes


def head_start_of(links: Sequence[Link], shapes: Sequence[Shape], num_classes: int) -> int:
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


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
