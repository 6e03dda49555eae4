"""DepthFL (Kim, Yu, Kim and Moon, ICLR 2023): sub-models of fewer blocks, whose exits teach each other.

As in the paper: a sub-model is the first blocks of the network, with an exit (a classifier) after each; it is trained
by the sum of all exits' cross-entropies and of mutual distillation, the Kullback-Leibler divergence from each other
exit's prediction (temperature 1, no gradient into the teacher), divided by the number of other exits; each element is
averaged over the devices that hold it; the prediction is the mean of the exits' logits.

Deviations:
- The depth of a device follows from its memory cap; the paper gives each depth to a quarter of the devices.
- Judged and deployed are the depths that at least one device of the fleet holds, not always all.
- The layers of an exit imitate the missing blocks by `method.output_module`, then come pooling and a linear layer; the
  authors' are depthwise separable convolutions with attention. Each exit has layers of its own, as theirs; the last is
  the network's head.
- The weight of distillation is `method.distillation` from the first round on; the authors' code raises it to 1 over 300
  rounds, as exp(-5 (1 - round / 300)^2).
- FedAvg, weighted by `method.weights`; the authors' code counts devices, and by default adds FedDyn.
- Running statistics of batch normalisation are averaged an element like everything else, as in the authors' code.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.schema import Config
from fedfreeze.methods.base import LevelMemory, Method, check_split
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.stage import Stage
from fedfreeze.network.state import copied
from fedfreeze.seeds import global_seed


def exit_logits(
    blocks: Iterable[nn.Module],
    exits: Iterable[nn.Module],
    x: torch.Tensor,
    through: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda part, x: part(x),
) -> list[torch.Tensor]:
    """Map images to the logits (batch, classes) of each exit, the first block's first."""
    logits = []
    for block, head in zip(blocks, exits, strict=True):
        x = through(block, x)
        logits.append(through(head, x))
    return logits


def mean_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over the exits, (batch, classes)."""
    return torch.stack(list(logits)).mean(0)


def depth_loss(logits: Sequence[torch.Tensor], labels: torch.Tensor, distillation: float) -> torch.Tensor:
    """Return the sum of the exits' cross-entropies and of their mutual distillation. [DepthFL, temperature 1]"""
    loss = torch.stack([functional.cross_entropy(each, labels) for each in logits]).sum()
    if len(logits) == 1 or distillation == 0:
        return loss
    predicted = [functional.log_softmax(each, 1) for each in logits]
    for i, student in enumerate(predicted):
        for j, teacher in enumerate(predicted):
            if i != j:
                apart = functional.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)
                loss = loss + distillation / (len(logits) - 1) * apart
    return loss


class EarlyExits(nn.Module):
    """What is deployed: blocks with an exit after each; its logits are the mean of the exits'."""

    def __init__(self, blocks: Sequence[nn.Module], exits: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(exits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, channels, height, width) to logits (batch, classes)."""
        return mean_logits(exit_logits(self.blocks, self.exits, images))


class DepthStage(Stage):
    """Blocks as the active part, their exits as the output module."""

    active: nn.ModuleList
    output_module: nn.ModuleList

    def __init__(
        self, blocks: Sequence[nn.Module], exits: Sequence[nn.Module], distillation: float, device: torch.device
    ):
        super().__init__(0, [], nn.ModuleList(blocks), nn.ModuleList(exits), device)
        self.distillation = distillation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See Stage. The mean of the exits' logits."""
        return mean_logits(exit_logits(self.active, self.output_module, images))

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Stage."""
        logits = exit_logits(self.active, self.output_module, images, self.through)
        return depth_loss(logits, labels, self.distillation), mean_logits(logits)


class DepthFL(Method):
    """Each device trains the first blocks and their exits, as many as its cap holds."""

    paced = False
    counted = True
    num_stages = 1

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        check_split(config, blocked)
        self.stage_names = ("by depth",)
        modules = OutputModules(blocked, config.method, config.model.norm, config.seed, config.model.memory_format)
        self.exits = [self._exit(modules, i) for i in range(len(blocked.blocks) - 1)]
        self.exits.append(nn.Sequential(blocked.head))

    def _exit(self, modules: OutputModules, index: int) -> nn.Module:
        """Return what follows a block, with values of its own."""
        made = copied([modules.behind(index)])[0]
        with global_seed(self.config.seed, "exit", index):
            for module in made.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return made

    @classmethod
    def fit(cls, config: Config, caps: Sequence[int | None], level_memory: LevelMemory) -> dict[str, Any]:
        """See Method. Returns `depth`, the most blocks that a device holds, at least 1; nothing without caps."""
        limits = [cap for cap in caps if cap is not None]
        if len(limits) < len(caps):
            return {}
        return {"depth": max(1, sum(needed <= max(limits) for needed in level_memory(config.model)))}

    @property
    def depth(self) -> int:
        """How many blocks the global network has."""
        depth: int = self.fitted.get("depth", len(self.blocked.blocks))
        return depth

    def begin_stage(self, index: int) -> None:
        """See Method. There is one stage and nothing to carry over."""

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        depth = self.depth
        return DepthStage(self.blocked.blocks[:depth], self.exits[:depth], self.config.method.distillation, device)

    def num_levels(self, index: int) -> int:
        """See Method."""
        return self.depth

    def level_name(self, index: int, level: int) -> str:
        """See Method."""
        return f"{level + 1} of {len(self.blocked.blocks)} blocks"

    def enter_level(self, index: int, level: int, device: torch.device) -> Stage:
        """See Method."""
        depth = level + 1
        parts = copied([*self.blocked.blocks[:depth], *self.exits[:depth]])
        return DepthStage(parts[:depth], parts[depth:], self.config.method.distillation, device)

    def part_index(self, stage: Stage, part: Stage, round_number: int, labels: torch.Tensor) -> torch.Tensor:
        """See Method."""
        whole = {slot.path: slot for slot in stage.flat.slots}
        index = torch.full((len(part.flat),), -1)
        for slot in part.flat.slots:
            index[slot.begin : slot.end] = torch.arange(whole[slot.path].begin, whole[slot.path].end)
        return index

    def deployed(self, stage: int) -> nn.Module:
        """See Method."""
        return EarlyExits(self.blocked.blocks[: self.depth], self.exits[: self.depth])

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {"network": self.blocked.network, "exits": nn.ModuleList(self.exits[:-1])}
