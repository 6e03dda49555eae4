"""What a round of each stage costs beside a round of the full model, with kept features and without; prints JSON.

    python benchmarks/stages.py [--model resnet18] [--width 64] [--devices 2] [--rounds 4] [--repeats 5] [--ranks 1]

All devices train in every round, 500 random images of 3x32x32 each, batch 32, one local epoch, no augmentation, so that
from the second round of a stage on all features are known. One after the other, `--repeats` times: FedAvg, SmartFreeze,
SmartFreeze with `cache.features`. Seconds are the median of a stage's rounds after its first; ratios are to the FedAvg
of the same repeat, their median is printed.
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

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "full": {"method": {"name": "fedavg"}},
    "recomputed": {"cache": {"features": False}},
    "kept": {"cache": {"features": True, "budget_mib": 16_000}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    for name, default in (("width", 64), ("devices", 2), ("rounds", 4), ("repeats", 5), ("ranks", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    ratios: dict[str, list[list[float]]] = {"recomputed": [], "kept": []}
    full_s = []
    for _ in range(options.repeats):
        seconds = {name: seconds_of(name, options) for name in SETTINGS}
        full = seconds["full"][0]
        full_s.append(full)
        for name, found in ratios.items():
            found.append([each / full for each in seconds[name]])
        print(json.dumps(seconds), file=sys.stderr, flush=True)
    stages = {
        name: [round(statistics.median(each), 3) for each in zip(*found, strict=True)] for name, found in ratios.items()
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | vars(options) | {"full_s": statistics.median(full_s), "ratios": stages}, indent=2))


def seconds_of(name: str, options: argparse.Namespace) -> list[float]:
    """Run a setting; return the seconds of a round of each stage."""
    stages = 1 if name == "full" else 4
    values: dict[str, Any] = {
        "name": "stages",
        "data": {
            "name": "synthetic",
            "synthetic_samples": options.devices * 500,
            "partition": "iid",
        },
        "model": {"name": options.model, "width": options.width},
        "fleet": {"devices": options.devices, "memory_cap_mib": 100_000},
        "train": {"rounds": stages * options.rounds, "participants": options.devices, "device": "cpu"},
        "pace": {"policy": "fixed"},
        "eval": {"every_rounds": 1000},
        "checkpoint": {"every_rounds": 1000},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "stages.yaml"
        config.write_text(json.dumps(values | SETTINGS[name]))
        command = [sys.executable, "-m", "fedfreeze", "run", str(config), "--run-dir", f"{folder}/run"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command += ["--nproc", str(options.ranks)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    found = []
    for stage in range(stages):
        # the last round of a stage is judged, so it is left out, too
        walls = [line["wall_s"] for line in rounds if line["stage"] == stage and line["stage_round"] > 1]
        found.append(statistics.median(walls[:-1] if len(walls) > 1 else walls))
    return found


if __name__ == "__main__":
    main()
