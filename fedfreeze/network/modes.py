"""Training and evaluation mode of a network that is cut, as its own `train()` sets them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fedfreeze.errors import ConfigError
from fedfreeze.network.state import untouched

# For each module of which a network's own `train()` makes something else than the mode: what it makes of each mode.
Exceptions = Mapping[nn.Module, Mapping[bool, bool]]


class Block(nn.Sequential):
    """Modules that run in order, in the modes that the network's own `train()` gives them.

    A network may keep some of its modules in evaluation mode while it trains; its `train()` is not called where only a
    part of it trains, so what it does is noted once and repeated.
    """

    def __init__(self, *modules: Any, exceptions: Exceptions):
        super().__init__(*modules)
        inside = set(self.modules())
        self._exceptions = [(module, dict(modes)) for module, modes in exceptions.items() if module in inside]

    def train(self, mode: bool = True) -> "Block":
        """Set the mode of each module inside."""
        super().train(mode)
        for module, modes in self._exceptions:
            module.training = modes[mode]
        return self


def exceptions_of(network: nn.Module, standing_for: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, dict[bool, bool]]:
    """Return which modules of a network do not follow `train(mode)`.

    `standing_for`: modules that take the mode of one of the network's, for they do what its forward does. Raises
    ConfigError for a normalisation layer that `eval()` leaves in training, as its statistics would move in a frozen
    block.
    """
    if not any(_has_own_modes(module) for module in network.modules()):
        return {}
    found: dict[nn.Module, dict[bool, bool]] = {}
    for mode in (True, False):
        with untouched(network):
            network.train(mode)
            taken = {module: module.training for module in network.modules()}
        for module, own in taken.items():
            found.setdefault(module, {})[mode] = own
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and found[module][False]:
            raise ConfigError(
                f"model.factory: eval() of {type(network).__name__} leaves {name} in training mode, so the statistics "
                "of a frozen block would move; let its train() follow the mode where that is False"
            )
    found |= {module: found[owner] for module, owner in standing_for.items()}
    return {module: modes for module, modes in found.items() if modes != {True: True, False: False}}


def _has_own_modes(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval or "train" in own or "eval" in own
