"""What a block is made of: layers with what follows them, residual blocks, encoder layers, pooling."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.network.chain import leaves_in_order
from fedfreeze.network.models.resnet import BasicBlock
from fedfreeze.network.models.vit import EncoderLayer
from fedfreeze.network.output_modules import TokenSurrogate
from fedfreeze.network.probing import Shape
from fedfreeze.network.program import Region

BatchNorm = nn.modules.batchnorm._BatchNorm
Layer = nn.Conv2d | nn.Linear
Norm = BatchNorm | nn.GroupNorm
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)

# An activation counts as a ReLU if over standard normal numbers it differs from it by less, on average: GELU and SiLU
# do, tanh does not.
_NEAR_RELU = 0.2


class UnfitError(Exception):
    """A block that cannot start from its surrogate; the message says why, of "it"."""


@dataclass
class Unit:
    """A layer, the normalisation behind it, if any, and whether a ReLU or the like follows."""

    layer: Layer
    norm: Norm | None = None
    activated: bool = False


@dataclass
class Residual:
    """Two units, the second added to a shortcut, then a ReLU."""

    module: nn.Module
    first: Unit
    second: Unit
    shortcut_norms: list[Norm]
    """Those of the shortcut, which silence it; none: it hands on what comes in."""
    projects: bool
    """Whether the shortcut has weights."""


@dataclass
class Encoder:
    """An encoder layer: attention, then norm, a linear layer, GELU and a second one; both with a shortcut."""

    module: nn.Module
    attention: nn.Linear
    """The last layer of the attention."""
    norm: nn.LayerNorm
    expand: nn.Linear
    contract: nn.Linear


@dataclass
class Tokens:
    """A surrogate of encoder layers: norm, a linear layer and GELU, with a shortcut."""

    norm: nn.LayerNorm
    linear: nn.Linear


@dataclass
class Pool:
    """Fewer pixels or tokens."""


@dataclass
class Flat:
    """Images become vectors, of so many pixels a channel."""

    pixels: int


Piece = Unit | Residual | Encoder | Tokens | Pool | Flat


def pieces_of(block: nn.Module, shape: Shape) -> tuple[list[Piece], bool]:
    """Return the pieces that run, in order, and whether one is of a class not known here, told by its parts' names.

    Random images (2, *shape) go through it in eval mode, to see what modules without weights do. Raises UnfitError for
    a block that holds anything else, such as subclasses of layers, which may do something of their own.
    """
    block.eval()
    found: list[Piece] = []
    # a hook may change what goes in or comes out
    foreign = any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    x = torch.randn(2, *shape)
    for module in leaves_in_order([block]):
        before, x = x, module(x.clone())
        last = found[-1] if found else None
        known = _known(module)
        if known is not None:
            found.append(known)
            foreign |= type(module) not in (BasicBlock, EncoderLayer, TokenSurrogate)
        elif isinstance(module, nn.Conv2d | nn.Linear) and type(module) in (nn.Conv2d, nn.Linear):
            found.append(Unit(module))
        elif type(module) in _NORMS and isinstance(last, Unit) and _is_open(last):
            last.norm = _with_values(module)
            if last.norm is None:
                raise UnfitError(f"a {type(module).__name__} has no weights")
        elif any(True for _ in module.parameters()):
            kind = "several modules that cannot be parted" if isinstance(module, Region) else type(module).__name__
            raise UnfitError(f"its first values cannot be a surrogate's: {kind}")
        else:
            _take_plain(module, found, torch.randn_like(before), x.shape)
    return found, foreign


def _is_open(unit: Unit) -> bool:
    return unit.norm is None and not unit.activated


def _take_plain(module: nn.Module, found: list[Piece], images: torch.Tensor, after: torch.Size) -> None:
    """Note what a module without weights does to images."""
    out = module(images.clone())
    if out.shape == images.shape:
        if torch.equal(out, images):
            return  # dropout, say
        difference = (out - functional.relu(images)).abs().mean()
        if found and isinstance(found[-1], Unit) and not found[-1].activated and difference < _NEAR_RELU:
            found[-1].activated = True
        elif not torch.equal(module(images.abs()), images.abs()):
            raise UnfitError(f"it has a step ({type(module).__name__}) that is no ReLU and no pooling")
        return
    if out.dim() == images.dim() and out.shape[:2] == images.shape[:2]:
        found.append(Pool())
    elif images.dim() == 4 and out.dim() == 2 and torch.equal(out, images.flatten(1)):
        found.append(Flat(images[0, 0].numel()))
    elif images.dim() == 4 and out.dim() == 2 and torch.allclose(out, images.mean((2, 3)), atol=1e-5):
        found += [Pool(), Flat(1)]
    else:
        raise UnfitError(f"it has a step that makes {tuple(after[1:])} of {tuple(images.shape[1:])}")


def _known(module: nn.Module) -> Residual | Encoder | Tokens | None:
    """Return a residual block or an encoder layer, by the names of its parts; None for anything else."""
    if type(module) is TokenSurrogate:
        return Tokens(module.norm, module.linear)
    if type(module) is EncoderLayer:
        return Encoder(module, module.projection, module.norm2, module.expand, module.contract)
    if type(module) is nn.TransformerEncoderLayer:
        if not module.norm_first or not isinstance(module.norm2, nn.LayerNorm):
            raise UnfitError("a TransformerEncoderLayer that normalises last cannot take a surrogate's weights")
        return Encoder(module, module.self_attn.out_proj, module.norm2, module.linear1, module.linear2)
    parts = dict(module.named_children())
    convolutions = [part for part in parts.values() if isinstance(part, nn.Conv2d)]
    first, second = parts.get("conv1"), parts.get("conv2")
    if type(first) is not nn.Conv2d or type(second) is not nn.Conv2d or len(convolutions) != 2:
        return None
    norm1, norm2 = (_with_values(_first_of(parts, f"norm{i}", f"bn{i}", f"gn{i}")) for i in (1, 2))
    if norm1 is None or norm2 is None:
        return None
    shortcut = _first_of(parts, "shortcut", "downsample", "skip")
    layers = [] if shortcut is None else [part for part in shortcut.modules() if any(True for _ in part.parameters())]
    shortcut_norms = [norm for norm in map(_with_values, layers) if norm is not None]
    return Residual(module, Unit(first, norm1, True), Unit(second, norm2, True), shortcut_norms, bool(layers))


def _with_values(module: nn.Module | None) -> Norm | None:
    """Return a normalisation that has a scale and an offset; None: it is something else."""
    if (
        type(module) in _NORMS
        and isinstance(module, BatchNorm | nn.GroupNorm)
        and module.weight is not None
        and module.bias is not None
    ):
        return module
    return None


def _first_of(parts: dict[str, nn.Module], *names: str) -> nn.Module | None:
    return next((parts[name] for name in names if name in parts), None)
