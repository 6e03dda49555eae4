"""What a device costs beside a plain loop that makes its steps, taken in turn in one process; prints JSON.

    python benchmarks/step.py [--work resnet10 small_cnn resnet18 vit] [--processes 2] [--pairs 15]

As benchmarks/speed.py, without what a round has besides: our emulator trains a device under its cap (batches, local
training, difference, exact sum, report), the plain loop does the same steps, and so on. The two of a pair are a second
or two apart, so that a machine that others use disturbs the ratio little. `--processes` do so at once, as ranks do.
Efficiency: the plain loop's processor seconds over ours, the median of all pairs.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time

import numpy as np
import torch
from speed import WORKS, PlainLoop

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
    options = parser.parse_args()
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
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {"torch": torch.__version__, **vars(options), "works": found}, indent=2))


def pairs_of(name: str, count: int) -> list[tuple[float, float]]:
    """Return processor seconds of a device of ours, and of the plain loop's, so often."""
    work = WORKS[name]
    plain = PlainLoop(work, DEVICES)
    train = {"participants": DEVICES, "batch_size": work.batch_size, "device": "cpu"}
    config = make_config(
        {"model": work.model, "method": {"name": "fedavg"}, "fleet": {"devices": DEVICES}, "train": train}
    )
    split = Split(plain.images.numpy(), plain.labels.numpy())
    data = Data(split, split, 10, (0.5,) * work.shape[0], (0.25,) * work.shape[0], None)
    parts = np.split(np.arange(len(split)), DEVICES)
    blocked = build_network(config.model, work.shape, 10, 0)
    emulator = Emulator(config, data, parts, make_method(config, blocked), torch.device("cpu"))
    emulator.enter_stage(0)
    plan = RoundPlan(1, 0, 1, (), 0.01, 30)

    def ours(device: int) -> None:
        (report,) = emulator.train([Assignment(device, 0, 10**12)], plan, emulator.empty_update(plan))
        assert report.failed is None, report.failed

    def theirs(device: int) -> None:
        plain.train(device, [torch.zeros_like(tensor) for tensor in plain.start])

    found = []
    for number in range(-1, count):  # the first of each warms up, and is counted under its cap
        pair = []
        for train_one in (ours, theirs):
            began = time.process_time()
            train_one(number % DEVICES)
            pair.append(time.process_time() - began)
        if number >= 0:
            found.append((pair[0], pair[1]))
    return found


if __name__ == "__main__":
    main()
