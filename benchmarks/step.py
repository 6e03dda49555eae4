"""What a device costs beside a plain loop that makes its steps, taken in turn in one process; prints JSON.

    python benchmarks/step.py [--work resnet10 small_cnn resnet18 vit] [--processes 2] [--pairs 15]

As benchmarks/speed.py, without what a round has besides: our emulator trains a device under its cap (batches, local
training, difference, exact sum, report), the plain loop does the same steps, and so on. The two of a pair are a second
or two apart, so that a machine that others use disturbs the ratio little. `--processes` do so at once, as ranks do.
Efficiency: the plain loop's processor seconds over ours, the median of all pairs.

    python benchmarks/step.py --stages resnet18 [--processes 1] [--pairs 5] [--samples 160]

A device in each stage of SmartFreeze with features that are known, in turn with the same device on the full model; the
median of the pairs of processor seconds, stage over full model.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from speed import WORKS, PlainLoop, Work

from fedfreeze.compute import keep_freed_memory
from fedfreeze.config.file import make_config
from fedfreeze.data.store import Data, Split
from fedfreeze.device.emulator import Emulator
from fedfreeze.messages import Assignment, RoundPlan
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network

DEVICES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=["resnet10", "small_cnn", "resnet18", "vit"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--stages", choices=WORKS)
    parser.add_argument("--samples", type=int, default=160, help="of a device, with --stages")
    options = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, **vars(options)}
    if options.stages is not None:
        tasks = [(options.stages, options.samples, options.pairs)] * options.processes
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            of_processes = pool.starmap(stage_ratios, tasks)
        stages = [[ratio for one in of_stage for ratio in one] for of_stage in zip(*of_processes, strict=True)]
        ratios = [{"median": round(statistics.median(r), 3), "all": [round(x, 3) for x in sorted(r)]} for r in stages]
        print(json.dumps(machine | {"ratios": ratios}, indent=2))
        return
    found = []
    for name in options.work:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            pairs = [pair for of in pool.starmap(pairs_of, [(name, options.pairs)] * options.processes) for pair in of]
        ours, plain = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratios = sorted(theirs / own for own, theirs in pairs)
        found.append(
            {
                "work": name,
                "processor_s": ours,
                "plain_processor_s": plain,
                "efficiency": round(statistics.median(ratios), 3),
                "quartiles": [round(each, 3) for each in statistics.quantiles(ratios)[::2]],
            }
        )
    print(json.dumps(machine | {"works": found}, indent=2))


def pairs_of(name: str, count: int) -> list[tuple[float, float]]:
    """Return processor seconds of a device of ours, and of the plain loop's, so often."""
    work = WORKS[name]
    plain = PlainLoop(work, DEVICES)
    split = Split(plain.images.numpy(), plain.labels.numpy())
    ours = next(ours_on(work, split, {"method": {"name": "fedavg"}}))

    def theirs(device: int) -> None:
        plain.train(device, [torch.zeros_like(tensor) for tensor in plain.start])

    return in_turn(ours, theirs, count)


def stage_ratios(name: str, samples: int, count: int) -> list[list[float]]:
    """Return for each stage the processor seconds of a device with known features over those on the full model."""
    work = replace(WORKS[name], samples=samples)
    torch.set_num_threads(1)
    keep_freed_memory()
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (DEVICES * samples, *work.shape), dtype=np.uint8)
    split = Split(images, draw.integers(0, 10, len(images)))
    full = next(ours_on(work, split, {"method": {"name": "fedavg"}}))
    found = []
    for stage in ours_on(work, split, {"cache": {"features": True, "budget_mib": 10_000}}):
        found.append([of_stage / of_full for of_stage, of_full in in_turn(stage, full, count)])
    return found


def ours_on(work: Work, split: Split, settings: dict[str, Any]) -> Iterator[Callable[[int], None]]:
    """Yield for each stage what trains a device as a run does."""
    train = {"participants": DEVICES, "batch_size": work.batch_size, "device": "cpu"}
    config = make_config({"model": work.model, "fleet": {"devices": DEVICES}, "train": train, **settings})
    data = Data(split, split, 10, (0.5,) * work.shape[0], (0.25,) * work.shape[0], None)
    parts = np.split(np.arange(len(split)), DEVICES)
    method = make_method(config, build_network(config.model, work.shape, 10, 0))
    emulator = Emulator(config, data, parts, method, torch.device("cpu"))
    for index in range(method.num_stages):
        if index:
            method.begin_stage(index)
        emulator.enter_stage(index)
        plan = RoundPlan(1, index, 1, (), 0.01, 30)

        def train_one(device: int, plan: RoundPlan = plan) -> None:
            (report,) = emulator.train([Assignment(device, 0, 10**12)], plan, emulator.empty_update(plan))
            assert report.failed is None, report.failed

        yield train_one
        emulator.leave_stage()


def in_turn(one: Callable[[int], None], other: Callable[[int], None], count: int) -> list[tuple[float, float]]:
    """Return processor seconds of both, so often, after once for each device: it warms up and is counted."""
    found = []
    for number in range(-DEVICES, count):
        pair = []
        for train_one in (one, other):
            began = time.process_time()
            train_one(number % DEVICES)
            pair.append(time.process_time() - began)
        if number >= 0:
            found.append((pair[0], pair[1]))
    return found


if __name__ == "__main__":
    main()
