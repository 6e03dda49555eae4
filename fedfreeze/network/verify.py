"""Holds a cut network against the user's own before anything is trained: outputs, gradients, buffers afterwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedfreeze.network.chain import Link
from fedfreeze.network.modes import Block
from fedfreeze.network.program import Region, Step, leaves
from fedfreeze.network.state import Snapshot, same, tensors_by_name, untouched
from fedfreeze.seeds import global_seed, torch_generator

# Batches of random images; a size that following did not see (program.OfBatch), and one that it did.
_BATCHES = (3, 2)
# Gradients are sums, and the cut may add them up in another order.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6


@dataclass(frozen=True)
class _Pass:
    """What a pass in training mode leaves: logits, a gradient for each parameter, the tensors that it changed."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    changed: dict[str, torch.Tensor]


def difference(
    network: nn.Module, chain: Block, links: Sequence[Link], image_shape: tuple[int, int, int]
) -> str | None:
    """Return where a chain of links does not train as the network itself; None where it does.

    Both see the same random images in training mode, from the same weights and the same seed. The network is left as
    it was.
    """
    snapshot = Snapshot(network)
    for number, size in enumerate(_BATCHES):
        images = _images(number, size, image_shape)
        own = _passed(network, network, images, snapshot)
        cut = _passed(network, chain, images, snapshot)
        if not same(own.logits, cut.logits):
            return repeats(network, image_shape) or _first_difference(network, chain, links, images)
        for name, gradient in own.gradients.items():
            if not _close(gradient, cut.gradients[name]):
                return f"the gradient of {name} differs{_users(links, network, name)}"
        apart = _first_apart(own.changed, cut.changed)
        if apart is not None:
            return f"{apart} differs after a training step{_users(links, network, apart)}"
    return None


def repeats(network: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Return why a run of a network could not be repeated; None where nothing speaks against it."""
    snapshot = Snapshot(network)
    images = _images(0, _BATCHES[0], image_shape)
    one, other = (_passed(network, network, images, snapshot, gradients=False) for _ in range(2))
    if not same(one.logits, other.logits) or _first_apart(one.changed, other.changed) is not None:
        return (
            f"two passes of {type(network).__name__} from the same weights and seed differ: it draws random numbers "
            "from elsewhere than torch, or keeps state outside of its buffers"
        )
    return None


def unsaved(network: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Return why the state of a network would be lost where a run is resumed; None where it would not."""
    saved = network.state_dict(keep_vars=True).values()
    images = _images(0, _BATCHES[0], image_shape)
    changed = _passed(network, network, images, Snapshot(network), gradients=False).changed
    for name, buffer in network.named_buffers():
        if name in changed and not any(buffer is other for other in saved):
            return f"its buffer {name} changes in training and is not saved (persistent=False)"
    return None


def _first_apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first name that stands in one of the two only, or for another value."""
    names = sorted({*one, *other})
    return next((n for n in names if n not in one or n not in other or not same(one[n], other[n])), None)


def _images(number: int, size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(size, *image_shape, generator=torch_generator(number, "verify"))


def _passed(
    network: nn.Module, way: nn.Module, images: torch.Tensor, snapshot: Snapshot, gradients: bool = True
) -> _Pass:
    """Run a batch through the network or what stands for it, in training mode."""
    found: dict[str, torch.Tensor | None] = {}
    try:
        with global_seed(0, "verify"), torch.enable_grad():
            way.train(True)
            logits = way(images)
            parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
            if gradients and logits.requires_grad:
                # weights of the logits that differ, so that no two gradients cancel
                weights = torch.rand(logits.shape, generator=torch_generator(0, "verify logits"))
                (logits * weights).sum().backward()
                found = {name: parameter.grad for name, parameter in parameters.items()}
            changed = snapshot.changed(network)
    finally:
        snapshot.restore()
        network.zero_grad(set_to_none=True)
    return _Pass(logits.detach(), found, changed)


def _close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two gradients are the same but for the order of sums, measured by the largest of their elements."""
    if one is None or other is None:
        return one is other or not bool((other if one is None else one).any())  # type: ignore[union-attr]
    if same(one, other):
        return True
    scale = float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0
    return bool(torch.allclose(one, other, rtol=_RELATIVE, atol=_ABSOLUTE + _RELATIVE * scale, equal_nan=True))


def _users(links: Sequence[Link], network: nn.Module, name: str) -> str:
    """Return `(link, file:line)` of what uses a tensor of the network, where it is known."""
    tensor = tensors_by_name(network)[name]
    for link in links:
        if any(tensor is held for held in [*link.module.parameters(), *link.module.buffers()]):
            where = link.module.programs[True].steps[0].where if isinstance(link.module, Region) else None
            return f" ({', '.join(filter(None, [link.name, where]))})" if link.name or where else ""
    return ""


def _first_difference(network: nn.Module, chain: Block, links: Sequence[Link], images: torch.Tensor) -> str:
    """Return the first call after which the two differ."""
    own: list[torch.Tensor] = []
    with untouched(network), global_seed(0, "verify"), torch.no_grad(), _watched(network, own):
        network.train(True)
        network(images)
    number = 0
    with untouched(network), global_seed(0, "verify"), torch.no_grad():
        chain.train(True)
        x = images
        for link in links:
            seen: list[tuple[str, torch.Tensor]] = []
            x = _observed(link, x, seen)
            for label, value in seen:
                match = next((i for i in range(number, len(own)) if same(own[i], value)), None)
                if match is None:
                    return f"what {label} puts out differs from what the forward computes there"
                number = match + 1
    return "the logits differ from those of the forward"


def _observed(link: Link, x: torch.Tensor, seen: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    def observe(step: Step, out: Sequence[Any]) -> None:
        seen.extend((f"{step.label} at {step.where}", value) for value in _copies(out))

    if isinstance(link.module, Region):
        return link.module(x, observe)
    out: torch.Tensor = link.module(x)
    seen.append((str(link.name), out.clone()))
    return out


@contextmanager
def _watched(network: nn.Module, told: list[torch.Tensor]) -> Iterator[None]:
    """Note what every torch function and module of a pass puts out, in order."""

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            told.extend(_copies(out))
            return out

    def tell(module: nn.Module, args: Any, out: Any) -> None:
        told.extend(_copies(out))

    hooks = [module.register_forward_hook(tell) for module in network.modules()]
    try:
        with Watch():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _copies(out: Any) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in leaves(out) if isinstance(leaf, torch.Tensor)]
