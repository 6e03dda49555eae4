"""The trainable part of a stage as views of one flat buffer."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Slot:
    """One tensor of the part: where it lives, and its place in the flat buffer."""

    path: str
    """Its full name: `active.` or `output_module.`, then as the module's state_dict says it."""
    owner: nn.Module
    name: str
    shape: torch.Size
    begin: int
    end: int


class FlatPart:
    """Parameters and running statistics of a stage's active block and output module, re-pointed into `buffer`.

    Layout: parameters of the active block, parameters of the output module, then the float running statistics of both.
    So `buffer[:active_parameters]` is what the pace controller watches, `buffer[:parameters]` is what SGD trains, and
    the whole buffer is what one all-reduce carries. Whole-number buffers (counts of batches) are not averaged: `load`
    puts them back to what they were, so that they do not depend on which rank trained.
    """

    def __init__(self, active: nn.Module, output_module: nn.Module, device: torch.device):
        self.slots: list[Slot] = []
        self._counters: list[tuple[torch.Tensor, torch.Tensor]] = []
        tensors: list[torch.Tensor] = []
        end = 0
        for attribute in ("_parameters", "_buffers"):
            for prefix, part in (("active", active), ("output_module", output_module)):
                for owner_path, owner in part.named_modules(prefix=prefix):
                    for name, tensor in getattr(owner, attribute).items():
                        if tensor is None:
                            continue
                        if not tensor.is_floating_point():
                            self._counters.append((tensor, tensor.clone()))
                            continue
                        path = f"{owner_path}.{name}"
                        self.slots.append(Slot(path, owner, name, tensor.shape, end, end + tensor.numel()))
                        tensors.append(tensor.detach())
                        end += tensor.numel()
                if attribute == "_parameters" and part is active:
                    self.active_parameters = end
            if attribute == "_parameters":
                self.parameters = end
        self.buffer = torch.cat([t.reshape(-1).to(device=device, dtype=torch.float32) for t in tensors])
        self._point_into(self.buffer)

    def _point_into(self, buffer: torch.Tensor) -> None:
        for slot in self.slots:
            view = buffer[slot.begin : slot.end].view(slot.shape)
            if slot.name in slot.owner._parameters:
                parameter = slot.owner._parameters[slot.name]
                assert parameter is not None
                parameter.data = view
                parameter.grad = None
                parameter.requires_grad_(True)
            else:
                slot.owner._buffers[slot.name] = view

    def __len__(self) -> int:
        return self.buffer.numel()

    def load(self, values: torch.Tensor) -> None:
        """Overwrite the part in place with `values` (flat, float32), and the counters with their first values."""
        self.buffer.copy_(values)
        for counter, first in self._counters:
            counter.copy_(first)

    def views(self, flat: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        """Return, for each parameter, its slice of a flat tensor of `parameters` elements, in its shape."""
        found: dict[nn.Parameter, torch.Tensor] = {}
        for slot in self.slots:
            parameter = slot.owner._parameters.get(slot.name)
            if parameter is not None:
                found[parameter] = flat[slot.begin : slot.end].view(slot.shape)
        return found

    def release(self) -> None:
        """Give every tensor storage of its own again, so that a frozen block does not keep the flat buffer alive."""
        for slot in self.slots:
            own = self.buffer[slot.begin : slot.end].view(slot.shape).clone()
            parameter = slot.owner._parameters.get(slot.name)
            if parameter is not None:
                parameter.data = own
                parameter.grad = None
            else:
                slot.owner._buffers[slot.name] = own
