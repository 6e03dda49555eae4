"""Seconds of an evaluation of 10,000 test images beside a round, with kept features and without; prints JSON.

    python benchmarks/evaluation.py [--rounds 3] [--ranks 1] [--repeats 1]

SmartFreeze on ResNet-10 of width 16, random images of 3x32x32, 10 participants of 500 samples, evaluated every round.
Seconds are `parts_s` and `parts_processor_s` of metrics.jsonl (rank 0), medians over the rounds of a stage after its
first; with `cache.features` the first evaluation of a stage keeps what the frozen blocks put out, and stands apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each stage")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: the first of a stage stands apart, so it takes 2 or more")
    rows = []
    for repeat in range(options.repeats):
        for kept in (False, True):
            rows += [{"repeat": repeat, "features_kept": kept} | row for row in measured(kept, options)]
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {"torch": torch.__version__, "ranks": options.ranks, "stages": rows}, indent=2))


def measured(kept: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run once; return a row a stage."""
    values = {
        "name": "evaluation",
        "data": {"name": "synthetic", "synthetic_samples": 50_000, "partition": "iid"},
        "model": {"name": "resnet10", "width": 16},
        "fleet": {"devices": 100, "memory_cap_mib": 100_000},
        "train": {"rounds": 4 * options.rounds, "participants": 10, "device": "cpu"},
        "pace": {"policy": "fixed"},
        "eval": {"every_rounds": 1},
        "cache": {"features": kept},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "evaluation.yaml"
        config.write_text(json.dumps(values))
        command = [sys.executable, "-m", "fedfreeze", "run", str(config), "--run-dir", f"{folder}/run"]
        command += ["--nproc", str(options.ranks)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    rows = []
    for stage in sorted({line["stage"] for line in rounds}):
        first, *others = [line for line in rounds if line["stage"] == stage]
        row: dict[str, Any] = {"stage": stage + 1, "first_evaluate_s": first["parts_s"]["evaluate"]}
        for key in ("parts_s", "parts_processor_s"):
            for part in ("evaluate", "train"):
                row[f"{part}{key.removeprefix('parts')}"] = statistics.median(line[key][part] for line in others)
        rows.append(row)
        print(json.dumps({"features_kept": kept} | row), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
