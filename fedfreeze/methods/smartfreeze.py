"""SmartFreeze: block by block, each frozen when the pace controller sees it converge. [paper]"""

import torch
from torch import nn

from fedfreeze.config.schema import Config
from fedfreeze.methods.base import Method, check_split
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.stage import Stage


class SmartFreeze(Method):
    """Stage t trains block t behind frozen blocks 0 ... t-1 and before an output module."""

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        check_split(config, blocked)
        self.num_stages = len(blocked.blocks)
        self.stage_names = blocked.names
        self.output_modules = OutputModules(blocked, config.method, config.model.norm, config.seed)

    def begin_stage(self, index: int) -> None:
        """See Method."""
        self.output_modules.begin_stage(index)

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        blocks = self.blocked.blocks
        return Stage(index, blocks[:index], blocks[index], self.output_modules.for_stage(index), device)

    def deployed(self, stage: int) -> nn.Module:
        """See Method. Before the last stage: frozen blocks, the active block and the stage's output module."""
        if stage == self.num_stages - 1:
            return self.blocked.network
        return nn.Sequential(*self.blocked.blocks[: stage + 1], self.output_modules.for_stage(stage))

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {
            "network": self.blocked.network,
            "surrogates": self.output_modules.surrogates,
            "pool_heads": self.output_modules.pool_heads,
        }
