"""What a network holds, noted, compared and put back: values of its tensors, modes of its modules."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


class KeptTensors:
    """The tensors in some modules' tables, and their values, as they are now."""

    def __init__(self, modules: Iterable[nn.Module], tables: tuple[str, ...] = ("_parameters", "_buffers")):
        found: list[dict[str, Any]] = [getattr(module, name) for module in modules for name in tables]
        self._tables = [(table, dict(table)) for table in found]
        tensors = {id(tensor): tensor for table in found for tensor in table.values() if tensor is not None}
        self.values = {key: (tensor, tensor.detach().clone()) for key, tensor in tensors.items()}
        """By the tensor's id: the tensor, and a copy of it."""

    def put_back(self) -> None:
        """Let the modules hold the same tensors with the same values again."""
        for table, before in self._tables:
            table.update(before)
        for tensor, value in self.values.values():
            tensor.data.copy_(value)  # past autograd's check for changes: no pass goes on that has read it


class Snapshot:
    """All that a network holds: tensors, its modules' modes, which parameters need gradients."""

    def __init__(self, network: nn.Module):
        self._modes = [(module, module.training) for module in network.modules()]
        has_values = not any(isinstance(parameter, FakeTensor) for parameter in network.parameters())
        self._kept = KeptTensors(network.modules() if has_values else ())
        self._before = {name: self._kept.values[id(t)][1] for name, t in tensors_by_name(network).items() if has_values}
        self._needs = [(parameter, parameter.requires_grad) for parameter in network.parameters()]

    def changed(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """Return a copy of each tensor of the network that has another value now."""
        now = tensors_by_name(network)
        return {name: now[name].detach().clone() for name, value in self._before.items() if not same(now[name], value)}

    def restore(self) -> None:
        """Put everything back."""
        for module, mode in self._modes:
            module.training = mode
        self._kept.put_back()
        for parameter, need in self._needs:
            parameter.requires_grad_(need)


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Put a network back to what it was, whatever is done with it inside."""
    snapshot = Snapshot(network)
    try:
        yield
    finally:
        snapshot.restore()


def tensors_by_name(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name; one that has several by its first."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, but for what is not a number."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num()))


def copied(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return modules with tensors of their own; what the modules share stays shared among the copies.

    Tensors are copied one by one: copy.deepcopy would copy the whole flat buffer for a view of it, and fails on fake
    tensors.
    """
    memo: dict[int, Any] = {}
    for module in modules:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach().clone()
    return copy.deepcopy(list(modules), memo)
