"""Checks of the GPU path that start runs: the same bits, killed ranks, a study; used by gpu_checks.py."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_table import ROOT, Row, kill_all, run_limited, start

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.torch_transport import TorchTransport
from fedfreeze.compute import choose_device


@dataclass
class Setting:
    """Where and how long a check runs, and how large: on a CPU as small as can be."""

    device: str
    ends: float
    """On the monotonic clock."""
    profile: str | None = None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fedfreeze-gpu-")))

    @property
    def on_gpu(self) -> bool:
        """Whether it is the real thing."""
        return self.device == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()


def program(run_dir: Path, config: Path, *options: str, ranks: int = 1) -> list[str]:
    """Return the command line of a run."""
    command = [sys.executable, "-m", "fedfreeze", "run", str(config), "--run-dir", str(run_dir), *options]
    return [*command, "--nproc", str(ranks)]


def shown(command: list[str]) -> str:
    """Return a command as a person would type it, without the folders of this run."""
    return " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in command[1:])])


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of rounds that a run folder holds so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "round"]


def sha256(run_dir: Path) -> str:
    """Return the digest of the deployed network; a word where there is none."""
    path = run_dir / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1][:200]


def ranks_of(parent: int) -> list[int]:
    """Return the processes that --nproc has started, by rank."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


# --- 3: bits ---


def write_config(setting: Setting, name: str, **sections: Any) -> Path:
    """Write a small configuration of what runs on this device: digits, or images like those of CIFAR."""
    small = not setting.on_gpu
    values: dict[str, Any] = {
        "name": name,
        "data": {"name": "digits", "alpha": 0.3},
        "model": {"name": "resnet8", "width": 8 if small else 32},
        "fleet": {"devices": 12, "memory_cap_mib": [0.33, 0.4, 0.9] if small else [30, 45, 80, 200]},
        "train": {"rounds": 6, "participants": 6, "batch_size": 16, "device": setting.device},
        "pace": {"policy": "fixed"},
        "comm": {"heartbeat_s": 10},
    }
    if name == "cifar-like":
        values["data"] = {"name": "synthetic", "synthetic_shape": [3, 32, 32], "synthetic_samples": 1200}
        values["data"] |= {"augment": "crop_flip"}
        values["fleet"]["memory_cap_mib"] = [5, 9] if small else [60, 90, 160, 400]
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    path = setting.folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def bits(setting: Setting) -> Iterator[Row]:
    """One sha256 on one rank, on two that share the GPU, and after a kill; NCCL sums whole numbers exactly."""
    for name in ("digits-like", "cifar-like"):
        config = write_config(setting, name)
        one = setting.folder / f"{name}-one"
        command = program(one, config)
        code, out, err = run_limited(command, setting.left_s)
        wanted = sha256(one)
        failed = sum(len(record["failed"]) for record in rounds_of(one))
        seen = f"{wanted[:16]}, {failed} devices failed" if code == 0 else f"exit code {code}: {last_line(err or out)}"
        yield Row(f"{name}, 1 rank", shown(command), "exit code 0", seen, code == 0, {"sha256": wanted})
        for what, go in (("again", same), ("2 ranks on one GPU", shared), ("2 ranks, killed and resumed", resumed)):
            if setting.left_s < 15 or wanted == "none":
                why = "nothing to compare with" if wanted == "none" else "no time left"
                yield Row(f"{name}, {what}", seen=f"not tried: {why}")
                continue
            run_dir = setting.folder / f"{name}-{what.split()[0]}-{len(what)}"
            command, note = go(setting, config, run_dir)
            passed = sha256(run_dir) == wanted and "after round 6" not in note
            yield Row(f"{name}, {what}", shown(command), wanted[:16], f"{sha256(run_dir)[:16]}{note}", passed)
    yield nccl_of_one(setting)


def same(setting: Setting, config: Path, run_dir: Path) -> tuple[list[str], str]:
    """Run on one rank."""
    command = program(run_dir, config)
    run_limited(command, setting.left_s)
    return command, ""


def shared(setting: Setting, config: Path, run_dir: Path) -> tuple[list[str], str]:
    """Run on two ranks."""
    command = program(run_dir, config, ranks=2)
    run_limited(command, setting.left_s)
    return command, ""


def resumed(setting: Setting, config: Path, run_dir: Path) -> tuple[list[str], str]:
    """Run on two ranks, kill all of them after two rounds, and run again."""
    command = program(run_dir, config, ranks=2)
    process = start(command)  # of so few rounds that nobody need read what it says
    while len(rounds_of(run_dir)) < 2 and process.poll() is None and setting.left_s > 0:
        time.sleep(0.05)
    killed_after = len(rounds_of(run_dir))
    kill_all(process)
    process.communicate()
    run_limited(command, max(1.0, setting.left_s))
    return command, f" (killed after round {killed_after})"


def nccl_of_one(setting: Setting) -> Row:
    """Sum whole numbers past 2^53 by NCCL, with one rank; fedfreeze itself opens nothing for one."""
    what = "NCCL, a group of one rank: a sum of int64"
    if not setting.on_gpu:
        return Row(what, seen="not tried: it needs a GPU")
    device = choose_device("cuda", 0)
    launch = Launch("nproc", store_file=str(setting.folder / "store"))
    transport = TorchTransport(launch, device, timeout_s=60, join_s=60)
    wanted = torch.arange(2**60, 2**60 + 10_000)
    tensor = wanted.to(device)
    done = transport.all_reduce(tensor).wait(30)
    right = done and torch.equal(tensor.cpu(), wanted)
    transport.close()
    return Row(
        what,
        expected="by nccl, exact",
        seen=f"by {transport.backend}, {'exact' if right else 'wrong'}",
        passed=right and transport.backend == "nccl",
    )


# --- 4: kills ---


def kills(setting: Setting) -> Iterator[Row]:
    """A rank is killed: the other leaves with 76 in time."""
    yield kill(setting, "gloo", 2)
    gpus = torch.cuda.device_count() if setting.on_gpu else 0
    if gpus < 2:
        yield Row("kill of a rank, nccl", seen=f"not tried: it needs two GPUs, here are {gpus}")
    else:
        yield kill(setting, "nccl", 2)


def kill(setting: Setting, backend: str, ranks: int) -> Row:
    """Kill rank 1 in a round of a run; nccl: where each rank has a GPU of its own, which gloo ranks here do not."""
    heartbeat_s = 10
    config = write_config(setting, f"kill-{backend}", train={"rounds": 200, "local_epochs": 5})
    run_dir = setting.folder / f"kill-{backend}"
    command = program(run_dir, config, ranks=ranks)
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": "0"} if backend == "gloo" and setting.on_gpu else {})
    process = start(command, environment)
    what, expected = f"kill of a rank, {backend}", f"exit code 76 within {heartbeat_s} s, by {backend}"
    try:
        while len(rounds_of(run_dir)) < 2 and process.poll() is None and setting.left_s > heartbeat_s + 5:
            time.sleep(0.05)
        victims = ranks_of(process.pid)
        if len(rounds_of(run_dir)) < 2 or len(victims) < 2:
            kill_all(process)
            return Row(what, shown(command), expected, f"no second round: {last_line(process.communicate()[0])}", False)
        os.kill(victims[1], signal.SIGKILL)
        started = time.monotonic()
        try:
            out, _ = process.communicate(timeout=heartbeat_s + 15)
        except subprocess.TimeoutExpired:
            return Row(what, shown(command), expected, f"still there {heartbeat_s + 15} s after the kill", False)
        took = time.monotonic() - started
        used = json.loads((run_dir / "summary.json").read_text())["backend"]
        seen = f"exit code {process.returncode} after {took:.1f} s, by {used}: {last_line(out)}"
        passed = process.returncode == 76 and took <= heartbeat_s and used == backend
        return Row(what, shown(command), expected, seen, passed, {"seconds": took})
    finally:
        kill_all(process)
        process.wait()


# --- 6: the study ---


def study(setting: Setting) -> Iterator[Row]:
    """As many rounds of the shipped CIFAR-10 as fit; the same command goes on with them."""
    data = os.environ.get("DATA")
    if data is None or not setting.on_gpu:
        yield Row("study: cifar10", seen="not tried: DATA names no folder of CIFAR-10's Parquet files, or no GPU")
        return
    run_dir = ROOT / "runs" / "gpu-cifar10"
    caps_mib = "--fleet.memory_cap_mib=uniform(60, 240)"  # reserved segments count here, so more than on a CPU
    command = program(run_dir, Path("cifar10"), "--train.device=cuda", f"--data.path={data}", caps_mib)
    before = len(rounds_of(run_dir))
    process = start(command)
    try:
        out, _ = process.communicate(timeout=max(10.0, setting.left_s - 30))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)  # save and leave
        out, _ = process.communicate(timeout=30)
    rounds = rounds_of(run_dir)
    accuracy = [record["accuracy"] for record in rounds if record.get("accuracy") is not None][-1:]
    seen = f"rounds {before + 1} to {len(rounds)}, accuracy {accuracy}, exit code {process.returncode} {last_line(out)}"
    yield Row("study: cifar10", shown(command), "exit code 0 or 75", seen, process.returncode in (0, 75))
