"""The checks of the GPU path, one a process; started by gpu_table.py. With --device cpu they check themselves.

python benchmarks/gpu_checks.py --check caps --seconds 100 --device cuda
"""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_runs import Setting, bits, kills, last_line, shown, study
from gpu_segments import segments
from gpu_speed import speed
from gpu_table import Row, print_row, run_limited

from fedfreeze.compute import choose_device
from fedfreeze.config.file import make_config
from fedfreeze.device.cap import DeviceOutOfMemoryError, make_cap
from fedfreeze.device.trial import StageTrial, black_images, model_on
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.units import MIB

SHAPE = (3, 32, 32)


# --- 1: the machine ---


def machine(setting: Setting) -> Iterator[Row]:
    """What it is, and the marked tests."""
    smi = shutil.which("nvidia-smi")
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,persistence_mode"
    said = run_limited([smi, query, "--format=csv,noheader"], 20)[1].strip() if smi else "there is no nvidia-smi"
    yield Row("nvidia-smi", f"nvidia-smi {query}", seen=said)
    seen = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    figures: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if setting.on_gpu:
        figures |= {"card": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        seen += f", NCCL {figures['nccl']}, {figures['gpus']} x {figures['card']}"
    yield Row("torch and card", seen=seen, figures=figures)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/device",
        "tests/comm",
        "tests/plan",
    ]
    if not setting.on_gpu:
        command.append("--collect-only")
    code, out, err = run_limited(command, setting.left_s)
    seen = ("no end in time, after: " if code is None else "") + (last_line(out) or last_line(err))
    yield Row("marked tests", shown(command), "all pass", seen, code == 0)


# --- 2: caps ---


def caps(setting: Setting) -> Iterator[Row]:
    """Each stage under caps about its reserved peak."""
    device = choose_device(setting.device, 0)
    sizes = [("resnet18", 64, 128), ("resnet18", 64, 32)] if setting.on_gpu else [("resnet8", 8, 4)]
    for name, width, batch in sizes:
        peaks: list[list[int]] = [[], []]
        for again in range(2):  # the second time everything has run before
            for index in range(len(stages_of(name, width, batch))):
                if setting.left_s < 10:
                    yield Row(f"{name} w{width}, batch {batch}", seen="not tried to the end: no time left")
                    return
                rows, peak = caps_of_stage(name, width, batch, index, device, hold=again == 0)
                peaks[again].append(peak)
                yield from rows
        seen = [" ".join(f"{peak / MIB:.1f}" for peak in each) for each in peaks]
        what = f"{name} w{width}, batch {batch}: peaks, when all had run before"
        yield Row(what, expected=f"{seen[0]} MiB", seen=f"{seen[1]} MiB", passed=peaks[0] == peaks[1])
        last = len(peaks[0]) - 1
        resumed = ["--check", "peak", "--stage", f"{name},{width},{batch},{last}", "--device", setting.device]
        command = [sys.executable, str(Path(__file__).resolve()), *resumed]
        code, out, err = run_limited(command, max(10.0, setting.left_s))
        fresh = int(out) if code == 0 else 0
        what = f"{name} w{width}, batch {batch}: last stage's peak where it is the first, as in a resumed run"
        seen_now = f"{fresh / MIB:.1f} MiB" if code == 0 else last_line(err)
        yield Row(what, shown(command), f"{peaks[0][last] / MIB:.1f} MiB", seen_now, fresh == peaks[0][last])


def stages_of(name: str, width: int, batch: int) -> tuple[str, ...]:
    """Return the names of the stages."""
    config = make_config({"model": {"name": name, "width": width}, "train": {"batch_size": batch}})
    return make_method(config, build_network(config.model, SHAPE, 10, 0)).stage_names


def caps_of_stage(
    name: str, width: int, batch: int, index: int, device: torch.device, *, hold: bool
) -> tuple[list[Row], int]:
    """Measure a stage under no cap and, if `hold`, hold it to caps; return rows and the governed peak in bytes."""
    config = make_config({"model": {"name": name, "width": width}, "train": {"batch_size": batch}})
    method = make_method(config, build_network(model_on(config, {}, device), SHAPE, 10, 0))
    cap = make_cap(device)
    cap.begin_stage()
    stage = method.enter_stage(index, device)
    trial = StageTrial(stage, config, black_images(batch, SHAPE, 10), cap, device)
    free = trial.train(None)
    step = 2 * MIB if device.type == "cuda" else 512
    figures = {"governed_mib": free.peak_bytes / MIB, "tensors_mib": free.tensor_peak_bytes / MIB, "stage": index}
    what = f"{name} w{width}, batch {batch}, {method.stage_names[index]}"
    if not hold:
        cap_of: tuple[tuple[str, int, str], ...] = ()
        rows = []
    else:
        cap_of = (
            ("under its peak as cap", free.peak_bytes, "passes"),
            ("a segment below it", free.peak_bytes - step, "fails, or passes in fewer segments"),
            ("a segment below its tensors", free.tensor_peak_bytes - step, "fails"),
            ("under its peak again, after failures", free.peak_bytes, "passes"),
        )
        seen = f"reserved {free.peak_bytes / MIB:.1f} MiB, tensors {free.tensor_peak_bytes / MIB:.1f} MiB"
        fewer = free.tensor_peak_bytes <= free.peak_bytes
        rows = [Row(f"{what}: peak", "", "tensors at most what is reserved", seen, fewer, figures)]
    for told, cap_bytes, expected in cap_of:
        passes, seen = under(trial, cap_bytes, device)
        holds = passes if expected == "passes" else not passes
        if expected.endswith("segments"):
            holds = True  # the allocator gives back what it had cached, and tries again
        rows.append(Row(f"{what}: {told}", "", expected, seen, holds and passes is not None))
    method.leave_stage(stage)
    del trial, stage, method
    gc.collect()
    return rows, free.peak_bytes


def under(trial: StageTrial, cap_bytes: int, device: torch.device) -> tuple[bool | None, str]:
    """Train a device under a cap; return whether it passed (None: past its cap, or memory stayed), and words."""
    before = reserved(device)
    try:
        peak = trial.train(cap_bytes).peak_bytes
        found, seen = (True if peak <= cap_bytes else None), f"passed, recorded {peak / MIB:.1f} MiB"
    except DeviceOutOfMemoryError as error:
        found, seen = False, str(error)
    if reserved(device) > before:
        return None, f"{seen}; {(reserved(device) - before) / MIB:.1f} MiB stay reserved"
    return found, seen


def reserved(device: torch.device) -> int:
    """Return what stays reserved when all that can be is given back; on a CPU nothing is."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


CHECKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    each.__name__: each for each in (machine, caps, segments, bits, kills, speed, study)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", required=True, choices=[*CHECKS, "peak"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--profile")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check == "peak":
        name, *numbers = options.stage.split(",")
        width, batch, index = map(int, numbers)
        print(caps_of_stage(name, width, batch, index, choose_device(options.device, 0), hold=False)[1])
        return 0
    setting = Setting(options.device, time.monotonic() + options.seconds, options.profile)
    try:
        for row in CHECKS[options.check](setting):
            print_row(row)
    finally:
        shutil.rmtree(setting.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
