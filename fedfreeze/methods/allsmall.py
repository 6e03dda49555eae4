"""AllSmall: FedAvg on the width of the network that the weakest device of the fleet holds, so that all take part.

The name is that of the baseline in work on devices of different memory (SmartFreeze and its siblings). The width is
found from the smallest cap by the cost model, among all whole widths.
"""

import math
from collections.abc import Sequence
from typing import Any

from fedfreeze.config.schema import Config, ModelConfig
from fedfreeze.errors import ConfigError
from fedfreeze.methods.base import LevelMemory
from fedfreeze.methods.fedavg import FedAvg
from fedfreeze.methods.widths import fitted_network, scaled, width_of
from fedfreeze.units import MIB


class AllSmall(FedAvg):
    """A network as narrow as the smallest cap asks for, trained by everyone."""

    @classmethod
    def fit(cls, config: Config, caps: Sequence[int | None], level_memory: LevelMemory) -> dict[str, Any]:
        """See Method. Returns `width`, the largest whose whole network fits the smallest cap."""
        full = width_of(config.model, config.method.name)
        limited = [cap for cap in caps if cap is not None]
        if not limited:
            return {"width": full}
        smallest = min(limited)

        def needed(width: int) -> int:
            return max(level_memory(scaled(config.model, width)))

        if needed(full) <= smallest:
            return {"width": full}
        fits, too_wide = 0, full
        while too_wide - fits > 1:
            middle = (fits + too_wide) // 2
            if needed(middle) <= smallest:
                fits = middle
            else:
                too_wide = middle
        if fits == 0:
            cap = math.floor(smallest / MIB * 100 + 0.01) / 100
            least = math.ceil(needed(1) / MIB * 100) / 100
            raise ConfigError(
                f"no width of {config.model.factory or config.model.name} fits the smallest cap, {cap} MiB: width 1 "
                f"needs {least} MiB at batch {config.train.batch_size} (raise fleet.memory_cap_mib, or lower "
                "train.batch_size)"
            )
        return {"width": fits}

    @classmethod
    def network(cls, model: ModelConfig, fitted: dict[str, Any]) -> ModelConfig:
        """See Method."""
        return fitted_network(model, fitted)
