"""SmartFreeze: block by block, each frozen when the pace controller sees it converge. [paper]

Ours are `method.start`, by which a new block goes on where its surrogate ended, and `method.window`, by which
neighbouring blocks train together.
"""

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import nn

from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from fedfreeze.methods.base import Method, check_split
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.probing import Shape
from fedfreeze.network.stage import Stage
from fedfreeze.network.start import UnfitError, start_from, why_unfit


class SmartFreeze(Method):
    """Stage t trains blocks t ... t + window - 1 behind frozen blocks 0 ... t - 1 and before an output module.

    When it ends block t is frozen, and after the last stage all are. [paper, with a window of 1; wider ones are ours]
    """

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        check_split(config, blocked)
        self.window = config.method.window
        count = len(blocked.blocks)
        if self.window > count:
            raise ConfigError(
                f"method.window: {self.window} is more than the {count} block{'s' * (count > 1)} of the network; "
                f"use 1 to {count}"
            )
        self.num_stages = count - self.window + 1
        self.stage_names = tuple(_joined(blocked.names[i : i + self.window]) for i in range(self.num_stages))
        self.output_modules = OutputModules(
            blocked, config.method, config.model.norm, config.seed, config.model.memory_format
        )

    def notices(self) -> list[str]:
        """See Method. Which blocks start anew although `method.start` says otherwise."""
        if self.config.method.start == "anew":
            return []
        entering = range(self.window, len(self.blocked.blocks))
        if entering and not len(self.output_modules.surrogates):
            return ["method.start: with method.output_module=pool nothing imitates a block, so all start anew"]
        reasons = {i: why_unfit(*self._start(i)) for i in entering}
        unfit = {self.blocked.names[i]: reason for i, reason in reasons.items() if reason is not None}
        return [f"method.start: {_by_reason(unfit)}"] if unfit else []

    def _start(self, block: int) -> tuple[nn.Module, nn.Module, Shape, float]:
        """Return a block, the surrogate that imitates it, what comes in, and how much of its first values is kept."""
        surrogate, shape = self.output_modules.surrogates[block - 1], self.blocked.shapes[block - 1]
        return self.blocked.blocks[block], surrogate, shape, self.config.method.start_kept

    def begin_stage(self, index: int) -> None:
        """See Method. The block that enters starts from its surrogate, where it can."""
        if index == 0:
            return
        entering = index + self.window - 1
        if self.config.method.start == "surrogate" and len(self.output_modules.surrogates):
            with suppress(UnfitError):  # `notices` has told at the start of the run
                start_from(*self._start(entering))
        self.output_modules.begin_behind(entering)

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        blocks = self.blocked.blocks
        trained = blocks[index : index + self.window]
        active = trained[0] if len(trained) == 1 else nn.Sequential(*trained)
        # the last stage freezes all that it trains
        watched = None if index == self.num_stages - 1 else trained[0]
        output_module = self.output_modules.behind(index + self.window - 1)
        widest = max(self.blocked.widest[:index], default=0)
        return Stage(index, blocks[:index], active, output_module, device, watched, widest)

    def deployed(self, stage: int) -> nn.Module:
        """See Method. Before the last stage: frozen blocks, the active ones and the stage's output module."""
        if stage == self.num_stages - 1:
            return self.blocked.network
        last = stage + self.window - 1
        return nn.Sequential(*self.blocked.blocks[: last + 1], self.output_modules.behind(last))

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {
            "network": self.blocked.network,
            "surrogates": self.output_modules.surrogates,
            "pool_heads": self.output_modules.pool_heads,
        }


def _joined(names: Iterable[str]) -> str:
    """Return what to call neighbouring blocks, by the first and last module in them."""
    parts = [part for name in names for part in name.split("..")]
    return parts[0] if len(parts) == 1 else f"{parts[0]}..{parts[-1]}"


def _by_reason(unfit: dict[str, str]) -> str:
    """Return which blocks start anew and why, those with the same reason together."""
    found: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        found.setdefault(reason, []).append(name)
    told = []
    for reason, names in found.items():
        which = f"block {names[0]} starts" if len(names) == 1 else f"blocks {', '.join(names)} start"
        told.append(f"{which} anew, not from the surrogate: {reason}")
    return "; ".join(told)
