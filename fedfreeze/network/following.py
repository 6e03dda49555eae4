"""Follows a network's forward: runs it on a few images of two sizes of the batch, and joins what it calls."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedfreeze.network.program import Followed, ImagesDevice, OfBatch, Step
from fedfreeze.network.recording import Recorder, Recording, UnfollowedError
from fedfreeze.network.state import untouched
from fedfreeze.seeds import global_seed

# Two sizes, so that a number that follows the size of the batch is told from one that is fixed; not 1, which training
# with batch normalisation cannot take.
BATCH_SIZES = (2, 4)


def follow(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[bool, Followed]:
    """Return what the forward of a network calls in training (True) and in evaluation (False).

    Plain Sequentials are gone into; any other module is one call, with what it calls in turn where that can be told
    (Step.inside). The network is left as it was. Raises UnfollowedError, and whatever the forward raises.
    """
    followed = {}
    for mode in (True, False):
        recordings = [_recorded(network, mode, partial(torch.rand, size, *image_shape)) for size in BATCH_SIZES]
        followed[mode] = _joined(*recordings)
    return followed


def follow_at(network: nn.Module, x: torch.Tensor) -> Followed:
    """Return what a forward calls in training on a batch of one size, and of what comes in one shape. See `follow`."""
    followed = _joined(*(_recorded(network, True, lambda: x) for _ in range(2)))
    for step in followed.steps:
        if any(isinstance(read, OfBatch) for read in step.reads()):
            raise UnfollowedError(f"{step.label} at {step.where} takes a number that is made anew in each pass")
    return followed


def _recorded(network: nn.Module, mode: bool, make_images: Callable[[], torch.Tensor]) -> Recording:
    # no pass may see what another left in the buffers
    with untouched(network), global_seed(0, "following"), torch.enable_grad():
        network.train(mode)
        return Recorder(network).record(make_images())


def _joined(small: Recording, large: Recording) -> Followed:
    """Join the recordings of two sizes of the batch: what differs between them follows the size. Raises."""
    for one, other in zip(small.steps, large.steps, strict=False):
        if (one.module, one.function, one.outputs) != (other.module, other.function, other.outputs):
            raise UnfollowedError(f"what it calls depends on the size of the batch, at {one.where}")
    if len(small.steps) != len(large.steps) or small.outgoing != large.outgoing:
        raise UnfollowedError("how many calls it makes depends on the size of the batch")
    steps = []
    for number, (one, other) in enumerate(zip(small.steps, large.steps, strict=True)):
        args = _same(one.args, other.args, one)
        kwargs: Mapping[str, Any] = _same(dict(one.kwargs), dict(other.kwargs), one)
        inside = _joined_inside(small.inside[number], large.inside[number])
        steps.append(replace(one, args=args, kwargs=kwargs, inside=inside))
    shapes = tuple(tuple(zip(a, b, strict=True)) for a, b in zip(small.shapes, large.shapes, strict=True))
    return Followed(tuple(steps), small.outgoing, shapes, small.floats)


def _joined_inside(small: Recording | None, large: Recording | None) -> Followed | None:
    if small is None or large is None:
        return None
    try:
        return _joined(small, large)
    except UnfollowedError:
        return None


def _same(one: Any, other: Any, step: Step) -> Any:
    """Return an argument of a step in terms that hold for any size of the batch. Raises UnfollowedError."""
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        items = [_same(a, b, step) for a, b in zip(one, other, strict=True)]
        return items if isinstance(one, list) else type(one)(*items) if hasattr(one, "_fields") else tuple(items)
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return {key: _same(one[key], other[key], step) for key in one}
    if isinstance(one, slice) and isinstance(other, slice):
        return slice(*(_same(getattr(one, p), getattr(other, p), step) for p in ("start", "stop", "step")))
    if one is other or isinstance(one, ImagesDevice):
        return one
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other):
            return one
    elif type(one) is type(other) and isinstance(one, int | float) and not isinstance(one, bool) and one != other:
        return _of_batch(one, other)
    else:
        try:
            if bool(one == other):
                return one
        except Exception:  # what has no comparison is not the same
            pass
    raise UnfollowedError(f"an argument of {step.label} at {step.where} is made outside of torch, or anew in each pass")


def _of_batch(one: float, other: float) -> OfBatch:
    """Return the straight line in the size of the batch, or in one over it, through two numbers."""
    small, large = BATCH_SIZES
    slope = (other - one) / (large - small)
    if isinstance(one, int):
        return OfBatch(slope, one - small * slope)
    if abs(one * small - other * large) < 1e-9 * abs(one * small):
        return OfBatch(one * small, 0.0, inverse=True)
    return OfBatch(slope, one - small * slope, whole=False)
