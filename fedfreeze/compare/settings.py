"""Groups runs into settings (one configuration, several seeds), names them, and says what makes them differ."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedfreeze.compare.read import Run
from fedfreeze.config.file import config_values
from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config
from fedfreeze.errors import ConfigError

# What does not make another experiment: the seed, names, and where and how a run is done.
_NOT_OF_A_SETTING = ("seed", "name", "data.cache_dir")

# What may differ between compared settings but is told: it is not the method that makes such a difference.
_TOLD = ("fleet.", "data.", "train.batch_size")

_HOW_DATA_IS_SPREAD = ("data.partition", "data.alpha", "data.shards_per_device", "data.augment", "data.cache_dir")
_LONGEST_VALUE = 32  # characters of a value in a label


@dataclass(frozen=True)
class Setting:
    """Runs of one configuration, in the order of their seeds."""

    label: str
    """The method, and what differs between the settings compared."""
    values: dict[str, Any]
    """Of the keys that differ between the settings compared."""
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return [run.seed for run in self.runs]

    @property
    def title(self) -> str:
        """The label, marked where runs are not finished."""
        states = [run.summary.status for run in self.runs if not run.finished]
        if not states:
            return self.label
        if len(self.runs) == 1:
            return f"{self.label} [{states[0]}]"
        return f"{self.label} [{len(states)} of {len(self.runs)} not finished]"


def make_settings(runs: Sequence[Run]) -> list[Setting]:
    """Group runs and label the groups; the order of `runs` does not matter.

    Raises ConfigError for runs on different data, and for a seed that is there twice in a setting.
    """
    ordered = sorted(runs, key=lambda run: (_identity(run), run.seed, str(run.path)))
    for run in ordered[1:]:
        _check_same_data(ordered[0], run)
    groups: dict[str, list[Run]] = {}
    for run in ordered:
        group = groups.setdefault(_identity(run), [])
        if group and group[-1].seed == run.seed:
            raise ConfigError(
                f"{group[-1].path} and {run.path} are the same run, of one configuration and seed {run.seed}; "
                "give one of them"
            )
        group.append(run)
    members = list(groups.values())
    keys = differing_keys([group[0] for group in members])
    labels = _labels([group[0] for group in members], keys)
    settings = [
        Setting(label, {key: group[0].config.get(key) for key in keys}, tuple(group))
        for label, group in zip(labels, members, strict=True)
    ]
    return sorted(settings, key=lambda setting: setting.label)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys of which runs have different values, in the order of the configuration."""
    order = {key: number for number, key in enumerate(runs[0].config)}
    known = {key for run in runs for key in run.config if _of_setting(key)}
    found = [key for key in known if len({plain(run.config.get(key)) for run in runs}) > 1]
    return sorted(found, key=lambda key: (order.get(key, len(order)), key))


def setting_notices(settings: Sequence[Setting]) -> list[str]:
    """Return what a reader must know before comparing these settings."""
    runs = [run for setting in settings for run in setting.runs]
    notices = [notice for run in runs for notice in run.notices]
    # fleet.enforce is in every label, as "(no caps)"
    told = [key for key in settings[0].values if key.startswith(_TOLD) and key != "fleet.enforce"]
    if told:
        notices.append(f"the settings differ in more than the method, and so may what they reach: {', '.join(told)}")
    seeds = {tuple(setting.seeds) for setting in settings}
    if len(seeds) > 1:
        listed = "; ".join(f"{setting.label}: {_list(setting.seeds)}" for setting in settings)
        notices.append(f"not the same seeds everywhere, and a seed decides the fleet and the partition ({listed})")
    for name, what in (("git_revision", "revisions of fedfreeze"), ("device", "hardware")):
        values = {str(getattr(run.summary, name)) for run in runs if getattr(run.summary, name)}
        if len(values) > 1:
            notices.append(f"the runs are of different {what}: {', '.join(sorted(values))}")
    torches = {run.summary.versions.get("torch", "") for run in runs} - {""}
    if len(torches) > 1:
        notices.append(f"the runs are of different versions of torch: {', '.join(sorted(torches))}")
    counted = {run.summary.cap_enforcement for run in runs} - {None, "none"}
    if len(counted) > 1:
        notices.append(f"peaks are not counted alike in all runs (caps by {', '.join(sorted(map(str, counted)))})")
    small = [run for run in runs if run.summary.small_batch_share]
    if small:
        notices.append(
            f"in {_list([run.path for run in small])} devices with fewer samples than a batch trained, which need "
            "less; the full model's memory is for a whole batch: the cuts are overstated"
        )
    clockless = [run.path for run in runs if any(record.emulated_s is None for record in run.rounds)]
    if clockless:
        notices.append(f"no emulated time in {_list(clockless)}: of a revision without an emulated clock")
    return notices


def plain(value: Any) -> str:
    """Return a value of a configuration as text: the same for equal values, 1 and 1.0 alike."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value, sort_keys=True, default=str)


def _list(values: Sequence[object], most: int = 5) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def _of_setting(key: str) -> bool:
    return key not in _NOT_OF_A_SETTING and key.partition(".")[0] not in RESUME_MAY_DIFFER


def _identity(run: Run) -> str:
    """Return what is the same for two runs exactly if they are of one setting."""
    return json.dumps({key: plain(run.config[key]) for key in sorted(run.config) if _of_setting(key)})


def _check_same_data(one: Run, other: Run) -> None:
    """Raise ConfigError where two runs learnt from different data; accuracies on them say nothing of each other."""
    on_path = one.config.get("data.path") or other.config.get("data.path")
    synthetic = "synthetic" in (one.config.get("data.name"), other.config.get("data.name")) and not on_path
    for key in sorted({key for run in (one, other) for key in run.config if key.startswith("data.")}):
        if key in _HOW_DATA_IS_SPREAD or (key == "data.name" and on_path):
            continue
        if key.startswith("data.synthetic_") and not synthetic:
            continue
        _check_equal(one, other, key, one.config.get(key), other.config.get(key))
    for name, key in (("num_classes", "the number of classes"), ("image_shape", "the shape of the images")):
        values = [one.num_classes, other.num_classes] if name == "num_classes" else [_shape(one), _shape(other)]
        if None not in values:
            _check_equal(one, other, key, *values)


def _shape(run: Run) -> list[int] | None:
    return run.summary.image_shape


def _check_equal(one: Run, other: Run, what: str, first: Any, second: Any) -> None:
    if plain(first) != plain(second):
        raise ConfigError(
            f"{one.path} and {other.path} cannot be compared, they are on different data: {what} is "
            f"{plain(first)} and {plain(second)}"
        )


def _labels(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Name each setting by its method and what differs; of each key, the usual value goes without saying."""
    shown = [key for key in keys if key not in ("method.name", "fleet.enforce", "select.name")]
    leaves = Counter(key.rpartition(".")[2] for key in shown)
    usual = {key: _usual_value([run.config.get(key) for run in runs], key) for key in shown}
    labels = []
    for run in runs:
        parts = [run.config["method.name"] + ("" if run.config.get("fleet.enforce", True) else " (no caps)")]
        if "select.name" in keys:
            parts.append(f"select {run.config['select.name']}")
        for key in shown:
            text = plain(run.config.get(key))
            if text == usual[key]:
                continue
            short = text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
            section, _, leaf = key.rpartition(".")
            if leaf == "name":
                parts.append(f"{section} {short}")
            else:
                parts.append(f"{leaf if leaves[leaf] == 1 else key}={short}")
        labels.append(" ".join(", ".join(parts).split()))
    # long values that only differ in their tails
    seen: Counter[str] = Counter()
    for number, label in enumerate(labels):
        seen[label] += 1
        if labels.count(label) > 1 and seen[label] > 1:
            labels[number] = f"{label} #{seen[label]}"
    return labels


def _usual_value(values: Sequence[Any], key: str) -> str | None:
    """Return the value that most settings have, at a tie the default; None where neither is one: all are shown then."""
    counts = Counter(plain(value) for value in values)
    most = max(counts.values())
    common = [text for text, count in counts.items() if count == most]
    if len(common) == 1:
        return common[0]
    section, _, name = key.partition(".")
    default = plain(config_values(Config()).get(section, {}).get(name)) if name else None
    return default if default in common else None
