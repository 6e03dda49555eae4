"""Classes of real devices with the source of every figure, and the profiles made of them.

What a class states is the whole machine: its RAM, its peak, its network. What training gets of it are two constants of
ours, TRAINING_MEMORY_SHARE and TRAINING_SPEED_SHARE. Sources marked (report) are reports of the vendor's page or
announcement, not the page itself.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedfreeze.errors import ConfigError

TRAINING_MEMORY_SHARE = 0.25
"""Share of a device's RAM that training may use; the rest is the system's and other programs'. [ours]"""
TRAINING_SPEED_SHARE = 0.15
"""Share of its peak that a device reaches in training; `fedfreeze plan --calibrate` measures a machine. [ours]"""
NETWORK_SPREAD = 0.5
"""Standard deviation of the logarithm of a device's network factor: two thirds lie within 0.61 to 1.65. [ours]"""


@dataclass(frozen=True)
class Cores:
    """Cores of one kind; for a GPU, its lanes."""

    count: int
    ghz: float
    flops_per_cycle: int
    """fp32, of one core: units x lanes x 2, as a fused multiply-add is two operations."""
    source: str


@dataclass(frozen=True)
class DeviceClass:
    """What one kind of device is, before shares and scales."""

    name: str
    model: str
    memory_mib: int
    """RAM."""
    memory_source: str
    cores: tuple[Cores, ...]
    up_mbit_s: float
    down_mbit_s: float
    network_source: str
    availability: float
    """Share of the time. [ours]"""

    @property
    def peak_gflops(self) -> float:
        """Return cores x clock x operations a cycle, over all kinds of cores; fp32, 10^9 a second."""
        return sum(cores.count * cores.ghz * cores.flops_per_cycle for cores in self.cores)

    @property
    def training_memory_mib(self) -> float:
        """Return the memory that training may use."""
        return self.memory_mib * TRAINING_MEMORY_SHARE

    @property
    def training_gflops(self) -> float:
        """Return the speed that training reaches."""
        return self.peak_gflops * TRAINING_SPEED_SHARE


# Operations a cycle of a core, fp32.
_A53 = (
    4  # one 64-bit pipe, 2 lanes: LLVM, AArch64SchedA53.td, "Q-form multiply-accumulate occupies the pipe two cycles"
)
_A55 = 8  # two 64-bit pipes, 4 lanes: LLVM, AArch64SchedA55.td
_A72 = 8  # two 64-bit pipes, 4 lanes: measured by VFP Benchmark, wlog.flatlib.jp/2015/10/30/n1787
_A76 = 16  # two 128-bit pipes, 8 lanes: systemonchips.com, "Arm Cortex-A76 floating-point performance analysis"
_A78 = 16  # as Cortex-A76: half of the four units of X1, see there
_X1 = 32  # four 128-bit units, two more than A78: Linley Gwennap, "Cortex-X1: The Bigger Arm", 2020
_GPU = 2  # a CUDA core makes one multiply-add a cycle, in NVIDIA's data sheets as in CUDA's

_EXYNOS_850 = "Samsung, Exynos 850 product page (report: Android Central, 2020)"
_EXYNOS_1380 = "Samsung, Exynos 1380 announcement (report: PhoneArena, 2023-02-24)"
_EXYNOS_2100 = "Samsung, Exynos 2100 announcement (report: MobiGyaan and SlashGear, 2021-01-12)"
_PI_DOCUMENTS = "Raspberry Pi documentation (github.com/raspberrypi/documentation), computers/processors/"

# Phones on the mobile network, boards on a home's line: no port or radio of the boards is slower than that line
# (the slowest is the 3B+, whose Ethernet passes some 300 Mbit/s through USB 2.0).
_MOBILE = "Ookla, Speedtest Global Index, global averages on mobile in September 2020 (report: my-financial-wealth.com)"
_MOBILE_5G = "Ookla, 'Growing and Slowing: The State of 5G Worldwide in 2021', global medians of 5G in Q3 2021"
_FIXED = "Ookla, Speedtest Global Index, global averages on fixed broadband in September 2020 (report: as for mobile)"

_AT_NIGHT = 8 / 24  # phones train while they are charged and not used: 8 hours a day [ours]
_ALWAYS = 1.0  # boards hang on the mains [ours]

_CLASSES = (
    DeviceClass(
        "galaxy_a13",
        "Samsung Galaxy A13, 4 GB",
        4096,
        "sold with 3, 4 and 6 GB (report of the launch: ProPakistani, 2022-03-05)",
        (Cores(8, 2.0, _A55, _EXYNOS_850),),
        11.22,
        35.96,
        _MOBILE,
        _AT_NIGHT,
    ),
    DeviceClass(
        "galaxy_a54",
        "Samsung Galaxy A54 5G, 8 GB",
        8192,
        "sold with 6 and 8 GB (reports before the launch: Sportskeeda, 2023-02-04; ceotech.it)",
        (Cores(4, 2.4, _A78, _EXYNOS_1380), Cores(4, 2.0, _A55, _EXYNOS_1380)),
        21.08,
        166.13,
        _MOBILE_5G,
        _AT_NIGHT,
    ),
    DeviceClass(
        "galaxy_s21_ultra",
        "Samsung Galaxy S21 Ultra, 12 GB",
        12288,
        "12 GB (reports before the launch: Tom's Guide, 2020-12-18; Geekbench listing in telefonino.net)",
        (Cores(1, 2.9, _X1, _EXYNOS_2100), Cores(3, 2.8, _A78, _EXYNOS_2100), Cores(4, 2.2, _A55, _EXYNOS_2100)),
        21.08,
        166.13,
        _MOBILE_5G,
        _AT_NIGHT,
    ),
    DeviceClass(
        "raspberry_pi_3b_plus",
        "Raspberry Pi 3 Model B+",
        1024,
        "The Official Raspberry Pi Beginner's Guide, 2018, appendix F",
        (Cores(4, 1.4, _A53, f"{_PI_DOCUMENTS}bcm2837b0.adoc"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
    DeviceClass(
        "raspberry_pi_4b",
        "Raspberry Pi 4 Model B, 4 GB",
        4096,
        "The Official Raspberry Pi Beginner's Guide, 3rd edition, appendix F: 1, 2 and 4 GB",
        (Cores(4, 1.5, _A72, f"{_PI_DOCUMENTS}bcm2711.adoc"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
    DeviceClass(
        "raspberry_pi_5",
        "Raspberry Pi 5, 8 GB",
        8192,
        "Raspberry Pi 5 announcement, 2023: 4 and 8 GB (report: singleboard.org)",
        (Cores(4, 2.4, _A76, f"{_PI_DOCUMENTS}bcm2712.adoc"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
    DeviceClass(
        "jetson_nano",
        "NVIDIA Jetson Nano, 4 GB",
        4096,
        "CUDA's deviceQuery on the board: 3957 MiB seen (gist.github.com/bgulla)",
        (Cores(128, 0.922, _GPU, "CUDA's deviceQuery on the board: 128 cores, 922 MHz (gist.github.com/bgulla)"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
    DeviceClass(
        "jetson_xavier_nx",
        "NVIDIA Jetson Xavier NX, 8 GB",
        8192,
        "NVIDIA, Jetson Xavier NX data sheet DA-09366-001",
        (Cores(384, 1.1, _GPU, "NVIDIA, Jetson Xavier NX data sheet DA-09366-001"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
    DeviceClass(
        "jetson_orin_nano",
        "NVIDIA Jetson Orin Nano, 8 GB",
        8192,
        "NVIDIA, Jetson Orin Nano series data sheet",
        (Cores(1024, 0.625, _GPU, "NVIDIA, Jetson Orin Nano series data sheet"),),
        45.74,
        85.73,
        _FIXED,
        _ALWAYS,
    ),
)

DEVICE_CLASSES: dict[str, DeviceClass] = {each.name: each for each in _CLASSES}

_BOARDS = ("raspberry_pi_3b_plus", "raspberry_pi_4b", "raspberry_pi_5")
_JETSONS = ("jetson_nano", "jetson_xavier_nx", "jetson_orin_nano")

# Shares of the classes. [ours]
PRESETS: dict[str, dict[str, float]] = {
    "phones": {"galaxy_a13": 0.5, "galaxy_a54": 0.3, "galaxy_s21_ultra": 0.2},
    "raspberry_pi": dict.fromkeys(_BOARDS, 1.0),
    "jetson": dict.fromkeys(_JETSONS, 1.0),
    "mixed": dict.fromkeys(DEVICE_CLASSES, 1.0),
}


def class_shares(profile: str | Mapping[str, float]) -> dict[str, float]:
    """Return the share of each class in a preset or a mixture; they sum to one. Raises ConfigError."""
    if isinstance(profile, str):
        if profile not in PRESETS:
            hint = nearest(profile, PRESETS)
            if profile in DEVICE_CLASSES:
                hint = f"; it is a device class: write {{{profile}: 1}}"
            raise ConfigError(
                f"fleet.profile: {profile!r} is no profile{hint}; allowed: {', '.join(PRESETS)}, a mixture "
                "{CLASS: share, ...}, or a .csv file"
            )
        profile = PRESETS[profile]
    for name, share in profile.items():
        if name not in DEVICE_CLASSES:
            raise ConfigError(
                f"fleet.profile: {name!r} is no device class{nearest(name, DEVICE_CLASSES)}; allowed: "
                f"{', '.join(DEVICE_CLASSES)}"
            )
        if not 0 <= share < math.inf:
            raise ConfigError(f"fleet.profile: the share of {name} is {share}; a share must be 0 or more, and finite")
    largest = max(profile.values(), default=0.0)
    if largest == 0:
        raise ConfigError(
            "fleet.profile: the mixture has no class with a share over 0; give at least one, as in {a: 1}"
        )
    whole = sum(share / largest for share in profile.values())  # shares near the largest number must not overflow
    return {name: share / largest / whole for name, share in profile.items()}


def deal_classes(shares: Mapping[str, float], devices: int, generator: np.random.Generator) -> list[DeviceClass]:
    """Return the class of each device: counts by largest remainder, in random order."""
    counts = counts_of(list(shares.values()), devices)
    dealt = [name for name, count in zip(shares, counts, strict=True) for _ in range(count)]
    return [DEVICE_CLASSES[dealt[i]] for i in generator.permutation(devices)]


def counts_of(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers that sum to `total`, each within one of its share of it; ties go to the first."""
    quotas = [share * total for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (round(counts[i] - quotas[i], 9), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """Return `; did you mean X?` for what a user mistyped, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
