"""What long runs cost: 20,000 rounds of a tiny network, and `compare` and `sync` of made runs of 100,000 rounds.

    python benchmarks/long_runs.py [--rounds 20000] [--made 100000] [--only rounds compare sync] [--write FILE]

Rounds: the last hundred must take no more than 1.2 times what the first hundred took, though all of them belong to one
stage, with a checkpoint and an evaluation each. Processor seconds are those of the process that trains, read from
/proc; wall seconds depend on what else the machine does. Compare: two runs, with pictures, under 2 minutes and 1 GB.
Sync: `--offline`, to a folder; the second time nothing is new, which must take seconds.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from fedfreeze.config.file import dump_config, make_config

NETWORK = """
from collections import OrderedDict
from torch import nn

def tiny(num_classes, in_channels, image_size):
    return nn.Sequential(OrderedDict(
        a=nn.Conv2d(in_channels, 4, 3, padding=1), relu=nn.ReLU(), b=nn.Conv2d(4, 4, 3, padding=1), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, num_classes),
    ))
"""
RUN = {
    "data": {"name": "digits", "partition": "iid"},
    "model": {"factory": "long_run_network:tiny", "split": ["a", "b"]},
    "fleet": {"devices": 100, "memory_cap_mib": 4.0},
    "train": {"participants": 4, "batch_size": 16, "learning_rate": 0.01, "device": "cpu"},
    "pace": {"min_rounds": 10**6},  # one stage to the end, watched all the time
}
STEP = 100  # rounds between two looks
DEVICES, PARTICIPANTS = 100, 10  # of a made run
TICKS = os.sysconf("SC_CLK_TCK")


def measure_rounds(folder: Path, rounds: int) -> list[str]:
    """Train, look every STEP rounds at the clock, the processor time and the memory; return lines for the report."""
    folder.mkdir()
    (folder / "long_run_network.py").write_text(NETWORK)
    config = {**RUN, "train": {**RUN["train"], "rounds": rounds}}  # type: ignore[dict-item]
    (folder / "long.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fedfreeze", "run", "long.yaml", "--run-dir", "run"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        looks = _watch(process, folder / "run" / "metrics.jsonl", rounds)
        if process.wait() != 0:
            raise SystemExit((folder / "log").read_text()[-2000:])
    wall, cpu, memory = zip(*looks, strict=True)
    lines = ["| rounds | wall s | processor s | resident MiB after |", "|---|---|---|---|"]
    spans = len(looks) - 1
    for span in sorted({0, spans // 4, spans // 2, 3 * spans // 4, spans - 1}):
        first = span * STEP + 2
        seconds = wall[span + 1] - wall[span], cpu[span + 1] - cpu[span]
        lines.append(
            f"| {first} to {first + STEP - 1} | {seconds[0]:.2f} | {seconds[1]:.2f} | {memory[span + 1]:.0f} |"
        )
    for name, seen in (("wall", wall), ("processor", cpu)):
        each = [after - before for before, after in itertools.pairwise(seen)]
        tenth = max(1, len(each) // 10)
        ends = statistics.median(each[:tenth]), statistics.median(each[-tenth:])
        lines.append(
            f"\n{name}: last hundred / first hundred {each[-1] / each[0]:.2f}; medians of hundreds, last tenth of the "
            f"run / first tenth {ends[1] / ends[0]:.2f}"
        )
    states = sorted((folder / "run" / "checkpoints").glob("round-*/state.json"))
    lines.append(f"\nstate.json of the last checkpoint: {states[-1].stat().st_size:,} bytes")
    return lines


def _watch(process: subprocess.Popen[bytes], metrics: Path, rounds: int) -> list[tuple[float, float, float]]:
    """Return wall seconds, processor seconds and resident MiB after round 1, 1 + STEP, 1 + 2 STEP, ..."""
    looks: list[tuple[float, float, float]] = []
    done, position = 0, 0
    while len(looks) <= (rounds - 2) // STEP:
        if process.poll() is not None:
            break
        time.sleep(0.005)
        if not metrics.exists():
            continue
        with open(metrics, "rb") as file:
            file.seek(position)
            new = file.read()
        position += len(new)
        done += new.count(b'"kind": "round"')
        if done > len(looks) * STEP:
            looks.append((time.monotonic(), *_used(process.pid)))
    return looks


def _used(process: int) -> tuple[float, float]:
    """Return processor seconds and resident MiB of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS, int(fields[21]) * resource.getpagesize() / 2**20


def make_run(folder: Path, rounds: int, seed: int) -> None:
    """Write the folder of a finished run that never was, with PARTICIPANTS of DEVICES devices in each round."""
    folder.mkdir(parents=True)
    values = {"name": "made", "fleet": {"devices": DEVICES}, "train": {"participants": PARTICIPANTS, "rounds": rounds}}
    (folder / "config.yaml").write_text(dump_config(replace(make_config(values), seed=seed)))
    draw = random.Random(seed)
    with open(folder / "metrics.jsonl", "w") as file:

        def write(kind: str, **values: object) -> None:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

        write("run_start", name="made", round=0, seed=seed)
        for number in range(1, rounds + 1):
            write("round", **_made_round(number, draw))
        write("stage", stage=0, blocks="all", reason="round_limit", rounds=rounds, accuracy=0.9)
        write("run_end", status="finished", rounds=rounds)
    summary = {"status": "finished", "exit_code": 0, "rounds": rounds, "full_memory_mib": 2.0, "inclusion": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"num_classes": 10, "image_shape": [1, 8, 8]}))
    rows = [f"{device},1.5,10,10{',1' * 10}" for device in range(DEVICES)]
    head = ",".join(["device", "memory_cap_mib", "samples", "labels", *(f"label_{label}" for label in range(10))])
    (folder / "partition.csv").write_text("\n".join([head, *rows]) + "\n")


def _made_round(number: int, draw: random.Random) -> dict[str, object]:
    """Return a round with the keys that a run writes."""
    selected = sorted(draw.sample(range(DEVICES), PARTICIPANTS))
    peaks = {str(device): 0.3 + draw.random() for device in selected}
    return {
        "round": number,
        "stage": 0,
        "stage_round": number,
        "selected": selected,
        "late": [],
        "failed": {},
        "train_loss": draw.random(),
        "accuracy": 1 - (number + 1) ** -0.3,
        "sparse": False,
        "perturbation": 0.2 + draw.random() / 10,
        "slope": draw.random() / 1000,
        "peak_memory_mib": peaks,
        "tensor_peak_mib": peaks,
        "cap_mib": dict.fromkeys(peaks, 1.5),
        "elements_reduced": 1234,
        "level": dict.fromkeys(peaks, 0),
        "probed": 0,
        "participation": 1.0,
        "bytes_up": 12_345_678,
        "bytes_down": 12_345_678,
        "emulated_s": draw.random(),
        "probe_s": 0.0,
        "wall_s": draw.random(),
    }


def measure_command(*arguments: object) -> str:
    """Run fedfreeze and return a row: what was run, wall seconds, processor seconds, largest resident size."""
    watched = (
        "import resource, subprocess, sys, time; began = time.monotonic(); "
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(code, time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
    )
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-c", watched, sys.executable, "-m", "fedfreeze", *words]
    code, wall, cpu, memory = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    if code != "0":
        raise SystemExit(f"fedfreeze {' '.join(words)} ended with {code}")
    return f"| {words[0]} | {float(wall):.1f} | {float(cpu):.1f} | {float(memory):.0f} |"


def main() -> None:
    """Measure and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--made", type=int, default=100_000)
    parser.add_argument(
        "--only", nargs="+", choices=("rounds", "compare", "sync"), default=("rounds", "compare", "sync")
    )
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    report: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "rounds" in options.only:
            report += [f"{options.rounds:,} rounds:\n", *measure_rounds(folder / "long", options.rounds), ""]
        made = [folder / "made" / str(seed) for seed in (0, 1)]
        if {"compare", "sync"} & set(options.only):
            for seed, run in enumerate(made):
                make_run(run, options.made, seed)
            size = (made[0] / "metrics.jsonl").stat().st_size / 2**20
            report += [f"Made runs of {options.made:,} rounds, metrics.jsonl of {size:.0f} MiB each:\n"]
            report += ["| command | wall s | processor s | peak resident MiB |", "|---|---|---|---|"]
        if "compare" in options.only:
            report += [measure_command("compare", *made, "--out", folder / "report")]
        if "sync" in options.only:
            report += [
                measure_command("sync", made[0], "--offline").replace("sync", f"sync, {when}")
                for when in ("the first time", "again")
            ]
    text = "\n".join([*report, "", f"Python {sys.version.split()[0]}, torch {torch.__version__}."])
    print(text)
    if options.write:
        options.write.write_text(f"# Long runs\n\n    {' '.join(['python', *sys.argv])}\n\n{text}\n")


if __name__ == "__main__":
    main()
