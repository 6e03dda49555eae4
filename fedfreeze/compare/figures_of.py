"""The figures of a comparison: of each run, and mean and spread of each setting."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedfreeze.compare.read import Run
from fedfreeze.compare.settings import Setting, make_settings, setting_notices
from fedfreeze.errors import ConfigError

DEFAULT_TARGET_SHARE = 0.95  # of the lowest best accuracy among the settings

RUN_FIGURES = (
    "final_accuracy",
    "best_accuracy",
    "rounds",
    "emulated_s",
    "traffic_bytes",
    "flops",
    "peak_memory_mib",
    "mean_memory_mib",
    "full_memory_mib",
    "memory_cut_peak",
    "participation",
    "inclusion",
)
TARGET_FIGURES = ("rounds_to_target", "emulated_s_to_target")


@dataclass(frozen=True)
class Figure:
    """One figure of a setting, over its seeds."""

    values: tuple[float | None, ...]
    """In the order of the seeds; None: this run has none."""

    @property
    def known(self) -> list[float]:
        """The values of the runs that have one."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the runs that have a value."""
        return math.fsum(self.known) / len(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the runs that have a value; None for fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None


@dataclass(frozen=True)
class Row:
    """A setting with its figures."""

    setting: Setting
    figures: dict[str, Figure]
    ways: dict[str, Figure] = field(default_factory=dict)
    """By way to take a step (`train.fit`) the share of device-rounds that went it; every row has the same ways."""


@dataclass(frozen=True)
class Target:
    """The accuracy to which time is taken."""

    accuracy: float | None
    """None: no run was evaluated yet."""
    given: bool
    """Whether the user chose it."""
    lowest: str = ""
    """The label of the setting whose best accuracy is the lowest."""

    @property
    def text(self) -> str:
        """What it is and where it comes from."""
        if self.accuracy is None:
            return "no target accuracy: no run was evaluated yet"
        if self.given:
            return f"target accuracy {self.accuracy:.4g} (--target)"
        return (
            f"target accuracy {self.accuracy:.4f} ({DEFAULT_TARGET_SHARE:.0%} of the lowest best accuracy among the "
            f"settings, that of {self.lowest}; --target sets another)"
        )


@dataclass(frozen=True)
class Comparison:
    """Settings beside each other."""

    rows: tuple[Row, ...]
    target: Target
    notices: tuple[str, ...]

    @property
    def differing(self) -> list[str]:
        """The keys that differ between the settings."""
        return list(self.rows[0].setting.values)


def make_comparison(runs: Sequence[Run], target_accuracy: float | None = None) -> Comparison:
    """Compare runs. Raises ConfigError for runs that cannot be compared and for a target outside (0, 1)."""
    if target_accuracy is not None and not 0 < target_accuracy < 1:
        raise ConfigError(f"--target: {target_accuracy:g} is not an accuracy, a number between 0 and 1")
    settings = make_settings(runs)
    of_runs = [[run_figures(run) for run in setting.runs] for setting in settings]
    figures = [_over_seeds(each, RUN_FIGURES) for each in of_runs]
    target = Target(target_accuracy, True) if target_accuracy is not None else _default_target(settings, figures)
    ways = _ways_of(runs)
    rows = []
    for setting, found in zip(settings, figures, strict=True):
        to_target = [figures_to_target(run, target.accuracy) for run in setting.runs]
        shares = _over_seeds([way_shares(run, ways) for run in setting.runs], ways)
        rows.append(Row(setting, found | _over_seeds(to_target, TARGET_FIGURES), shares))
    return Comparison(tuple(rows), target, tuple(setting_notices(settings)))


def run_figures(run: Run) -> dict[str, float | None]:
    """Return what a run reached and cost: accuracy and shares from 0 to 1, seconds, bytes and MiB."""
    accuracies = [record.accuracy for record in run.rounds if record.accuracy is not None]
    peaks = [peak for record in run.rounds for peak in record.peak_memory_mib.values()]
    full, peak = run.summary.full_memory_mib, max(peaks, default=None)
    trained = {device for record in run.rounds for device in record.peak_memory_mib}
    return {
        "final_accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        "rounds": len(run.rounds),
        "emulated_s": cumulated_s(run)[-1],
        "traffic_bytes": cumulated_bytes(run)[-1],
        "flops": _total([record.flops for record in run.rounds]),
        "peak_memory_mib": peak,
        "mean_memory_mib": math.fsum(peaks) / len(peaks) if peaks else None,
        "full_memory_mib": full,
        "memory_cut_peak": 1 - peak / full if peak is not None and full else None,
        "participation": len(trained) / len(run.devices),
        "inclusion": run.summary.inclusion,
    }


def way_shares(run: Run, ways: Sequence[str]) -> dict[str, float | None]:
    """Return for each way the share, from 0 to 1, of device-rounds that went it; None: the run did not note them.

    A device-round is a device that completed a round. Of a run that an older version began, it is of the later rounds.
    """
    counts = _way_counts([run])
    known = sum(counts.values())
    return {way: counts[way] / known if known else None for way in ways}


def _ways_of(runs: Sequence[Run]) -> list[str]:
    """Return the ways that occur, the most frequent first."""
    return [way for way, _ in sorted(_way_counts(runs).items(), key=lambda item: (-item[1], item[0]))]


def _way_counts(runs: Sequence[Run]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for run in runs:
        for record in run.rounds:
            counts.update(record.ways or {})
    return counts


def _total(amounts: Sequence[float | None]) -> float | None:
    """Return the sum; None where one is not known."""
    known = [amount for amount in amounts if amount is not None]
    return math.fsum(known) if len(known) == len(amounts) else None


def figures_to_target(run: Run, target_accuracy: float | None) -> dict[str, float | None]:
    """Return rounds and emulated seconds to the first evaluation that is at or above the target; None: never."""
    if target_accuracy is not None:
        for record, seconds in zip(run.rounds, cumulated_s(run), strict=True):
            if record.accuracy is not None and record.accuracy >= target_accuracy:
                return {"rounds_to_target": record.round, "emulated_s_to_target": seconds}
    return dict.fromkeys(TARGET_FIGURES)


def cumulated_s(run: Run) -> list[float | None]:
    """Return the emulated seconds at the end of each round; None from the first round on that has none."""
    total: float | None = 0.0
    found: list[float | None] = []
    for record in run.rounds:
        total = None if total is None or record.emulated_s is None else total + record.emulated_s
        found.append(total)
    return found


def cumulated_bytes(run: Run) -> list[int]:
    """Return what all devices sent and received until the end of each round."""
    total = 0
    found = []
    for record in run.rounds:
        total += record.bytes_up + record.bytes_down
        found.append(total)
    return found


def _over_seeds(of_runs: Sequence[dict[str, float | None]], names: Sequence[str]) -> dict[str, Figure]:
    return {name: Figure(tuple(figures[name] for figures in of_runs)) for name in names}


def _default_target(settings: Sequence[Setting], figures: Sequence[dict[str, Figure]]) -> Target:
    best = [(each["best_accuracy"].mean, setting.label) for each, setting in zip(figures, settings, strict=True)]
    known = [(mean, label) for mean, label in best if mean is not None]
    if not known:
        return Target(None, False)
    lowest, label = min(known)
    return Target(DEFAULT_TARGET_SHARE * lowest, False, label)


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values: seconds, bytes, MiB, shares from 0 to 1."""
    return {
        "target_accuracy": comparison.target.accuracy,
        "target": comparison.target.text,
        "differing_keys": comparison.differing,
        "notices": list(comparison.notices),
        "settings": [_row_as_plain(row) for row in comparison.rows],
    }


def _row_as_plain(row: Row) -> dict[str, Any]:
    setting = row.setting
    return {
        "label": setting.label,
        "values": setting.values,
        "n": len(setting.runs),
        "seeds": setting.seeds,
        "runs": [
            {
                "folder": str(run.path),
                "seed": run.seed,
                "status": run.summary.status,
                "git_revision": run.summary.git_revision,
                "versions": run.summary.versions,
                "device": run.summary.device,
                "world_size": run.summary.world_size,
                "cap_enforcement": run.summary.cap_enforcement,
            }
            for run in setting.runs
        ],
        "reached_target": len(row.figures["rounds_to_target"].known),
        "figures": {name: _figure_as_plain(figure) for name, figure in row.figures.items()},
        "way_shares": {way: _figure_as_plain(figure) for way, figure in row.ways.items()},
    }


def _figure_as_plain(figure: Figure) -> dict[str, Any]:
    return {"mean": figure.mean, "spread": figure.spread, "n": len(figure.known), "values": list(figure.values)}
