"""`fedfreeze plan`: what each stage needs and which devices can join, before anything is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fedfreeze.config.schema import Config
from fedfreeze.data.partition import partition_of
from fedfreeze.data.partition_summary import draw_partition, summarise
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.device.cost import Costs, StageCost, WayCost, fit_method, measure_costs
from fedfreeze.device.features import check_storable
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.plan.calibrate import calibrate, machine_gflops, speed_rows, speed_table, spread
from fedfreeze.run.reporter import LastingConsole
from fedfreeze.server.clock import EmulatedClock
from fedfreeze.units import FLOAT_BYTES, MIB, duration


def plan(config: Config, *, as_json: bool, partition_picture: Path | None = None) -> None:
    """Print the cost of every stage beside the full model, and how many devices can join each."""
    data = open_store(prepare(config.data))
    fleet = make_fleet(config.fleet, config.seed)
    fitted = fit_method(config, data.image_shape, data.num_classes, fleet.memory_cap_bytes)
    check_storable(config, data.image_shape, data.num_classes, fitted, torch.device("cpu"))
    costs = measure_costs(config, data.image_shape, data.num_classes, fitted, reserved=True)
    rows = plan_rows(costs, fleet)
    parts = summarise(partition_of(data, config), data)
    views = config.data.view_count or 1
    clock = EmulatedClock(fleet, parts.samples.tolist(), costs, config.train, views)
    seconds = round_seconds(clock, costs, fleet)
    in_flash = views * int(parts.samples.max()) if config.train.prefix == "stored" else 0
    for row in rows:
        row["flash_mib"] = in_flash * row["feature_kib"] / 1024
        if row["stage"] is not None:
            row |= seconds[row["stage"]]
    stores = any(row["flash_mib"] for row in rows)
    if partition_picture is not None:
        draw_partition(parts, partition_picture)
    if as_json:
        print(json.dumps({"batch_size": config.train.batch_size, "devices": len(fleet), "stages": rows}, indent=2))
        return
    console = LastingConsole()
    console.print(stage_table(rows, title_of(config, data, fleet)))
    least = min(costs.least_samples)
    few = int((parts.samples < least).sum())
    too_few = f"; {few} devices have fewer than {least}, too few to train" if few else ""
    every = min(len(fleet.eligible(needed)) for needed in costs.needed_bytes)
    samples, labels = parts.samples, parts.labels
    frozen = (
        "flash: what the device with most samples stores of its frozen blocks, which it\n"
        f"runs once a stage for {views} view{'s' * (views > 1)} of each sample\n"
        if stores
        else "frozen: share of a step's FLOPs spent in the frozen prefix\n"
    )
    times = ", ".join(f"{_time(stage['round_s_median'])} ({_time(stage['round_s_slowest'])})" for stage in seconds)
    first = ", ".join(_time(stage["first_round_s_median"]) for stage in seconds)
    left_out = "ways that need no less than one before are left out\n" if len(worth_a_line(rows)) < len(rows) else ""
    console.print(
        f"{every} of {len(fleet)} devices can join every stage, {rows[-1]['eligible']} could hold the full model.\n"
        f"peak: tensor bytes of one training step\n{_reserved_told(config, rows)}{frozen}"
        f"up: what a device sends a round\n{left_out}nothing was trained\n"
        f"emulated time of a round, median device that can join (slowest), by stage:\n{times}\n"
        + (f"and of the first of each device, in which it stores, the median: {first}\n" if stores else "")
        + f"samples a device: {samples.min()} to {samples.max()}, mean {samples.mean():.1f}{too_few}; "
        f"labels a device: {labels.min()} to {labels.max()} of {data.num_classes}",
        soft_wrap=True,
        highlight=False,
    )


def round_seconds(clock: EmulatedClock, costs: Costs, fleet: Fleet) -> list[dict[str, float | None]]:
    """Return for each stage what a round takes the median and the slowest device that can join, in emulated seconds.

    And the median's first round, which is longer where devices store features then (`train.prefix: stored`).
    """
    found = []
    for stage, needed in enumerate(costs.needed_bytes):
        clock.enter_stage(stage)
        able = fleet.eligible(needed)
        first = clock.round_seconds()[able]
        clock.features_held[:] = True
        seconds = clock.round_seconds()[able]
        figures = (float(np.median(seconds)), float(seconds.max()), float(np.median(first))) if able else (None,) * 3
        found.append(dict(zip(("round_s_median", "round_s_slowest", "first_round_s_median"), figures, strict=True)))
    return found


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def plan_calibrated(config: Config, *, as_json: bool) -> None:
    """Time real training steps of every stage here, and print which `fleet.speed_gflops` stands for this machine."""
    data = open_store(prepare(config.data))
    fleet = make_fleet(config.fleet, config.seed)
    fitted = fit_method(config, data.image_shape, data.num_classes, fleet.memory_cap_bytes)
    costs = measure_costs(config, data.image_shape, data.num_classes, fitted)
    console = LastingConsole(stderr=as_json)
    with console.status("training steps"):
        speeds = calibrate(config, data.image_shape, data.num_classes, costs, fitted)
    rows, speed, ratio = speed_rows(speeds), machine_gflops(speeds), spread(speeds)
    batch, threads = config.train.batch_size, config.train.threads_per_rank
    if as_json:
        found = {"batch_size": batch, "threads": threads, "speed_gflops": speed, "spread": ratio, "stages": rows}
        print(json.dumps(found, indent=2))
        return
    plural = "s" * (threads > 1)
    title = f"this machine: {config.model.label}, batch {batch}, {threads} thread{plural}"
    console.print(speed_table(rows, title))
    uneven = (
        f"The fastest stage reaches {ratio:.2f} times the speed of the slowest; the time model takes one for all.\n"
    )
    if len(rows) == 1:
        uneven = ""
    console.print(
        f"--fleet.speed_gflops={speed:.3g} stands for this machine with {threads} thread{plural}: all stages' "
        f"operations by their seconds.\n{uneven}GFLOP/step: by the cost model; s/step: median of the timed steps. The "
        "weights stayed as they were.",
        soft_wrap=True,
        highlight=False,
    )


def title_of(config: Config, data: Data, fleet: Fleet) -> str:
    """Return what a table of stages is about: network, images, batch and fleet."""
    size = "x".join(str(length) for length in data.image_shape)
    return f"{config.model.label}, images {size}, batch {config.train.batch_size}, {len(fleet)} devices"


def stage_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Return what the stages cost as a table for a terminal."""
    reserved = ["reserved"] if any(row["reserved_mib"] for row in rows) else []
    several = len({row["way"] for row in rows}) > 1  # then there is no room for two of the columns at their widest
    between = 1 if reserved else 2
    table = Table(title=title, box=None, padding=(0, between, 0, 0), header_style="underline", title_justify="left")
    stores = any(row.get("flash_mib") for row in rows)
    once = "flash MiB" if stores else "frozen"
    ways, share = (["way"], []) if several else ([], ["of full"])
    gflop = "GFLOP" if several or reserved else "GFLOP/step"
    for heading in ("stage", "blocks", *ways, "peak MiB", *reserved, *share, gflop, once, "up MiB", "eligible"):
        table.add_column(heading, justify="left" if heading in ("blocks", "way") else "right", overflow="fold")
    before = None
    for row in worth_a_line(rows):
        again, before = before == (row["stage"], row["level"]), (row["stage"], row["level"])
        table.add_row(
            "" if again else _stage_label(row),
            "" if again else row["blocks"],
            *([row["way"]] if several else []),
            f"{row['memory_mib']:.2f}",
            *([_mib(row["reserved_mib"])] if reserved else []),
            *([] if several else [f"{row['memory_share']:.0%}"]),
            f"{row['step_gflop'] - stores * row['frozen_gflop']:.2f}",
            f"{row['flash_mib']:.2f}" if stores else f"{row['frozen_gflop'] / row['step_gflop']:.0%}",
            f"{row['upload_mib']:.2f}",
            str(row["eligible"]),
        )
    return table


def worth_a_line(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows but for ways that need no less than one before them: no device ever takes these."""
    found: list[dict[str, Any]] = []
    for row in rows:
        before = [each for each in found if (each["stage"], each["level"]) == (row["stage"], row["level"])]
        needs = [name for name in ("memory_mib", "reserved_mib") if row[name] is not None]
        if not before or any(row[name] < min(each[name] for each in before) for name in needs):
            found.append(row)
    return found


def _reserved_told(config: Config, rows: list[dict[str, Any]]) -> str:
    """Return what the column of reserved bytes says, a line; empty where there is none."""
    if not any(row["reserved_mib"] for row in rows):
        return ""
    joins = ", by which they join" if config.fleet.accounting == "cuda_segments" else ""
    return f"reserved: MiB that a GPU's allocator would reserve, predicted without workspaces{joins}\n"


def _mib(reserved_mib: float | None) -> str:
    """Return what is reserved, in whole segments."""
    return "-" if reserved_mib is None else f"{reserved_mib:.0f}"


def _stage_label(row: dict[str, Any]) -> str:
    if row["stage"] is None:
        return "full"
    return str(row["stage"] + 1) if row["level"] is None else f"{row['stage'] + 1}.{row['level'] + 1}"


def plan_rows(costs: Costs, fleet: Fleet) -> list[dict[str, Any]]:
    """Return rows of the stages, and last of the full model (`stage` None): one for each sub-model and way.

    A sub-model has a number (`level`) where a stage has several. `eligible` are the devices whose cap holds that way.
    """
    rows = []
    for stage, levels in enumerate(costs.levels):
        for level, cost in enumerate(levels):
            rows += _rows(stage, level if len(levels) > 1 else None, cost, costs.full, fleet)
    return [*rows, *_rows(None, None, costs.full, costs.full, fleet)]


def _rows(stage: int | None, level: int | None, cost: StageCost, full: StageCost, fleet: Fleet) -> list[dict[str, Any]]:
    """Return a row for each way to take its steps."""
    return [_row(stage, level, cost, way, full, fleet) for way in cost.ways]


def _row(
    stage: int | None, level: int | None, cost: StageCost, way: WayCost, full: StageCost, fleet: Fleet
) -> dict[str, Any]:
    return {
        "stage": stage,
        "level": level,
        "blocks": cost.name,
        "way": way.way.name,
        "memory_mib": way.memory_bytes / MIB,
        "memory_share": way.memory_bytes / full.ways[0].memory_bytes,
        "reserved_mib": None if way.reserved_bytes is None else way.reserved_bytes / MIB,
        "step_gflop": way.step_flops / 1e9,
        "frozen_gflop": cost.frozen_flops / 1e9,
        "upload_mib": cost.bytes_up / MIB,
        "frozen_mib": cost.frozen_elements * FLOAT_BYTES / MIB,
        "feature_kib": cost.feature_bytes / 1024,
        "elements_reduced": cost.trained_elements,
        "eligible": len(fleet.eligible(way.needed_bytes)),
    }
