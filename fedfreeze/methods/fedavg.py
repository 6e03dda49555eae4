"""FedAvg (McMahan et al., 2017): every device trains the whole model, in one stage."""

import torch
from torch import nn

from fedfreeze.config.schema import Config
from fedfreeze.methods.base import Method
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.stage import Stage, WholeStage


def full_model_stage(blocked: BlockedNetwork, device: torch.device) -> Stage:
    """Return the whole model as one stage, cut or not: all blocks active, the head as output module."""
    return WholeStage(blocked.network, nn.Sequential(*blocked.blocks), blocked.head, device)


class FedAvg(Method):
    """The whole model at once, under the same caps; with `fleet.enforce=false`, the ideal without memory limits."""

    paced = False
    num_stages = 1

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        self.stage_names = ("full model",)

    def begin_stage(self, index: int) -> None:
        """See Method. There is one stage and nothing to carry over."""

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        return full_model_stage(self.blocked, device)

    def deployed(self, stage: int) -> nn.Module:
        """See Method."""
        return self.blocked.network

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {"network": self.blocked.network}
