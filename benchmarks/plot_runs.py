"""Draws settings beside each other: accuracy over rounds, mean and range of their seeds, and memory by round.

    python benchmarks/plot_runs.py OUT.png LABEL=RUN_DIR[,RUN_DIR ...] ...

The last setting's freeze points are marked, by the run of its first seed. Needs matplotlib (`pip install
'fedfreeze[plot]'`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Told apart by colour (Okabe and Ito's, safe for colour-blind readers), line and marker.
STYLES = [("#D55E00", "--", "s"), ("#888888", "-.", "^"), ("#009E73", ":", "D"), ("#0072B2", "-", "o")]


def main() -> int:
    if len(sys.argv) < 3 or not all("=" in argument for argument in sys.argv[2:]):
        print(__doc__, file=sys.stderr)
        return 64
    settings = {}
    for argument in sys.argv[2:]:
        label, _, folders = argument.partition("=")
        settings[label] = [Path(folder) for folder in folders.split(",")]
    draw(settings, Path(sys.argv[1]))
    return 0


def draw(settings: dict[str, list[Path]], out: Path) -> None:
    """Draw one picture of several settings."""
    figure, (accuracy, memory) = pyplot.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    styles = STYLES[len(STYLES) - len(settings) :] if len(settings) < len(STYLES) else STYLES
    marks: list[dict[str, Any]] = []
    for (label, folders), (colour, line, marker) in zip(settings.items(), styles, strict=True):
        records = [read(folder) for folder in folders]
        style: dict[str, Any] = {"color": colour, "linestyle": line, "label": label}
        rounds, mean, low, high = band(records)
        accuracy.plot(rounds, mean, marker=marker, markersize=3, **style)
        accuracy.fill_between(rounds, low, high, color=colour, alpha=0.12, linewidth=0)
        first = [record for record in records[0] if record["kind"] == "round"]
        peaks = [(r["round"], max(r["peak_memory_mib"].values())) for r in first if r["peak_memory_mib"]]
        memory.plot(*zip(*peaks, strict=True), drawstyle="steps-mid", **style)
        marks = [record for record in records[0] if record["kind"] == "stage"]
    for axis in (accuracy, memory):
        mark_freezes(axis, marks)
        axis.set(xlabel="round", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    accuracy.set(ylabel="test accuracy, mean and range of the seeds")
    memory.set(ylabel="largest measured peak of a device (MiB)")
    accuracy.legend(loc="lower right", fontsize=8)
    figure.savefig(out, dpi=130)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def band(records: list[list[dict[str, Any]]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return the rounds in which all seeds were evaluated, and there the mean, lowest and highest accuracy."""
    found = [
        {r["round"]: r["accuracy"] for r in run if r["kind"] == "round" and r["accuracy"] is not None}
        for run in records
    ]
    rounds = sorted(set.intersection(*(set(each) for each in found)))
    values = [[each[number] for each in found] for number in rounds]
    return rounds, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def mark_freezes(axis: Any, stages: list[dict[str, Any]]) -> None:
    """Draw a line where each block was frozen, its name above the picture."""
    end = 0
    for stage in stages if len(stages) > 1 else []:
        end += stage["rounds"]
        axis.axvline(end, color="#0072B2", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"block {stage['stage'] + 1}\nfrozen",
            (end, 1.01),
            xycoords=("data", "axes fraction"),
            va="bottom",
            ha="center",
            fontsize=7,
            color="#0072B2",
        )


if __name__ == "__main__":
    sys.exit(main())
