"""Seconds from the command to the begin and to the end of the first round; prints JSON.

    python benchmarks/start.py [--work digits resnet18] [--ranks 1 2 4] [--repeats 3]

`digits` is the shipped experiment; `resnet18` has width 64, random images of 3x32x32, two participants of 32 samples.
The end of the first round is when its line stands in metrics.jsonl, looked at every 10 ms; the begin is that less the
round's own `wall_s`. Medians; a run has one round, and `process_ends_s` and processor seconds, of all processes, are
until its end, with the last evaluation and what is written then.
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
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESNET18 = {
    "name": "start",
    "data": {"name": "synthetic", "synthetic_samples": 640, "partition": "iid"},
    "model": {"name": "resnet18", "width": 64},
    "fleet": {"devices": 20, "memory_cap_mib": 100_000},
    "train": {"participants": 2, "device": "cpu"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=["digits", "resnet18"], default=["digits", "resnet18"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for work in options.work:
        for ranks in options.ranks:
            found = [started(work, ranks) for _ in range(options.repeats)]
            rows.append({"work": work, "ranks": ranks} | {key: median(found, key) for key in found[0]})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {"torch": torch.__version__, "repeats": options.repeats, "starts": rows}, indent=2))


def median(found: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(each[key] for each in found), 2)


def started(work: str, ranks: int) -> dict[str, float]:
    """Start one run of one round and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = work, Path(folder) / "run"
        if work == "resnet18":
            config = str(Path(folder) / "start.yaml")
            Path(config).write_text(json.dumps(RESNET18))
        command = [sys.executable, "-m", "fedfreeze", "run", config, "--run-dir", str(run_dir), "--nproc", str(ranks)]
        command += ["--train.rounds=1"]
        environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(ROOT)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
        line = None
        while line is None:
            if process.poll() not in (None, 0):
                raise SystemExit(f"fedfreeze ended with {process.returncode}")
            time.sleep(0.01)
            line = first_round(run_dir / "metrics.jsonl")
        ended = time.monotonic() - began
        process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "round_begins_s": ended - line["wall_s"],
        "round_ends_s": ended,
        "process_ends_s": time.monotonic() - began,
        "processor_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def first_round(path: Path) -> dict[str, Any] | None:
    """Return the record of the first round; None: it is not written yet."""
    if not path.exists():
        return None
    for text in path.read_text().splitlines(keepends=True):
        if '"kind": "round"' in text and text.endswith("\n"):
            found: dict[str, Any] = json.loads(text)
            return found
    return None


if __name__ == "__main__":
    main()
