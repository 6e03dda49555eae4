"""Where a round goes with many devices: seconds and memory by part of the round; prints JSON.

    python benchmarks/scale.py [--devices 100 1000 10000] [--participants 10 100 1000] [--select uniform smartfreeze]
        [--rounds 12] [--refresh 6] [--ranks 1]

Each device has ten synthetic images of 8x8 and makes one step of a ResNet-8 of width 16 (FedAvg). Parts are those of
metrics.jsonl (`parts_s`, `parts_processor_s`, of rank 0), means over the rounds after the first; `beside_training` is
the share of the round that is not `train`, waiting for other ranks not counted. Rounds in which devices are asked
stand apart: with `smartfreeze` one in `--refresh`, and the first, which imports and counts, and is told alone. Memory
is rank 0's resident size when the round was written.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--participants", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--select", nargs="+", default=["uniform", "smartfreeze"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--refresh", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for select in options.select:
        for devices in options.devices:
            for participants in options.participants:
                if participants < devices:
                    case = {"select": select, "devices": devices, "participants": participants}
                    rows.append(case | measured(case, options))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    facts = {"torch": torch.__version__, "ranks": options.ranks, "rounds": options.rounds}
    print(json.dumps(machine | facts | {"cases": rows}, indent=2))


def measured(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one case and return its figures."""
    values = {
        "name": "scale",
        "data": {
            "name": "synthetic",
            "synthetic_shape": [1, 8, 8],
            "synthetic_samples": case["devices"] * SAMPLES,
            "partition": "iid",
        },
        "model": {"name": "resnet8", "width": 16},
        "method": {"name": "fedavg"},
        "fleet": {"devices": case["devices"], "memory_cap_mib": 100_000},
        "train": {"rounds": options.rounds, "participants": case["participants"], "batch_size": SAMPLES},
        "select": {"name": case["select"]}
        | ({"refresh_rounds": options.refresh} if case["select"] != "uniform" else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        config = Path(folder) / "scale.yaml"
        config.write_text(json.dumps(values))
        resident = run_watched(config, run_dir, options.ranks)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        written = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    rounds = [line for line in lines if line["kind"] == "round"]
    asking = [line for line in rounds[1:] if line["probed"]]
    plain = [line for line in rounds[1:] if not line["probed"]]
    found: dict[str, Any] = {"run_folder_mib": written / 2**20} | ({"plain_rounds": figures_of(plain)} if plain else {})
    if asking:
        found["asking_rounds"] = figures_of(asking)
        found["all_rounds_beside_training"] = figures_of(rounds[1:])["beside_training"]
    found["first_round"] = figures_of(rounds[:1])
    # the first rounds still fill caches
    looks = {number: mib for number, mib in resident.items() if number % max(1, options.rounds // 10) == 0}
    found["resident_mib"] = {str(number): round(mib, 1) for number, mib in looks.items()}
    return found


def run_watched(config: Path, run_dir: Path, ranks: int) -> dict[int, float]:
    """Run fedfreeze; return MiB of resident memory of its first process by the rounds written then."""
    command = [sys.executable, "-m", "fedfreeze", "run", str(config), "--run-dir", str(run_dir), "--nproc", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    found: dict[int, float] = {}
    position = rounds = 0
    while process.poll() is None:
        time.sleep(0.05)
        try:
            with open(run_dir / "metrics.jsonl", "rb") as file:
                file.seek(position)
                new = file.read()
            status = Path(f"/proc/{first_rank(process.pid)}/status").read_text()
        except OSError:
            continue
        position += len(new)
        rounds += new.count(b'"kind": "round"')
        size = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), None)
        if rounds and size is not None:
            found.setdefault(rounds, int(size) / 1024)
    if process.returncode:
        raise SystemExit(f"fedfreeze ended with {process.returncode}")
    return found


def first_rank(pid: int) -> int:
    """Return the process of rank 0: the first that `--nproc` has started, or the command itself for one rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean seconds of rounds, by part, and the share of the round that is not training."""
    parts = list(rounds[0]["parts_s"])

    def means(key: str) -> dict[str, float]:
        return {part: round(statistics.mean(line[key][part] for line in rounds), 5) for part in parts}

    wall, processor = means("parts_s"), means("parts_processor_s")
    busy = {kind: {part: s for part, s in found.items() if part != "wait"} for kind, found in
            (("wall", wall), ("processor", processor))}  # fmt: skip
    return {
        "rounds": len(rounds),
        "wall_s": sum(wall.values()),
        "processor_s": sum(processor.values()),
        "parts_wall_s": wall,
        "parts_processor_s": processor,
        "beside_training": {kind: round(1 - found["train"] / sum(found.values()), 4) for kind, found in busy.items()},
    }


if __name__ == "__main__":
    main()
