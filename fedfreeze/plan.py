"""`fedfreeze plan`: what each stage needs and which devices can join, before anything is trained."""

import json
from typing import Any

from rich.table import Table

from fedfreeze.cap import MIB
from fedfreeze.config import Config
from fedfreeze.cost import Costs, StageCost, measure_costs
from fedfreeze.data.store import open_store, prepare
from fedfreeze.fleet import Fleet, make_fleet
from fedfreeze.report import LastingConsole


def plan(config: Config, *, as_json: bool) -> None:
    """Print the cost of every stage beside the full model, and how many devices can join each."""
    data = open_store(prepare(config.data))
    costs = measure_costs(config, data.image_shape, data.num_classes)
    fleet = make_fleet(config.fleet, config.seed)
    rows = plan_rows(costs, fleet)
    if as_json:
        print(json.dumps({"batch_size": config.train.batch_size, "devices": len(fleet), "stages": rows}, indent=2))
        return
    title = f"{config.model.label}, batch {config.train.batch_size}, {len(fleet)} devices"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="underline")
    for heading in ("stage", "blocks", "peak MiB", "of full", "GFLOP/step", "frozen", "up MiB", "eligible"):
        table.add_column(heading, justify="left" if heading == "blocks" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            "full" if row["stage"] is None else str(row["stage"] + 1),
            row["blocks"],
            f"{row['memory_mib']:.2f}",
            f"{row['memory_share']:.0%}",
            f"{row['step_gflop']:.2f}",
            f"{row['frozen_gflop'] / row['step_gflop']:.0%}",
            f"{row['upload_mib']:.2f}",
            str(row["eligible"]),
        )
    console = LastingConsole()
    console.print(table)
    stages = [row for row in rows if row["stage"] is not None]
    every = min(row["eligible"] for row in stages)
    console.print(
        f"{every} of {len(fleet)} devices can join every stage, {rows[-1]['eligible']} could hold the full model.\n"
        "peak: tensor bytes of one training step, counted on fake tensors; frozen: share of a step's\n"
        "FLOPs spent in the frozen prefix; up: what a device sends a round. Nothing was trained.",
        soft_wrap=True,
        highlight=False,
    )


def plan_rows(costs: Costs, fleet: Fleet) -> list[dict[str, Any]]:
    """Return one row a stage and, last, the full model (`stage` None)."""
    rows = [_row(i, cost, costs.full, fleet) for i, cost in enumerate(costs.stages)]
    return [*rows, _row(None, costs.full, costs.full, fleet)]


def _row(stage: int | None, cost: StageCost, full: StageCost, fleet: Fleet) -> dict[str, Any]:
    return {
        "stage": stage,
        "blocks": cost.name,
        "memory_mib": cost.memory_bytes / MIB,
        "memory_share": cost.memory_bytes / full.memory_bytes,
        "step_gflop": cost.step_flops / 1e9,
        "frozen_gflop": cost.frozen_flops / 1e9,
        "upload_mib": cost.bytes_up / MIB,
        "frozen_mib": cost.frozen_elements * 4 / MIB,
        "elements_reduced": cost.trained_elements,
        "eligible": len(fleet.eligible(cost.memory_bytes)),
    }
