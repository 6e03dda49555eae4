"""Samples a second on a GPU beside a plain loop that keeps its data there, and what a device costs; for gpu_checks.py.

The plain loop is what a tuned script does: images on the GPU, cuDNN's autotuning, fused SGD, no determinism.
"""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_runs import Setting, last_line, program, rounds_of, shown
from gpu_table import Row, run_limited
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.network.blocks import build_network

SHAPE = (3, 32, 32)
LARGE_GOAL, SMALL_GOAL = 0.8, 3.0
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Work:
    """What a round does."""

    name: str
    width: int
    batch: int
    samples: int
    """Of a device."""
    participants: int
    rounds: int = 5

    @property
    def label(self) -> str:
        """What rows call it."""
        return f"{self.name} w{self.width}, batch {self.batch}"


LARGE = Work("resnet18", 64, 128, 1024, 16)
SMALL = Work("resnet10", 16, 32, 512, 32)
ONE_STEP = Work("resnet8", 8, 10, 10, 400)
TINY = Work("resnet8", 8, 8, 16, 4, rounds=3)


@dataclass(frozen=True)
class Way:
    """How numbers are kept and multiplied."""

    memory_format: str = "contiguous"
    tf32: bool = True
    """Of convolutions, as torch does by default; off also where NVIDIA's own switch is."""
    autocast: bool = False
    """bfloat16; the plain loop alone has it."""

    @property
    def label(self) -> str:
        """What rows call it."""
        kept = "bfloat16 autocast" if self.autocast else "TF32" if self.tf32 else "float32"
        return f"{self.memory_format}, {kept}"


def speed(setting: Setting) -> Iterator[Row]:
    """Yield rows of samples a second, the goals first."""
    large, small, ranks = (LARGE, SMALL, (1, 2, 4, 8)) if setting.on_gpu else (TINY, TINY, (1,))
    yield from beside_plain(setting, large, Way(), goal=LARGE_GOAL)
    yield from by_ranks(setting, small, ranks)
    yield from a_device(setting, ONE_STEP if setting.on_gpu else TINY)
    for way in (Way(tf32=False), Way("channels_last"), Way("channels_last", autocast=True)):
        yield from beside_plain(setting, large, way, goal=None)
    if setting.profile:
        yield profiled(setting, large)


def beside_plain(setting: Setting, work: Work, way: Way, goal: float | None) -> Iterator[Row]:
    """Yield how fast rounds of one rank are beside the plain loop."""
    what = f"{work.label}, {way.label}, 1 rank"
    if setting.left_s < 20 and setting.on_gpu:
        yield Row(what, seen="not tried: no time left")
        return
    plain = plain_loop(setting, work, way)
    if way.autocast:
        yield Row(f"{work.label}, {way.label}, plain loop", seen=f"{plain:.0f} samples/s", figures={"plain": plain})
        return
    yield compared(what, ours(setting, work, way, 1), plain, goal)


def by_ranks(setting: Setting, work: Work, counts: tuple[int, ...]) -> Iterator[Row]:
    """Yield how fast several ranks on one GPU are together, beside one plain loop."""
    plain = plain_loop(setting, work, Way())
    best, tried = 0.0, 0
    for ranks in counts:
        what = f"{work.label}, {ranks} ranks"
        if setting.left_s < 20 and setting.on_gpu:
            yield Row(what, seen="not tried: no time left")
            continue
        found = ours(setting, work, Way(), ranks)
        best, tried = max(best, found[0]), tried + 1
        yield compared(what, found, plain, None)
    ratio = best / plain
    expected = f"{SMALL_GOAL:g} of the plain loop's"
    passed = True if ratio >= SMALL_GOAL else False if tried == len(counts) else None
    yield Row(f"{work.label}, best number of ranks", "", expected, f"{ratio:.2f}", passed)


def compared(what: str, found: tuple[float, list[str], str], plain: float, goal: float | None) -> Row:
    """Return a row that holds our speed against the plain loop's."""
    rate, command, said = found
    ratio = rate / plain
    seen = f"{rate:.0f} samples/s, the plain loop {plain:.0f}: {ratio:.2f}{said}"
    expected = "" if goal is None else f"{goal:g} of the plain loop's"
    figures = {"samples_s": rate, "plain_samples_s": plain, "ratio": ratio}
    passed = False if not rate else None if goal is None else ratio >= goal
    return Row(what, shown(command), expected, seen, passed, figures)


def a_device(setting: Setting, work: Work) -> Iterator[Row]:
    """Yield what a device costs beside its steps: many devices of one step each, less the plain loop's step."""
    step_s = work.samples / plain_loop(setting, work, Way())
    rate, command, said = ours(setting, work, Way(), 1)
    if not rate:
        yield Row("a device of one step", shown(command), "a figure", f"none{said}", False)
        return
    device_s = work.samples / rate
    seen = f"{1e3 * device_s:.2f} ms; the plain loop takes {1e3 * step_s:.2f} ms for its samples{said}"
    yield Row(
        f"{work.label}, {work.samples} samples: a device",
        shown(command),
        seen=seen,
        figures={"device_s": device_s, "plain_s": step_s},
    )


def ours(setting: Setting, work: Work, way: Way, ranks: int) -> tuple[float, list[str], str]:
    """Run fedfreeze; return samples a second of its middle rounds, its command, and a word if that failed."""
    name = f"speed-{next(_NUMBERS)}-{work.name}-{ranks}"
    command = program(setting.folder / name, run_config(setting, work, way, name), ranks=ranks)
    environment = dict(os.environ)
    if not way.tf32:
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    code, out, err = run_limited(command, max(5.0, setting.left_s), environment)
    walls = [record["wall_s"] for record in rounds_of(setting.folder / name)]
    # the first measures each kind of device, the last evaluates
    if len(walls) < 2:
        return 0.0, command, f" (exit code {code}: {last_line(err or out)})"
    return work.participants * work.samples / statistics.median(walls[1:-1] or walls[1:]), command, ""


def run_config(setting: Setting, work: Work, way: Way, name: str) -> Path:
    """Write the configuration of a run: FedAvg on random images, as many to each device, caps that all hold."""
    values: dict[str, Any] = {
        "name": "speed",
        "data": {
            "name": "synthetic",
            "synthetic_shape": list(SHAPE),
            "synthetic_samples": 2 * work.participants * work.samples,
            "partition": "iid",
        },
        "model": {"name": work.name, "width": work.width, "memory_format": way.memory_format},
        "method": {"name": "fedavg"},
        "fleet": {"devices": 2 * work.participants, "memory_cap_mib": 20_000},
        "train": {"rounds": work.rounds, "participants": work.participants, "batch_size": work.batch},
        "eval": {"every_rounds": 1000, "batch_size": 1000},
        "checkpoint": {"every_rounds": 1000},
    }
    values["train"]["device"] = setting.device
    path = setting.folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def plain_loop(setting: Setting, work: Work, way: Way, seconds: float = 2.0) -> float:
    """Train on data that lies on the device, without devices to emulate; return samples a second."""
    device = torch.device(setting.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = way.tf32
    torch.manual_seed(0)
    config = make_config({"model": {"name": work.name, "width": work.width}})
    model = replace(config.model, memory_format="contiguous")
    network = build_network(model, SHAPE, 10, 0).network.train().to(device)
    if way.memory_format == "channels_last":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (max(work.batch, 4096), *SHAPE), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (len(images),), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    cast = torch.autocast(device.type, torch.bfloat16) if way.autocast else contextlib.nullcontext()

    def step() -> None:
        chosen = torch.randint(0, len(images), (work.batch,), device=device)
        batch = images[chosen].float().mul_(1 / 63.75).sub_(2.0)
        if way.memory_format == "channels_last":
            batch = batch.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with cast:
            loss = functional.cross_entropy(network(batch), labels[chosen])
        loss.backward()
        optimizer.step()

    for _ in range(20 if setting.on_gpu else 1):
        step()
    steps = 0
    wait(device)
    started = time.perf_counter()
    while time.perf_counter() - started < (seconds if setting.on_gpu else 0.2):
        for _ in range(10 if setting.on_gpu else 1):
            step()
            steps += 1
        wait(device)
    return steps * work.batch / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(setting: Setting, work: Work) -> Row:
    """Run two rounds under torch's profiler, write the trace, and tell where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    from fedfreeze.cli import main

    config = run_config(setting, replace(work, rounds=2, participants=4), Way(), "profile")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), profile(activities=activities) as found:
        code = main(["run", str(config), "--run-dir", str(setting.folder / "profile")])
    assert setting.profile is not None
    found.export_chrome_trace(setting.profile)
    key = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
    top = sorted(found.key_averages(), key=lambda each: -getattr(each, key))[:5]
    seen = ", ".join(f"{each.key[:30]} {getattr(each, key) / 1e3:.1f} ms" for each in top)
    return Row(f"trace of 2 rounds in {setting.profile}", expected="exit code 0", seen=seen, passed=code == 0)
