"""What a whole SmartFreeze run costs beside FedAvg for as many rounds, evaluation included; prints JSON.

    python benchmarks/whole_run.py --data FOLDER [--rounds 100] [--repeats 5] [--ranks 2] [--key KEY=VALUE ...]

The shipped experiment `cifar10` (ResNet-10 of width 16, 10 of 100 devices a round, tested every fifth round), its
stages of equal length, with the CIFAR-10 in FOLDER. One after the other, `--repeats` times: FedAvg on the whole model
without caps, SmartFreeze with kept features, SmartFreeze that calculates its frozen blocks anew. Ratios are to the
FedAvg of the same repeat: wall seconds of all rounds and what lies between them, processor seconds of all processes
from start to end.
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

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "fedavg": ["--method.name=fedavg", "--fleet.enforce=false"],
    "smartfreeze": ["--cache.features=true"],
    "recomputed": ["--cache.features=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    for name, default in (("rounds", 100), ("repeats", 5), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--key", nargs="*", default=[], help="settings for all, such as data.image_size=16")
    options = parser.parse_args()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.repeats):
        for name, found in seconds.items():
            found.append(seconds_of(name, options))
            print(name, found[-1], file=sys.stderr, flush=True)
    base = seconds.get("fedavg", [])
    ratios = {
        name: {
            key: round(statistics.median(a[key] / b[key] for a, b in zip(found, base, strict=True)), 3)
            for key in ("wall_s", "processor_s")
        }
        for name, found in seconds.items()
        if base
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | vars(options) | {"seconds": seconds, "ratios": ratios}, indent=2))


def seconds_of(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run a setting; return its rounds' wall seconds, and those of the whole of it with its start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedfreeze", "run", "cifar10", "--run-dir", f"{folder}/run"]
        command += ["--nproc", str(options.ranks), f"--data.path={options.data}", f"--train.rounds={options.rounds}"]
        command += ["--pace.policy=fixed", "--pace.min_rounds=1", *SETTINGS[name], *(f"--{key}" for key in options.key)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
        whole_s = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    wall_s = sum(line["wall_s"] + line["parts_s"]["write"] for line in rounds)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    accuracy = next(line["accuracy"] for line in reversed(rounds) if line["accuracy"] is not None)
    return {"wall_s": wall_s, "whole_s": whole_s, "processor_s": processor_s, "accuracy": accuracy}


if __name__ == "__main__":
    main()
