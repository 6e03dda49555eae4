"""Draws runs beside each other: accuracy over rounds with the freeze points, and memory against the full model.

    python benchmarks/plot_runs.py OUT.png RUN_DIR [RUN_DIR ...]

Needs matplotlib (`pip install 'fedfreeze[plot]'`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Told apart by colour (Okabe and Ito's, safe for colour-blind readers), line and marker.
STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D")]


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 64
    draw([Path(folder) for folder in sys.argv[2:]], Path(sys.argv[1]))
    return 0


def draw(folders: list[Path], out: Path) -> None:
    """Draw one picture of several runs."""
    figure, (accuracy, memory) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for folder, (colour, line, marker) in zip(folders, STYLES, strict=False):
        records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        rounds = [record for record in records if record["kind"] == "round"]
        stages = [record for record in records if record["kind"] == "stage"]
        summary = json.loads((folder / "summary.json").read_text())
        label = f"{summary['method']}, caps: {summary['cap_enforcement'].replace('_', ' ')}"
        style: dict[str, Any] = {"color": colour, "linestyle": line, "label": label}
        known = [(r["round"], r["accuracy"]) for r in rounds if r["accuracy"] is not None]
        accuracy.plot(*zip(*known, strict=True), marker=marker, markersize=3, **style)
        peaks = [(r["round"], max(r["peak_memory_mib"].values())) for r in rounds if r["peak_memory_mib"]]
        memory.plot(*zip(*peaks, strict=True), drawstyle="steps-mid", **style)
        if len(stages) > 1:
            mark_freezes(accuracy, stages, colour)
            mark_freezes(memory, stages, colour)
            caps = sorted({cap for r in rounds for cap in r["cap_mib"].values() if cap is not None})
            memory.axhspan(caps[0], min(caps[-1], summary["full_memory_mib"] * 1.3), color="#999999", alpha=0.15)
            memory.text(rounds[-1]["round"], caps[0], "caps of the devices ", ha="right", va="bottom", fontsize=8)
    accuracy.set(xlabel="round", ylabel="test accuracy", ylim=(0, None))
    memory.set(xlabel="round", ylabel="largest measured peak of a device (MiB)", ylim=(0, None))
    accuracy.legend(loc="lower right", fontsize=8)
    memory.legend(loc="lower left", fontsize=8)
    for axis in (accuracy, memory):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def mark_freezes(axis: Any, stages: list[dict[str, Any]], colour: str) -> None:
    """Draw a line where each block was frozen."""
    end = 0
    for stage in stages:
        end += stage["rounds"]
        axis.axvline(end, color=colour, linewidth=0.8, linestyle=":")
        axis.annotate(
            f"freeze {stage['stage'] + 1}",
            (end, 1.0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=7,
            color=colour,
        )


if __name__ == "__main__":
    sys.exit(main())
