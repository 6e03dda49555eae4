"""ProgFed (Wang, Stich, He and Fritz, ICML 2022): the network grows block by block; and its layerwise mode.

As in the paper: stage t trains blocks 0 to t and a head of pooling and a linear layer, which is dropped when the
network grows; the last stage trains the whole network with its own head. In layerwise mode only the newest block and
the head train.

Deviations:
- Each stage gets an equal share of `train.rounds`. Some of the authors' settings do that too (ResNet-18 on CIFAR-10:
  500 of 2,000 rounds a stage), others leave more for the last (EMNIST: 250 of 1,500 a stage).
- No warm-up of the new block and head when the network grows. It is an option in the authors' code, which some of their
  settings use (EMNIST: 5 rounds) and others do not (ResNet-18 on CIFAR-10).
- Layerwise: the frozen blocks run in eval mode, and the newest block is judged by a head of its own. In the authors'
  code for ResNets its output goes through the later blocks, untrained, to the network's own head.
- Only devices whose cap holds a stage take part in it; the last stage of `progfed` is the whole model.
"""

from dataclasses import replace

import torch
from torch import nn

from fedfreeze.config.schema import Config
from fedfreeze.methods.base import Method, check_split
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.stage import Stage


class ProgFed(Method):
    """Stage t trains blocks 0 to t behind one another, and a head."""

    paced = False

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        check_split(config, blocked)
        self.num_stages = len(blocked.blocks)
        self.stage_names = self._names()
        pool = replace(config.method, output_module="pool")
        self.heads = OutputModules(blocked, pool, config.model.norm, config.seed, config.model.memory_format)

    def _names(self) -> tuple[str, ...]:
        names = self.blocked.names
        first = names[0].split("..")[0]
        return (names[0], *(f"{first}..{name.split('..')[-1]}" for name in names[1:]))

    def begin_stage(self, index: int) -> None:
        """See Method. A stage's head is its own, as it was built; the blocks go on from where they are."""

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        active = nn.Sequential(*self.blocked.blocks[: index + 1])
        return Stage(index, [], active, self.heads.behind(index), device)

    def deployed(self, stage: int) -> nn.Module:
        """See Method. Before the last stage: the blocks so far and the stage's head."""
        if stage == self.num_stages - 1:
            return self.blocked.network
        return nn.Sequential(*self.blocked.blocks[: stage + 1], self.heads.behind(stage))

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {"network": self.blocked.network, "heads": self.heads.pool_heads}


class ProgFedLayerwise(ProgFed):
    """Stage t trains block t behind frozen blocks 0 to t - 1, and a head."""

    def _names(self) -> tuple[str, ...]:
        return self.blocked.names

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        blocks = self.blocked.blocks
        widest = max(self.blocked.widest[:index], default=0)
        return Stage(index, blocks[:index], blocks[index], self.heads.behind(index), device, widest_frozen=widest)
