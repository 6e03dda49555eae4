"""The emulated devices: memory caps, speeds, networks, availability; from a profile, numbers, draws or CSV files."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedfreeze.config.schema import FleetConfig, PerDevice
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.classes import NETWORK_SPREAD, class_shares, deal_classes
from fedfreeze.fleet.csv_file import read_fleet_csv
from fedfreeze.seeds import numpy_generator
from fedfreeze.units import MIB


@dataclass(frozen=True, eq=False)
class Fleet:
    """The devices 0 ... n-1; every array has one value a device, and a single number stands for all."""

    memory_cap_bytes: tuple[int | None, ...]
    """The cap of each device; None where caps are not enforced."""
    speed_flops: np.ndarray = field(default_factory=lambda: np.asarray(1e10))
    """Floating-point operations a second, in training."""
    up_bytes_s: np.ndarray = field(default_factory=lambda: np.asarray(1e6))
    down_bytes_s: np.ndarray = field(default_factory=lambda: np.asarray(1e6))
    availability: np.ndarray = field(default_factory=lambda: np.asarray(1.0))
    """Share of each period in which a device can be selected."""
    phase: np.ndarray = field(default_factory=lambda: np.asarray(0.0))
    """Where in its period a device is at emulated second 0, as a share of it."""
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        for name in ("speed_flops", "up_bytes_s", "down_bytes_s", "availability", "phase"):
            each = np.broadcast_to(np.asarray(getattr(self, name), dtype=np.float64), len(self))
            object.__setattr__(self, name, each)

    def __len__(self) -> int:
        return len(self.memory_cap_bytes)

    def available(self, now_s: float) -> np.ndarray:
        """Return for each device whether it can be selected at an emulated second."""
        return np.asarray((now_s / self.period_s + self.phase) % 1.0 < self.availability)

    def wait_s(self, now_s: float, devices: Sequence[int]) -> float:
        """Return the emulated seconds until the first of some devices can be selected; 0: one can be now."""
        index = np.asarray(devices, dtype=np.int64)
        if self.available(now_s)[index].any():
            return 0.0
        # a device is available from the start of its period: wait for the first start, and a hair more for rounding
        until = 1.0 - (now_s / self.period_s + self.phase[index]) % 1.0
        first = until.argmin()
        hair = min(1e-6, float(self.availability[index][first]) / 2)  # not past a share that is smaller than that
        return (float(until[first]) + hair) * self.period_s

    def eligible(self, memory_bytes: int) -> list[int]:
        """Return the devices whose cap holds `memory_bytes`."""
        return [i for i, cap in enumerate(self.memory_cap_bytes) if cap is None or cap >= memory_bytes]


@dataclass(frozen=True)
class _Figure:
    """A figure that each device has: a key of `fleet`, a column of CSV files."""

    key: str
    noun: str
    """What a message calls it, with its article."""
    unit: str
    default: PerDevice
    """Without key and profile."""
    purpose: str
    """Of its random draw."""
    factor: float = 1.0
    """From the key's unit to the fleet's."""
    most: float = math.inf

    @property
    def limits(self) -> str:
        """What a message says that a value must be."""
        return "more than 0 and finite" if self.most == math.inf else f"more than 0 and at most {self.most:g}"

    def check(self, values: Sequence[float], where: str) -> np.ndarray:
        """Return the values in the fleet's unit. Raises ConfigError."""
        for device, value in enumerate(values):
            if not (0 < value <= self.most and math.isfinite(value * self.factor)):
                raise ConfigError(
                    f"{where}: device {device} has {' '.join([f'{value}', self.unit]).strip()}; {self.noun} must be "
                    f"{self.limits}"
                )
        return np.asarray(values, dtype=np.float64) * self.factor


_MBIT = 1e6 / 8  # bytes in it
_FIGURES = (
    _Figure("memory_cap_mib", "a cap", "MiB", "uniform(100, 900)", "memory caps", MIB),
    _Figure("speed_gflops", "a speed", "GFLOP/s", "loguniform(2, 20)", "speeds", 1e9),
    _Figure("up_mbit_s", "an upload", "Mbit/s", "loguniform(2, 20)", "uploads", _MBIT),
    _Figure("down_mbit_s", "a download", "Mbit/s", "loguniform(10, 100)", "downloads", _MBIT),
    _Figure("availability", "an availability", "", 1.0, "availability", most=1.0),
)


def make_fleet(config: FleetConfig, seed: int) -> Fleet:
    """Draw or read the figures of every device: a key that is set, else the profile's, else the default.

    Raises ConfigError.
    """
    profile, source = _read_profile(config, seed)
    found = {}
    for figure in _FIGURES:
        spec, where = getattr(config, figure.key), f"fleet.{figure.key}"
        if spec is None and figure.key in profile:
            values, where = profile[figure.key], f"{source}: {figure.key}"
        else:
            values = _draw(figure, figure.default if spec is None else spec, config.devices, seed)
        found[figure.key] = figure.check(values, where)
    caps = tuple(int(cap) if config.enforce else None for cap in found["memory_cap_mib"])
    return Fleet(
        caps,
        speed_flops=found["speed_gflops"],
        up_bytes_s=found["up_mbit_s"],
        down_bytes_s=found["down_mbit_s"],
        availability=found["availability"],
        phase=numpy_generator(seed, "availability phases").uniform(0, 1, config.devices),
        period_s=config.availability_period_s,
    )


def _read_profile(config: FleetConfig, seed: int) -> tuple[dict[str, Sequence[float]], str]:
    """Return the figures that the profile gives, in the keys' units, and how messages call it."""
    profile, where = config.profile, "fleet.profile"
    figures: dict[str, Sequence[float]]
    if profile is None:
        return {}, where
    if isinstance(profile, str) and profile.endswith(".csv"):
        needed = ["memory_cap_mib"] if config.memory_cap_mib is None else []
        figures = dict(read_fleet_csv(Path(profile), config.devices, where=where, needed=needed, only_known=True))
        where = f"{where}: {profile}"
    else:
        shares = class_shares(profile)
        classes = deal_classes(shares, config.devices, numpy_generator(seed, "device classes"))
        # a device has a good network or a bad one, in both directions [ours]
        networks = numpy_generator(seed, "networks").lognormal(0.0, NETWORK_SPREAD, config.devices)
        figures = {
            "memory_cap_mib": [each.training_memory_mib for each in classes],
            "speed_gflops": [each.training_gflops for each in classes],
            "up_mbit_s": [each.up_mbit_s * network for each, network in zip(classes, networks, strict=True)],
            "down_mbit_s": [each.down_mbit_s * network for each, network in zip(classes, networks, strict=True)],
            "availability": [each.availability for each in classes],
        }
    if "memory_cap_mib" in figures:
        figures["memory_cap_mib"] = [memory * config.memory_scale for memory in figures["memory_cap_mib"]]
    return figures, where


def _draw(figure: _Figure, spec: PerDevice, devices: int, seed: int) -> Sequence[float]:
    """Return a figure's value for each device, as the key gives it: number, list, CSV file or distribution."""
    where = f"fleet.{figure.key}"
    if isinstance(spec, (int, float)):
        return [float(spec)] * devices
    if isinstance(spec, list):
        if not spec:
            unit = f" in {figure.unit}" if figure.unit else ""
            raise ConfigError(f"{where}: the list is empty; give at least one {figure.noun.split()[-1]}{unit}")
        return [spec[i % len(spec)] for i in range(devices)]
    if spec.endswith(".csv"):
        return read_fleet_csv(Path(spec), devices, where=where, needed=[figure.key])[figure.key]
    match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", spec)
    if not match or match[1] not in DISTRIBUTIONS:
        raise ConfigError(
            f"{where}: {spec!r} is not {figure.noun}; allowed: a number, a list of numbers, "
            "uniform(low, high), loguniform(low, high), normal(mean, sd), or a .csv file"
        )
    name = match[1]
    try:
        first, second = (float(number) for number in match[2].split(","))
    except ValueError:
        raise ConfigError(f"{where}: {spec!r} needs two numbers, as in {name}(100, 900)") from None
    if not (0 < first < math.inf and 0 <= second < math.inf) or (name != "normal" and second < first):
        raise ConfigError(f"{where}: {spec!r} needs 0 < first and, for a range, low <= high")
    if (first if name == "normal" else second) > figure.most:
        raise ConfigError(f"{where}: {spec!r} goes beyond {figure.most:g}; {figure.noun} must be {figure.limits}")
    draws = DISTRIBUTIONS[name](numpy_generator(seed, figure.purpose), first, second, devices)
    return [float(draw) for draw in np.minimum(draws, figure.most)]


def _normal(generator: np.random.Generator, mean: float, sd: float, count: int) -> np.ndarray:
    """Normal, cut off at a tenth of the mean: a device without memory is no device."""
    return np.maximum(generator.normal(mean, sd, count), mean / 10)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, float, float, int], np.ndarray]] = {
    "uniform": lambda generator, low, high, count: generator.uniform(low, high, count),
    "loguniform": lambda generator, low, high, count: np.exp(generator.uniform(math.log(low), math.log(high), count)),
    "normal": _normal,
}
