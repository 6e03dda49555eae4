"""HeteroFL (Diao, Ding and Tarokh, ICLR 2021): nested sub-models of fewer channels.

As in the paper: a sub-model has the first channels of each layer; each element is averaged over the devices that hold
it; static batch normalisation; a scaler behind each layer in training; masked cross-entropy, and classifier rows of
absent labels are not averaged. The default shares are the paper's levels a to e.

Deviations:
- The level of a device follows from its memory cap; the paper draws it, or gives it, by a share of the devices.
- The global network is the largest share that any device of the fleet holds: nobody would train wider channels.
- A level's width is rounded up once, at the first block; the authors' code rounds up each layer. Where a share times
  the width is not whole, sizes can differ, and the scaler is the inverse of the share that the level really has.
- The authors' networks normalise before each convolution; ours behind it, and the scaler stands between the two.
- An element's average is weighted by samples; `method.weights=uniform` counts devices, as the authors' code does.
- Gradients are not clipped; the authors' code clips them to norm 1.
- Statistics are taken over `method.statistics_samples` training samples before each evaluation, in batches of the
  evaluation, without dropout; the authors' code takes the whole training set, once.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fedfreeze.config.schema import Config, ModelConfig
from fedfreeze.methods.base import LevelMemory
from fedfreeze.methods.widths import WidthScaled, fitted_network, level_widths, width_of


class HeteroFL(WidthScaled):
    """Each device trains the first channels of every layer, as many as its cap holds."""

    @classmethod
    def fit(cls, config: Config, caps: Sequence[int | None], level_memory: LevelMemory) -> dict[str, Any]:
        """See Method. Returns `width`, that of the largest share that a device holds; of the smallest if none does."""
        widths = level_widths(config.method.widths, width_of(config.model, config.method.name))
        limits = [cap for cap in caps if cap is not None]
        if len(limits) < len(caps):
            return {"width": widths[-1]}
        memory = level_memory(config.model)[: len(widths)]
        held = [width for width, needed in zip(widths, memory, strict=True) if needed <= max(limits)]
        return {"width": max(held, default=widths[0])}

    @classmethod
    def network(cls, model: ModelConfig, fitted: dict[str, Any]) -> ModelConfig:
        """See Method."""
        return fitted_network(model, fitted)

    def window(self, size: int, kept: int, round_number: int) -> torch.Tensor:
        """See WidthScaled."""
        return torch.arange(kept)
