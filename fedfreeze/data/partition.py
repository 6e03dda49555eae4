"""How the training samples are spread over the devices, seeded."""

from collections.abc import Callable

import numpy as np

from fedfreeze.config.schema import Config, DataConfig
from fedfreeze.data.store import Data
from fedfreeze.errors import ConfigError
from fedfreeze.seeds import numpy_generator

Partition = list[np.ndarray]  # for each device the sorted indices of its samples


def partition(labels: np.ndarray, devices: int, config: DataConfig, seed: int) -> Partition:
    """Give every sample to exactly one device; devices may come out empty."""
    generator = numpy_generator(seed, "partition")
    parts = PARTITIONS[config.partition](labels, devices, config, generator)
    return [np.sort(part) for part in parts]


def partition_of(data: Data, config: Config) -> Partition:
    """Spread a run's training samples over its devices. Raises ConfigError for more devices than samples."""
    devices, samples = config.fleet.devices, len(data.train)
    if devices > samples:
        name = config.data.path or config.data.name
        raise ConfigError(
            f"fleet.devices: {devices} is more than the {samples} training samples of {name}, so some would have none; "
            f"lower it to {samples} or less"
        )
    return partition(data.train.labels, devices, config.data, config.seed)


def _iid(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> Partition:
    """Evenly at random."""
    return np.array_split(generator.permutation(len(labels)), devices)


def _dirichlet(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> Partition:
    """Each class is split over the devices by a Dirichlet(alpha) draw (Hsu, Qi and Brown, 2019)."""
    parts: list[list[np.ndarray]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(devices, config.alpha))
        if not np.isfinite(shares).all():  # alpha so small that every gamma draw underflowed
            shares = np.eye(devices)[generator.integers(devices)]
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _shards(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> Partition:
    """Label-sorted samples are cut into shards, dealt out at random (McMahan et al., 2017)."""
    by_label = np.lexsort((generator.permutation(len(labels)), labels))
    shards = np.array_split(by_label, devices * config.shards_per_device)
    deal = generator.permutation(len(shards)).reshape(devices, -1)
    return [np.concatenate([shards[i] for i in hand]) for hand in deal]


PARTITIONS: dict[str, Callable[[np.ndarray, int, DataConfig, np.random.Generator], Partition]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
}
