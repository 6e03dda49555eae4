"""FeDepth (Zhang, Dai, Wang, Xing, Chen and Sun, 2023, arXiv 2303.04887): the whole model, piece by piece in a round.

As in the paper and the authors' code: a device cuts the full model by its memory into pieces of consecutive blocks,
each grown by the next block as long as the cap holds it, and trains them one after the other within a round, each with
as many steps. While a piece trains, those before it run frozen and without gradients, those behind it are left out; a
skip connection without weights (pixels by a stride, zeros for the missing channels on both sides) leads to the head,
which trains along in every piece. Blocks that a device cannot hold by themselves it does not train (partial training).
The whole network is deployed.

Deviations:
- Memory is that of the training step, by the cost model; the authors' code fixes four budgets of ResNet-20 by hand. Of
  the cuts with as few pieces as a cap allows, the one whose largest piece is smallest is taken.
- The finest pieces are the blocks of `model.split`; the authors' are residual blocks.
- Blocks that a device does not train run frozen if a piece behind them trains. The authors' code leaves them out of its
  forward pass, which a residual network bears, and trains the layer before them.
- Frozen pieces normalise by running statistics; the authors' networks keep none, and normalise over the batch also in
  evaluation. Their networks have a normalisation before the classifier; where ours have none, none is added.
- Momentum starts at zero with each piece, so that a device holds that of one piece alone; the authors' optimiser goes
  on.
- Each element is averaged over the devices that trained it; the authors' code averages all elements of all devices,
  also those that a device left as they were.
- The training loss is the mean over all pieces; the authors report the last one's.
- Without the paper's mutual distillation for devices that could hold more than one model (M-FeDepth).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from fedfreeze.methods.base import LevelMemory, Method, check_split
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.network.piecewise import Piece, PiecewiseStage, whole_parts
from fedfreeze.network.skip import skip_behind
from fedfreeze.network.stage import Stage, WholeStage
from fedfreeze.network.state import copied

Level = tuple[Piece, ...]
"""The pieces that a device trains, in order."""


def runs_of(blocks: int) -> list[Piece]:
    """Return all runs of neighbouring blocks, (first, behind the last), in order."""
    return [(begin, end) for begin in range(blocks) for end in range(begin + 1, blocks + 1)]


def pieces_under(cap_bytes: int, needed: dict[Piece, int], blocks: int) -> Level:
    """Return the pieces into which a cap cuts some blocks: each goes on as long as the cap holds it. [paper]

    `needed`: bytes of a training step of each run. A block that the cap does not hold by itself is in none.
    """
    found: list[Piece] = []
    begin = 0
    while begin < blocks:
        end = begin
        while end < blocks and needed[begin, end + 1] <= cap_bytes:
            end += 1
        if end > begin:
            found.append((begin, end))
        begin = max(end, begin + 1)
    return tuple(found)


def levels_of(needed: dict[Piece, int], blocks: int) -> list[Level]:
    """Return the cuts worth having, the one that needs least memory first: each needs more than those before it.

    And it trains more blocks than they do, or as many in fewer pieces. [ours: of all that caps can lead to]
    """
    found: list[Level] = []
    for cap_bytes in sorted(set(needed.values())):
        level = pieces_under(cap_bytes, needed, blocks)
        if level and (not found or _worth(level) > _worth(found[-1])):
            found.append(level)
    return found


def _worth(level: Level) -> tuple[int, int]:
    return sum(end - begin for begin, end in level), -len(level)


class FeDepth(Method):
    """Each device trains the whole model, or what it can of it, in as few pieces as its cap allows."""

    paced = False
    counted = True
    num_stages = 1

    def __init__(self, config: Config, blocked: BlockedNetwork):
        super().__init__(config, blocked)
        check_split(config, blocked)
        if config.train.prefix == "stored":
            raise ConfigError(
                "train.prefix: stored is of no use to fedepth, whose frozen pieces have trained in the same round; use "
                "train.prefix=recomputed"
            )
        if config.fleet.accounting == "cuda_segments":
            raise ConfigError(
                "fleet.accounting: cuda_segments follows one stage a round, and a device of fedepth trains piece by "
                "piece; use fleet.accounting=tensor_bytes"
            )
        self.stage_names = ("by pieces",)
        self.skips = [skip_behind(shape, blocked.shapes[-1]) for shape in blocked.shapes]

    @classmethod
    def fit(cls, config: Config, caps: Sequence[int | None], level_memory: LevelMemory) -> dict[str, Any]:
        """See Method. Returns `levels`, each a list of its pieces; an empty list, the whole in one, without any cap."""
        if all(cap is None for cap in caps):
            return {"levels": []}
        memory = level_memory(config.model)  # of the runs, which are the levels as long as nothing is fitted
        blocks = next(count for count in range(1, len(memory) + 1) if len(runs_of(count)) == len(memory))
        needed = dict(zip(runs_of(blocks), memory, strict=True))
        return {"levels": [[list(piece) for piece in level] for level in levels_of(needed, blocks)]}

    @property
    def levels(self) -> list[Level]:
        """What devices train, the smallest first; before anything is fitted, each run of blocks by itself."""
        blocks = len(self.blocked.blocks)
        if "levels" not in self.fitted:
            return [(run,) for run in runs_of(blocks)]
        fitted = self.fitted["levels"] or [[[0, blocks]]]
        return [tuple((begin, end) for begin, end in level) for level in fitted]

    def begin_stage(self, index: int) -> None:
        """See Method. There is one stage and nothing to carry over."""

    def enter_stage(self, index: int, device: torch.device) -> Stage:
        """See Method."""
        active, output_module = whole_parts(self.blocked.blocks, self.blocked.head)
        return WholeStage(self.blocked.network, active, output_module, device)

    def num_levels(self, index: int) -> int:
        """See Method."""
        return len(self.levels)

    def level_name(self, index: int, level: int) -> str:
        """See Method. Example: `1-2 then 3 of 3 blocks`."""
        runs = [f"{begin + 1}-{end}" if end > begin + 1 else f"{end}" for begin, end in self.levels[level]]
        return f"{' then '.join(runs)} of {len(self.blocked.blocks)} blocks"

    def enter_level(self, index: int, level: int, device: torch.device) -> Stage:
        """See Method."""
        pieces = self.levels[level]
        *blocks, head = copied([*self.blocked.blocks[: pieces[-1][1]], self.blocked.head])
        return PiecewiseStage(blocks, head, pieces, self.skips, device, self.blocked.widest)

    def part_index(self, stage: Stage, part: Stage, round_number: int, labels: torch.Tensor) -> torch.Tensor:
        """See Method."""
        whole = {slot.path: slot for slot in stage.flat.slots}
        index = torch.full((len(part.flat),), -1)
        for slot in part.flat.slots:
            index[slot.begin : slot.end] = torch.arange(whole[slot.path].begin, whole[slot.path].end)
        return index

    def deployed(self, stage: int) -> nn.Module:
        """See Method."""
        return self.blocked.network

    def state_modules(self) -> dict[str, nn.Module]:
        """See Method."""
        return {"network": self.blocked.network}
