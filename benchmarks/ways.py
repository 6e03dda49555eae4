"""Block-wise training beside recomputation, both together, and batches in passes: memory, FLOPs, traffic, who joins.

    python benchmarks/ways.py [--models resnet18 vit ...] [--batch 32 128] [--markdown FILE] [--json FILE]
        [--picture FILE.png] [--read FILE]

Predicted by the cost model, as `fedfreeze plan` does, for 32x32 images of ten classes; benchmarks/memory.py holds it
against real tensors. Each row is one method and one way of `train.fit` for all devices: the peak of the largest stage
and the mean over stages beside the full model that stores all (`fedavg`, `whole`), the operations of a step and what a
device sends a round, means over stages. Who joins: the share of a harsh fleet, whose caps are uniform from a tenth of
what the full model needs to 1.225 times that, so that a fifth holds it, with a cap of the peak or more.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

from fedfreeze.config.file import make_config
from fedfreeze.device.cost import StageCost, measure_costs
from fedfreeze.units import MIB

SHAPE, CLASSES = (3, 32, 32), 10
WIDTHS = {"resnet10": 64, "resnet18": 64, "vgg11": 64, "vgg16": 64, "vit": 192}
WAYS = ("whole", "recompute", "recompute2", "recompute3", "micro(4)", "recompute2+micro(4)")
LOWEST, HIGHEST = 0.1, 1.225
STREAMED = "streamed"


@dataclass(frozen=True)
class Row:
    """One method and way of a network at a batch size."""

    model: str
    batch: int
    method: str
    way: str
    prefix: str
    stages_mib: list[float]
    peak_share: float
    """Of what the full model needs that stores all, as are the next three."""
    mean_share: float
    flops_share: float
    traffic_share: float
    joins: float
    """Share of the harsh fleet."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--read", type=Path, help="take the rows from such a JSON file instead of predicting them")
    options = parser.parse_args()
    rows = [Row(**each) for each in json.loads(options.read.read_text())["rows"]] if options.read else []
    rows = rows or [row for model in options.models for batch in options.batch for row in rows_of(model, batch)]
    command = "python benchmarks/ways.py " + " ".join(sys.argv[1:])
    text = f"`{command.strip()}`\n\n" + "\n\n".join(
        table([row for row in rows if (row.model, row.batch) == key])
        for key in dict.fromkeys((row.model, row.batch) for row in rows)
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(f"# Ways to fit a step into memory\n\n{__doc__.split(chr(10) * 2)[2]}\n\n{text}\n")
    if options.json:
        options.json.write_text(json.dumps({"command": command, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.picture:
        draw(rows, options.picture)
    return 0


def rows_of(model: str, batch: int) -> list[Row]:
    """Return the rows of one network at one batch size."""
    found: list[Row] = []
    for prefix in ("recomputed", STREAMED):
        train = {"batch_size": batch, "fit": ", ".join(WAYS), "prefix": prefix}
        costs = measure_costs(
            make_config({"model": {"name": model, "width": WIDTHS[model]}, "train": train}), SHAPE, CLASSES
        )
        for number, way in enumerate(WAYS):
            if prefix == "recomputed" and way != "recompute3":  # nothing is frozen
                found.append(row(model, batch, "fedavg", way, prefix, [costs.full], number, costs.full))
            found.append(row(model, batch, "smartfreeze", way, prefix, list(costs.stages), number, costs.full))
    order = {"fedavg": 0, "smartfreeze": 1}
    return sorted(found, key=lambda each: (order[each.method], each.prefix == STREAMED, WAYS.index(each.way)))


def row(
    model: str, batch: int, method: str, way: str, prefix: str, stages: list[StageCost], number: int, full: StageCost
) -> Row:
    """Return the figures of some stages by their way of that number."""
    memory = [stage.ways[number].memory_bytes for stage in stages]
    peak = max(memory) / full.memory_bytes
    return Row(
        model,
        batch,
        method,
        way,
        prefix,
        [round(each / MIB, 1) for each in memory],
        peak,
        mean(memory) / full.memory_bytes,
        mean(stage.ways[number].step_flops for stage in stages) / full.step_flops,
        mean(stage.bytes_up for stage in stages) / full.bytes_up,
        min(1.0, max(0.0, (HIGHEST - peak) / (HIGHEST - LOWEST))),
    )


def table(rows: list[Row]) -> str:
    """Return the rows of one network at one batch size as Markdown."""
    lines = [
        f"**{rows[0].model}, width {WIDTHS[rows[0].model]}, batch {rows[0].batch}**",
        "",
        "| method | way | MiB, by stage | peak | mean | FLOPs a step | traffic | joins |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for each in rows:
        prefix = ", prefix streamed" if each.prefix == STREAMED else ""
        lines.append(
            f"| {each.method}{prefix} | `{each.way}` | {', '.join(map(str, each.stages_mib))}"
            f" | {each.peak_share - 1:+.1%} | {each.mean_share - 1:+.1%}"
            f" | {each.flops_share:.2f} | {each.traffic_share:.2f} | {each.joins:.0%} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the peak against the operations of a step, a point a method and way, a panel a network."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        keys = list(dict.fromkeys((row.model, row.batch) for row in rows if row.batch == max(r.batch for r in rows)))
        figure = Figure(figsize=(3.1 * len(keys), 3.6), layout="constrained")
        for panel, (model, batch) in enumerate(keys):
            axes = figure.add_subplot(1, len(keys), panel + 1)
            axes.set_title(f"{model}, batch {batch}", fontsize=10)
            for method, colour in (("fedavg", "#b5543b"), ("smartfreeze", "#2d6a9f")):
                some = [r for r in rows if (r.model, r.batch, r.method) == (model, batch, method)]
                stored = [r for r in some if "micro" not in r.way and r.prefix != STREAMED]
                passes = [r for r in some if "micro" in r.way and r.prefix != STREAMED]
                axes.plot(
                    [r.flops_share for r in stored], [r.peak_share for r in stored], "o-", color=colour, label=method
                )
                axes.plot(
                    [r.flops_share for r in passes],
                    [r.peak_share for r in passes],
                    "s--",
                    color=colour,
                    markerfacecolor="white",
                    label=f"{method}, in 4 passes",
                )
            axes.set_xlim(0, None)
            axes.set_ylim(0, 1.05)
            axes.set_xlabel("FLOPs of a step")
            if panel == 0:
                axes.set_ylabel("peak memory")
            if panel == 0:
                handles, labels = axes.get_legend_handles_labels()
                figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            "Beside the full model that stores all activations; circles from left to right: whole, recompute, "
            "recompute2 and, behind frozen blocks, recompute3"
        )
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
