"""How fast a round is beside a plain loop in PyTorch that makes the same steps; prints JSON.

    python benchmarks/speed.py [--work resnet10 small_cnn resnet18 vit one_step] [--ranks 1 2] [--repeats 5]

Each work is done by fedfreeze (FedAvg, caps enforced, `--nproc`) and by as many processes of a tuned plain loop
(convolutions channels last, memory kept by the C library, fused SGD, one thread), in turn, `--repeats` times, the plain
loop before and after each of our runs. Wall seconds are the median of a run's rounds but the first and the last, which
is judged on the test data, too; processor seconds of a round are what a run of more rounds takes beyond one of one
round. Efficiency is the plain loop's seconds, the mean of both times, over ours; the median of the repeats. Images are
random, 3x32x32, batch 32, 500 a device; in `one_step` 8x8, ten a device, one step each.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fedfreeze.compute import keep_freed_memory
from fedfreeze.config.file import make_config
from fedfreeze.network.blocks import build_network
from fedfreeze.network.memory import gains, lay_channels_last, spoils

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Work:
    """What a round does."""

    model: dict[str, Any]
    participants: int
    rounds: int
    samples: int = 500
    batch_size: int = 32
    shape: tuple[int, int, int] = (3, 32, 32)


WORKS = {
    "small_cnn": Work({"factory": "networks:small_cnn"}, 10, 3),
    "resnet10": Work({"name": "resnet10", "width": 16}, 10, 2),
    "resnet18": Work({"name": "resnet18", "width": 64}, 2, 1),
    "vit": Work({"name": "vit", "width": 64}, 4, 2),
    "one_step": Work({"name": "resnet8", "width": 8}, 1000, 3, samples=10, batch_size=10, shape=(1, 8, 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain", nargs=3, metavar=("WORK", "DEVICES", "ROUNDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain is not None:
        name, devices, rounds = options.plain
        print(json.dumps(plain_loop(WORKS[name], int(devices), int(rounds))))
        return
    found = [measured(name, ranks, options.repeats) for name in options.work for ranks in options.ranks]
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {"torch": torch.__version__, "works": found}, indent=2))


def measured(name: str, ranks: int, repeats: int) -> dict[str, Any]:
    """Return medians over the repeats of both, and of the ratios of neighbours."""
    ours, plain = [], []
    after = by_plain_loop(name, ranks)
    for _ in range(repeats):
        before = after
        ours.append(by_fedfreeze(name, ranks))
        after = by_plain_loop(name, ranks)
        plain.append({key: (before[key] + after[key]) / 2 for key in before})
        print(f"{name}, {ranks} ranks: {ours[-1]} plain {plain[-1]}", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"work": name, "ranks": ranks, "repeats": repeats}
    for key in ("wall_s", "processor_s"):
        row[key] = statistics.median(each[key] for each in ours)
        row[f"plain_{key}"] = statistics.median(each[key] for each in plain)
        ratios = [theirs[key] / own[key] for own, theirs in zip(ours, plain, strict=True)]
        row[f"efficiency_{key.removesuffix('_s')}"] = round(statistics.median(ratios), 3)
    return row


def by_fedfreeze(name: str, ranks: int) -> dict[str, float]:
    """Run fedfreeze with one round, and with more; return the seconds of one of the others."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        first = _run(work, ranks, 1, Path(folder) / "one")
        more = _run(work, ranks, 2 + work.rounds, Path(folder) / "more")
        lines = [json.loads(line) for line in (Path(folder) / "more" / "metrics.jsonl").read_text().splitlines()]
    walls = [line["wall_s"] for line in lines if line["kind"] == "round"][1:-1]
    return {"wall_s": statistics.median(walls), "processor_s": (more - first) / (1 + work.rounds)}


def _run(work: Work, ranks: int, rounds: int, run_dir: Path) -> float:
    """Run fedfreeze; return the processor seconds of all its processes."""
    devices = 2 * work.participants
    values = {
        "name": "speed",
        "data": {
            "name": "synthetic",
            "synthetic_shape": list(work.shape),
            "synthetic_samples": devices * work.samples,
            "partition": "iid",
        },
        "model": work.model,
        "method": {"name": "fedavg"},
        "fleet": {"devices": devices, "memory_cap_mib": 100_000},
        "train": {"rounds": rounds, "participants": work.participants, "batch_size": work.batch_size, "device": "cpu"},
        "eval": {"every_rounds": 1000, "batch_size": 1000},
        "checkpoint": {"every_rounds": 1000},
    }
    config = run_dir.with_suffix(".yaml")
    config.write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "fedfreeze", "run", str(config), "--run-dir", str(run_dir), "--nproc", str(ranks)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_plain_loop(name: str, ranks: int) -> dict[str, float]:
    """Run the plain loop in as many processes at once; return the seconds of a round."""
    work = WORKS[name]
    shares = [work.participants // ranks + (rank < work.participants % ranks) for rank in range(ranks)]
    command = [sys.executable, str(Path(__file__).resolve()), "--plain", name]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(share), str(work.rounds)], stdout=subprocess.PIPE, text=True, env=environment)
        for share in shares
        if share
    ]
    found = [json.loads(process.communicate()[0]) for process in processes]
    walls = [max(each) for each in zip(*(one["wall_s"] for one in found), strict=True)]  # the slowest of each round
    return {"wall_s": statistics.median(walls), "processor_s": sum(one["processor_s"] for one in found)}


class PlainLoop:
    """Trains devices after one another from the same weights, as one would write it in PyTorch."""

    def __init__(self, work: Work, devices: int):
        torch.set_num_threads(1)
        keep_freed_memory()
        torch.manual_seed(0)
        self.work = work
        model = replace(make_config({"model": work.model}).model, memory_format="contiguous")
        self.network = build_network(model, work.shape, 10, 0).network.train()
        if gains(self.network) and not spoils(self.network):
            lay_channels_last(self.network)
        self.images = torch.randint(0, 256, (devices * work.samples, *work.shape), dtype=torch.uint8)
        self.labels = torch.randint(0, 10, (devices * work.samples,))
        parameters = self.network.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        named = self.network.state_dict(keep_vars=True)
        self.tensors = [tensor for tensor in named.values() if tensor.is_floating_point()]
        self.start = [tensor.detach().clone() for tensor in self.tensors]

    def train(self, device: int, total: list[torch.Tensor]) -> None:
        """Train one device and add what it changed."""
        with torch.no_grad():
            torch._foreach_copy_([tensor.data for tensor in self.tensors], self.start)
        self.optimizer.state.clear()
        rows = torch.randperm(self.work.samples) + device * self.work.samples
        for chosen in rows.split(self.work.batch_size):
            batch = (self.images[chosen].float() / 255 - 0.5) / 0.25
            self.optimizer.zero_grad()
            functional.cross_entropy(self.network(batch), self.labels[chosen]).backward()
            self.optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub([tensor.data for tensor in self.tensors], self.start)
            torch._foreach_add_(total, change, alpha=self.work.samples)


def plain_loop(work: Work, devices: int, rounds: int) -> dict[str, Any]:
    """Return the wall seconds of each round but the first, and the processor seconds of one."""
    loop = PlainLoop(work, devices)
    walls = []
    began = 0.0
    for number in range(rounds + 1):
        if number == 1:
            began = time.process_time()
        started = time.perf_counter()
        total = [torch.zeros_like(tensor) for tensor in loop.start]
        for device in range(devices):
            loop.train(device, total)
        walls.append(time.perf_counter() - started)
    return {"wall_s": walls[1:], "processor_s": (time.process_time() - began) / rounds}


if __name__ == "__main__":
    main()
