"""How the training samples are spread over the devices, seeded."""

from collections.abc import Callable

import numpy as np

from fedfreeze.config.schema import Config, DataConfig
from fedfreeze.data.store import Data
from fedfreeze.errors import ConfigError
from fedfreeze.seeds import numpy_generator

Partition = list[np.ndarray]  # for each device the sorted indices of its samples


def partition(labels: np.ndarray, devices: int, config: DataConfig, seed: int) -> Partition:
    """Give every sample to exactly one device; devices may come out empty. Linear in samples, devices and draws."""
    generator = numpy_generator(seed, "partition")
    owner = PARTITIONS[config.partition](labels, devices, config, generator)
    # stable: the samples of each device stay in ascending order
    by_owner = np.argsort(owner, kind="stable")
    return np.split(by_owner, np.cumsum(np.bincount(owner, minlength=devices))[:-1])


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


def _iid(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> np.ndarray:
    """Evenly at random."""
    owner = np.empty(len(labels), dtype=np.int64)
    owner[generator.permutation(len(labels))] = np.repeat(np.arange(devices), _even(len(labels), devices))
    return owner


def _dirichlet(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> np.ndarray:
    """Each class is split over the devices by a Dirichlet(alpha) draw (Hsu, Qi and Brown, 2019)."""
    owner = np.empty(len(labels), dtype=np.int64)
    everyone = np.arange(devices)
    for in_order in _rows_by_label(labels):
        rows = generator.permutation(in_order)
        shares = _shares(devices, config.alpha, generator)
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        owner[rows] = np.repeat(everyone, np.diff(cuts, prepend=0, append=len(rows)))
    return owner


def _shares(devices: int, alpha: float, generator: np.random.Generator) -> np.ndarray:
    """Return a Dirichlet draw over the devices, or its limit where floating point has none for this alpha."""
    shares = generator.dirichlet(np.full(devices, alpha))
    if abs(shares.sum() - 1) <= 1e-6:  # false for what is not a number
        return shares
    if alpha >= 1:  # so large that the sum of the gamma draws overflowed
        return np.full(devices, 1 / devices)
    shares = np.zeros(devices)
    shares[generator.integers(devices)] = 1  # alpha is so small that every gamma draw underflowed
    return shares


def _shards(labels: np.ndarray, devices: int, config: DataConfig, generator: np.random.Generator) -> np.ndarray:
    """Label-sorted samples are cut into shards, dealt out at random (McMahan et al., 2017)."""
    by_label = np.lexsort((generator.permutation(len(labels)), labels))
    shards = devices * config.shards_per_device
    owner_of_shard = np.empty(shards, dtype=np.int64)
    owner_of_shard[generator.permutation(shards)] = np.repeat(np.arange(devices), config.shards_per_device)
    owner = np.empty(len(labels), dtype=np.int64)
    owner[by_label] = np.repeat(owner_of_shard, _even(len(labels), shards))
    return owner


def _even(samples: int, parts: int) -> np.ndarray:
    """Return the sizes of parts that differ by one sample at most, the larger ones first."""
    sizes = np.full(parts, samples // parts)
    sizes[: samples % parts] += 1
    return sizes


def _rows_by_label(labels: np.ndarray) -> list[np.ndarray]:
    """Return the samples of each label that there is, ascending, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    _, first = np.unique(labels[order], return_index=True)
    return np.split(order, first[1:])


PARTITIONS: dict[str, Callable[[np.ndarray, int, DataConfig, np.random.Generator], np.ndarray]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
}
"""By name: what gives each sample the number of its device, (samples,) int64."""
