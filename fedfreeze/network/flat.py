"""The trainable part of a stage as views of one flat buffer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedfreeze.network.memory import is_channels_last


def aligned_elements(device: torch.device) -> int:
    """Return of how many elements the place of a tensor in the flat buffer is a multiple.

    Kernels of GPUs read four floats at a time, and fail where a tensor begins in between ("misaligned address").
    """
    return 1 if device.type == "cpu" else 4


@dataclass(frozen=True)
class Slot:
    """One tensor of the part: where it lives, and its place in the flat buffer."""

    path: str
    """Its full name: `active.` or `output_module.`, then as the module's state_dict says it; of several the first."""
    owner: nn.Module
    name: str
    tensor: torch.Tensor
    """The very parameter or buffer; modules that share it share its place."""
    shape: torch.Size
    begin: int
    end: int

    channels_last: bool
    """Whether its elements stand in the order out x height x width x in (memory.py)."""

    @property
    def is_parameter(self) -> bool:
        """Whether it trains; else it is a float buffer, such as a running mean."""
        return isinstance(self.tensor, nn.Parameter)

    def view_of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return its place in a flat tensor, in its shape."""
        piece = flat[self.begin : self.end]
        if not self.channels_last:
            return piece.view(self.shape)
        out, channels, height, width = self.shape
        return piece.view(out, height, width, channels).permute(0, 3, 1, 2)

    def flattened(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of its shape, or of a smaller one, in the order in which its elements stand."""
        return (values.permute(0, 2, 3, 1) if self.channels_last else values).reshape(-1)

    @property
    def strides(self) -> tuple[int, ...]:
        """How far apart neighbours along each dimension stand in the flat buffer."""
        return self.view_of(torch.empty(self.end, device="meta")).stride()


class FlatPart:
    """Parameters and running statistics of a stage's active block and output module, re-pointed into `buffer`.

    Layout: parameters of the active block, parameters of the output module, then the float buffers of both. So
    `buffer[:active_parameters]` is what the pace controller watches, `buffer[:parameters]` is what SGD trains, and the
    whole buffer is what one all-reduce carries. A tensor that several modules share has one place. A parameter that
    does not require gradients has none: it never changes. Whole-number buffers (counts of batches) are not averaged:
    `load` puts them back to what they were, so that they do not depend on which rank trained. The elements of a tensor
    stand as they lie in memory, so those of a convolution's weights may stand channels last. On a GPU a few zeros may
    stand before a tensor, so that it begins where kernels can read it; they belong to no slot and stay zero.
    """

    def __init__(self, active: nn.Module, output_module: nn.Module, device: torch.device):
        self.slots: list[Slot] = []
        self._aligned = aligned_elements(device)
        self._counters: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]] = []
        parts = (("active", active), ("output_module", output_module))
        end = self._place(active, "active", "_parameters", 0)
        self.active_parameters = end
        end = self._place(output_module, "output_module", "_parameters", end)
        self.parameters = end
        for prefix, part in parts:
            end = self._place(part, prefix, "_buffers", end)
        self._statistics = [slot for slot in self.slots if not slot.is_parameter]
        tensors = [torch.zeros(0, device=device)]
        for slot, begin_of_next in zip(self.slots, [*(slot.begin for slot in self.slots[1:]), end], strict=True):
            tensors.append(slot.flattened(slot.tensor.detach()).to(device=device, dtype=torch.float32))
            if begin_of_next > slot.end:
                tensors.append(torch.zeros(begin_of_next - slot.end, device=device))
        self.buffer = torch.cat(tensors)
        for slot in self.slots:
            if slot.tensor.dtype == torch.float32:
                slot.tensor.data = self._view(slot)
            if slot.is_parameter:
                slot.tensor.grad = None

    def _place(self, part: nn.Module, prefix: str, table: str, end: int) -> int:
        """Give each tensor of a part that has none its place from `end` on; return the new end."""
        seen = {id(slot.tensor) for slot in self.slots} | {id(counter) for _, _, counter, _ in self._counters}
        for path, owner, name, tensor in _tensors(part, prefix, table):
            if id(tensor) in seen or (table == "_parameters" and not tensor.requires_grad):
                continue
            seen.add(id(tensor))
            if not tensor.is_floating_point():
                self._counters.append((owner, name, tensor, tensor.clone()))
                continue
            last = is_channels_last(tensor)
            self.slots.append(Slot(path, owner, name, tensor, tensor.shape, end, end + tensor.numel(), last))
            end = self._after(self.slots[-1])
        return end

    def _after(self, slot: Slot) -> int:
        """Return where the next tensor may begin."""
        return -(-slot.end // self._aligned) * self._aligned

    def parameters_of(self, module: nn.Module) -> int:
        """Return how many of its elements are parameters of a module."""
        own = {id(parameter) for parameter in module.parameters()}
        return sum(self._after(slot) - slot.begin for slot in self.slots if id(slot.tensor) in own)

    def without_gaps(self, values: torch.Tensor) -> torch.Tensor:
        """Return the first elements of a flat tensor, which end with a slot, as they are where there are no gaps.

        What is stored is the same then whatever device computes.
        """
        if self._aligned == 1:
            return values
        return torch.cat([values[slot.begin : slot.end] for slot in self.slots if slot.end <= len(values)])

    def _view(self, slot: Slot) -> torch.Tensor:
        return slot.view_of(self.buffer)

    def __len__(self) -> int:
        return self.buffer.numel()

    def load(self, values: torch.Tensor) -> None:
        """Overwrite the part in place with `values` (flat, float32), and the counters with their first values."""
        self.buffer.copy_(values)
        for slot in self._statistics:
            slot.owner._buffers[slot.name] = slot.tensor  # a forward may have put another tensor there
            if slot.tensor.dtype != torch.float32:
                slot.tensor.copy_(self._view(slot))
        for owner, name, counter, first in self._counters:
            owner._buffers[name] = counter
            counter.copy_(first)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Return the flat buffer, with what is not a view of it: buffers that a forward replaced, other precisions."""
        for slot in self._statistics:
            current = slot.owner._buffers[slot.name]
            if current is not None and (current is not slot.tensor or current.dtype != torch.float32):
                self._view(slot).copy_(current)
        return self.buffer

    def views(self, flat: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        """Return, for each parameter, its slice of a flat tensor of `parameters` elements, in its shape."""
        return {slot.tensor: slot.view_of(flat) for slot in self.slots if isinstance(slot.tensor, nn.Parameter)}

    def release(self) -> None:
        """Give every tensor storage of its own again, so that a frozen block does not keep the flat buffer alive."""
        self.values()
        for slot in self.slots:
            if slot.is_parameter:
                slot.tensor.grad = None
            else:
                slot.owner._buffers[slot.name] = slot.tensor
            own = self._view(slot).clone()
            if slot.tensor.dtype == torch.float32:
                slot.tensor.data = own
            else:
                slot.tensor.copy_(own)


def _tensors(part: nn.Module, prefix: str, table: str) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Yield path, owner, name and tensor of everything in one of the tables of a part's modules."""
    for owner_path, owner in part.named_modules(prefix=prefix):
        for name, tensor in getattr(owner, table).items():
            if tensor is not None:
                yield f"{owner_path}.{name}", owner, name, tensor


def named_once(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state_dict in which a tensor that has several names stands once, under its first."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def load_named_once(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `named_once` returned; it must name every tensor. Raises RuntimeError, as load_state_dict does."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    every = {other: tensors[same[0]] for same in names.values() if same[0] in tensors for other in same}
    module.load_state_dict({**tensors, **every})
