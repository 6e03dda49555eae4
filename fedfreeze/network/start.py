"""A new block that starts as the surrogate that imitated it, so that the network goes on where it was. [ours]

The idea is Net2Net's (Chen, Goodfellow and Shlens, ICLR 2016): a layer more that at first changes nothing. The block's
first layer and normalisation take the surrogate's values; each later layer begins as the identity plus a share of its
first values, and the normalisation behind it undoes itself; residual branches begin silent.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from fedfreeze.errors import one_line
from fedfreeze.network.pieces import (
    BatchNorm,
    Encoder,
    Flat,
    Layer,
    Norm,
    Piece,
    Pool,
    Residual,
    Tokens,
    UnfitError,
    Unit,
    pieces_of,
)
from fedfreeze.network.probing import Shape
from fedfreeze.network.state import untouched
from fedfreeze.seeds import global_seed, torch_generator

__all__ = ["UnfitError", "rectified_moments", "start_from", "why_unfit"]

# A tensor of the block, and what it starts from.
Setting = tuple[torch.Tensor, torch.Tensor]
# Of what leaves an activation: mean and variance of each channel.
Moments = tuple[torch.Tensor, torch.Tensor]

# A module of the user's own that is taken for a residual block or an encoder layer by the names in it must do what the
# surrogate does, but for this share of how far that is from its mean. Group normalisation does not undo itself exactly.
_FOREIGN_DIFFERENCE = 0.5


def start_from(block: nn.Module, surrogate: nn.Module, shape: Shape, kept: float) -> None:
    """Give a block the values with which it does what its surrogate does; `shape`: what comes in, for one image.

    `kept`: the share of its first values that each later layer keeps beside the identity, in [0, 1]; with 0 nothing
    changes but by pooling, group normalisation, and activations that are not ReLU. Raises UnfitError, and changes
    nothing, for a block that cannot.
    """
    _start(block, surrogate, shape, kept)


def why_unfit(block: nn.Module, surrogate: nn.Module, shape: Shape, kept: float) -> str | None:
    """Return why a block cannot start from its surrogate; None: it can. It is tried, and left as it was."""
    try:
        before = _start(block, surrogate, shape, kept)
    except UnfitError as error:
        return str(error)
    _apply(before)
    return None


@torch.no_grad()
def _start(block: nn.Module, surrogate: nn.Module, shape: Shape, kept: float) -> list[Setting]:
    """Do it, and return what takes it back. Raises UnfitError."""
    before: list[Setting] = []
    try:
        with untouched(block), untouched(surrogate), global_seed(0, "start"):
            found, foreign = pieces_of(block, shape)
            model = _pieces_of_surrogate(surrogate, shape)
        settings = _settings(found, model, kept)
        _check_settable(block, settings)
        before = [(tensor, tensor.clone()) for tensor, _ in settings]
        _apply(settings)
        if foreign and not _agree(block, surrogate, shape):
            raise UnfitError("it does something else than its parts' names tell")
    except Exception as error:  # also what modules of the user's own make of random values
        _apply(before)
        if isinstance(error, UnfitError):
            raise
        raise UnfitError(f"it cannot be tried with random values: {one_line(error)}") from None
    return before


def _pieces_of_surrogate(surrogate: nn.Module, shape: Shape) -> list[Piece]:
    try:
        return pieces_of(surrogate, shape)[0]
    except UnfitError:
        raise UnfitError("it puts out a size that no stride gives, so its surrogate pools") from None


def _check_settable(block: nn.Module, settings: Sequence[Setting]) -> None:
    """Raise UnfitError where a value is not the block's to choose.

    It may be calculated from others (weight normalisation), the user froze it, or two layers share it.
    """
    tensors = [tensor for tensor, _ in settings]
    own = {id(tensor) for tensor in [*block.parameters(), *block.buffers()]}
    if not all(id(tensor) in own for tensor in tensors):
        raise UnfitError("its weights are calculated from others")
    if any(isinstance(tensor, nn.Parameter) and not tensor.requires_grad for tensor in tensors):
        raise UnfitError("it has weights that do not train")
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise UnfitError("two of its layers share their weights")


@torch.no_grad()
def _apply(settings: Sequence[Setting]) -> None:
    for tensor, value in settings:
        tensor.copy_(value)


def _agree(block: nn.Module, surrogate: nn.Module, shape: Shape) -> bool:
    """Whether the two put out about the same, in eval mode, for random images that a ReLU has passed."""
    with untouched(block), untouched(surrogate):
        block.eval()
        surrogate.eval()
        images = torch.randn(8, *shape, generator=torch_generator(0, "start")).relu()
        wanted = surrogate(images)
        apart = (block(images.clone()) - wanted).abs().mean()
        return bool(apart <= _FOREIGN_DIFFERENCE * (wanted - wanted.mean()).abs().mean())


def rectified_moments(weight: torch.Tensor, bias: torch.Tensor) -> Moments:
    """Return mean and variance of relu(weight * z + bias) for a standard normal z, elementwise."""
    spread = weight.abs().clamp(min=1e-6)
    ratio = bias / spread
    density = torch.exp(-ratio * ratio / 2) / math.sqrt(2 * math.pi)
    share = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    mean = bias * share + spread * density
    second = (bias * bias + spread * spread) * share + bias * spread * density
    return mean, (second - mean * mean).clamp(min=1e-6)


def _settings(block: Sequence[Piece], surrogate: Sequence[Piece], kept: float) -> list[Setting]:
    """Return what to set so that the first piece with weights is the surrogate, and those after it change nothing."""
    model = [piece for piece in surrogate if not isinstance(piece, Pool | Flat)]
    if len(model) != 1:
        raise UnfitError("its surrogate is no single layer")
    lead = next((i for i, piece in enumerate(block) if not isinstance(piece, Pool | Flat)), len(block))
    flat = [piece for piece in block[:lead] if isinstance(piece, Flat)]
    rest = block[lead:]
    if not rest or (lead and not flat):
        raise UnfitError("it begins with pooling")
    pixels = flat[0].pixels if flat else 1
    settings, moments = _imitating(rest[0], model[0], pixels, kept)
    for piece in rest[1:]:
        if isinstance(piece, Pool | Flat):
            moments = None  # what is pooled has other moments
        elif isinstance(piece, Unit):
            settings += _identity(piece, moments, kept)
        elif isinstance(piece, Residual | Encoder):
            settings += _silent(piece)
    return settings


def _imitating(piece: Piece, model: Piece, pixels: int, kept: float) -> tuple[list[Setting], Moments | None]:
    """Return what makes a piece the surrogate, and the moments of what it puts out, where they are known."""
    if isinstance(piece, Residual) and isinstance(model, Residual):
        return _copied(piece.module, model.module), None
    if isinstance(piece, Encoder) and isinstance(model, Encoder):
        return _copied(piece.module, model.module), None
    if isinstance(piece, Encoder) and isinstance(model, Tokens):
        return _perceptron(piece, model, kept), None
    if isinstance(piece, Unit) and isinstance(model, Unit):
        return _unit(piece, model, pixels)
    if isinstance(piece, Residual) and isinstance(model, Unit):
        if not model.activated:
            raise UnfitError("it ends with an activation that its surrogate lacks")
        if not piece.shortcut_norms:
            raise UnfitError("its shortcut cannot be silenced: it hands on what comes in")
        settings, moments = _unit(piece.first, model, pixels)
        settings += _identity(piece.second, moments, kept)
        settings += [setting for norm in piece.shortcut_norms for setting in _zeroed(norm)]
        return settings, moments
    raise UnfitError("its first layer is of another kind than its surrogate")


def _copied(module: nn.Module, model: nn.Module) -> list[Setting]:
    ours, theirs = module.state_dict(keep_vars=True), model.state_dict()
    if {name: tensor.shape for name, tensor in ours.items()} != {name: each.shape for name, each in theirs.items()}:
        raise UnfitError("its first layer has other shapes than its surrogate")
    return [(ours[name], theirs[name]) for name in ours]


def _unit(unit: Unit, model: Unit, pixels: int) -> tuple[list[Setting], Moments | None]:
    """Let a layer with what follows it do what the surrogate's does."""
    if unit.activated != model.activated:
        raise UnfitError("one of it and its surrogate has an activation, the other not")
    weight, bias = model.layer.weight, model.layer.bias
    if bias is None:
        bias = weight.new_zeros(len(weight))
    moments = None
    settings: list[Setting] = []
    _check_layer(unit.layer, model.layer, pixels)
    if model.norm is not None and unit.norm is not None:
        settings += _same_norm(unit.norm, model.norm)
        moments = rectified_moments(*_affine(model.norm)) if model.activated else None
    elif model.norm is not None:
        if not isinstance(model.norm, BatchNorm) or unit.layer.bias is None:
            raise UnfitError("it has no normalisation that could take its surrogate's, or no bias")
        mean, variance = model.norm.running_mean, model.norm.running_var
        assert mean is not None
        assert variance is not None
        # the surrogate's statistics and scale, as part of the layer
        scale = _affine(model.norm)[0] / torch.sqrt(variance + model.norm.eps)
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = (bias - mean) * scale + _affine(model.norm)[1]
        moments = rectified_moments(*_affine(model.norm)) if model.activated else None
    elif unit.norm is not None:
        raise UnfitError("it has a normalisation that its surrogate lacks")
    settings.append((unit.layer.weight, _widened(weight, unit.layer, pixels)))
    if unit.layer.bias is not None:
        settings.append((unit.layer.bias, bias))
    elif model.layer.bias is not None:
        raise UnfitError("its first layer has no bias, its surrogate's has")
    return settings, moments


def _check_layer(layer: Layer, model: Layer, pixels: int) -> None:
    """Raise UnfitError for a layer that cannot do what the surrogate's does."""
    ours, theirs = layer.weight.shape, model.weight.shape
    linear = isinstance(layer, nn.Linear) and isinstance(model, nn.Linear)
    inputs = theirs[1] * pixels if linear else theirs[1]
    if type(layer) is not type(model) or (ours[0], ours[1]) != (theirs[0], inputs):
        raise UnfitError(f"its first layer has weights of {tuple(ours)}, its surrogate {tuple(theirs)}")
    if isinstance(layer, nn.Conv2d) and isinstance(model, nn.Conv2d):
        if any(size < other for size, other in zip(ours[2:], theirs[2:], strict=True)):
            raise UnfitError("the kernel of its first layer is smaller than its surrogate's")
        if not _is_centred(layer):
            raise UnfitError("the kernel of its first layer is not centred on its pixel")
        if any(step not in (1, other) for step, other in zip(layer.stride, model.stride, strict=True)):
            raise UnfitError("its first layer has another stride than its surrogate")


def _widened(weight: torch.Tensor, layer: Layer, pixels: int) -> torch.Tensor:
    """Return the surrogate's weights in the shape of the layer's: in the middle of a larger kernel, or shared among
    the pixels whose mean the surrogate takes."""
    if isinstance(layer, nn.Linear):
        return weight.repeat_interleave(pixels, dim=1) / pixels
    top, left = ((size - own) // 2 for size, own in zip(layer.weight.shape[2:], weight.shape[2:], strict=True))
    return nn.functional.pad(weight, (left, left, top, top))


def _is_centred(layer: nn.Conv2d) -> bool:
    """Whether a convolution looks at each pixel's surroundings, as much on either side, channel by channel alike."""
    if layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    if layer.padding == "same":
        return layer.dilation == (1, 1) and all(size % 2 == 1 for size in layer.kernel_size)
    sizes = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    return all(size % 2 == 1 and margin == size // 2 and apart == 1 for size, margin, apart in sizes)


def _same_norm(norm: Norm, model: Norm) -> list[Setting]:
    same = type(norm) is type(model) and getattr(norm, "num_groups", None) == getattr(model, "num_groups", None)
    ours, theirs = norm.state_dict(keep_vars=True), model.state_dict()
    if not same or {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        raise UnfitError("its first normalisation is of another kind than its surrogate's (model.norm)")
    return [(ours[name], theirs[name]) for name in ours if ours[name].is_floating_point()]


def _affine(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a normalisation's scale and offset."""
    return norm.weight, norm.bias


def _zeroed(norm: Norm) -> list[Setting]:
    return [(tensor, torch.zeros_like(tensor)) for tensor in _affine(norm)]


def _identity(unit: Unit, moments: Moments | None, kept: float) -> list[Setting]:
    """Let a layer hand on what comes in, plus a share of what it would have made of it, and its normalisation undo
    itself."""
    layer = unit.layer
    first = kept * layer.weight
    if layer.weight.shape[0] != layer.weight.shape[1]:
        raise UnfitError("a later layer changes the number of channels")
    if isinstance(layer, nn.Conv2d):
        if not _is_centred(layer) or any(step != 1 for step in layer.stride):
            raise UnfitError("a later layer cannot hand on what comes in")
        weight = first + nn.init.dirac_(torch.zeros_like(layer.weight))
    else:
        weight = first + torch.eye(len(first), dtype=first.dtype)
    settings: list[Setting] = [(layer.weight, weight)]
    if layer.bias is not None:
        settings.append((layer.bias, kept * layer.bias))
    if unit.norm is not None:
        if moments is None:
            raise UnfitError("a later layer has a normalisation, and nothing tells what it normalises")
        settings += _undone(unit.norm, weight, layer.bias if layer.bias is None else kept * layer.bias, moments)
    return settings


def _undone(norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments) -> list[Setting]:
    """Let a normalisation give back what its layer makes of inputs with these moments, less what is added on average.

    Statistics are those of the layer's sum over its inputs as if they were unrelated.
    """
    mean, variance = moments
    taps = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    sum_mean = taps.sum(2) @ mean
    if bias is not None:
        sum_mean = sum_mean + bias
    sum_variance = taps.square().sum(2) @ variance
    scale, offset = _affine(norm)
    if isinstance(norm, BatchNorm):
        settings = [(scale, torch.sqrt(sum_variance + norm.eps)), (offset, mean)]
        if norm.running_mean is not None and norm.running_var is not None:
            settings += [(norm.running_mean, sum_mean), (norm.running_var, sum_variance)]
        return settings
    grouped = sum_mean.view(norm.num_groups, -1)
    group_mean = grouped.mean(1, keepdim=True)
    second = (sum_variance.view_as(grouped) + grouped.square()).mean(1, keepdim=True)
    group_variance = second - group_mean.square()
    return [
        (scale, torch.sqrt(group_variance + norm.eps).expand_as(grouped).flatten()),
        (offset, group_mean.expand_as(grouped).flatten() - (sum_mean - mean)),
    ]


def _perceptron(layer: Encoder, model: Tokens, kept: float) -> list[Setting]:
    """Let an encoder layer's perceptron do what a surrogate of tokens does, and its attention nothing."""
    expand, contract, theirs = layer.expand, layer.contract, model.linear
    features = theirs.out_features
    if theirs.weight.shape[1] != expand.weight.shape[1] or features > expand.out_features:
        raise UnfitError("its first layer has other shapes than its surrogate")
    rows, bias = expand.weight.clone(), expand.bias.clone()
    rows[:features], bias[:features] = theirs.weight, theirs.bias
    back = kept * contract.weight
    back[:, :features] += torch.eye(features, dtype=back.dtype)
    return [
        *[(getattr(layer.norm, name), getattr(model.norm, name)) for name in ("weight", "bias")],
        (expand.weight, rows),
        (expand.bias, bias),
        (contract.weight, back),
        (contract.bias, kept * contract.bias),
        *_silent_layer(layer.attention),
    ]


def _silent(piece: Residual | Encoder) -> list[Setting]:
    """Let a residual branch add nothing at first."""
    if isinstance(piece, Encoder):
        return [*_silent_layer(piece.contract), *_silent_layer(piece.attention)]
    if piece.projects:
        raise UnfitError("a later residual block changes the shape")
    return _zeroed(piece.second.norm) if piece.second.norm is not None else _silent_layer(piece.second.layer)


def _silent_layer(layer: nn.Module) -> list[Setting]:
    return [(tensor, torch.zeros_like(tensor)) for tensor in layer.parameters()]
