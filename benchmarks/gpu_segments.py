"""What this GPU's allocator reserves for each stage, beside what is predicted without one; used by gpu_checks.py."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_runs import Setting
from gpu_table import Row

from fedfreeze.compute import choose_device
from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cap import make_cap
from fedfreeze.device.cost import fake_tensors, trained_stage
from fedfreeze.device.cuda_cap import CudaFractionCap
from fedfreeze.device.reserved import predicted
from fedfreeze.device.trial import StageTrial, black_images, model_on
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.units import MIB

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where a check starts another
from tests.support.allocator_traces import Trace

SHAPE, CLASSES = (3, 32, 32), 10
_MOST_ENTRIES = 100_000
_SLACK_BYTES = 4096  # constants that a stage's first step makes for all


def segments(setting: Setting) -> Iterator[Row]:
    """Each stage: predicted, and reserved; on a GPU also every allocation put through the model of its allocator."""
    device = choose_device(setting.device, 0)
    sizes = [("resnet18", 64, 128), ("resnet18", 64, 32)] if setting.on_gpu else [("resnet8", 8, 4)]
    for name, width, batch in sizes:
        values = {"model": {"name": name, "width": width}, "fleet": {"accounting": "cuda_segments"}}
        config = make_config(values | {"train": {"batch_size": batch}})
        with fake_tensors():
            blocks = make_method(config, build_network(config.model, SHAPE, CLASSES, 0)).stage_names
        for index, part in enumerate(blocks):
            what = f"{name} w{width}, batch {batch}, {part}"
            if setting.left_s < 10:
                yield Row(what, seen="not tried: no time left")
                return
            yield from rows_of(what, config, index, device)


def rows_of(what: str, config: Config, index: int, device: torch.device) -> Iterator[Row]:
    """Train a device of a stage under no cap, and hold what was reserved against what was predicted."""
    with fake_tensors():
        method = make_method(config, build_network(config.model, SHAPE, CLASSES, 0))
        with trained_stage(config, method, index, 0, torch.device("cpu")) as stage:
            reserved = predicted(stage, config.train, SHAPE)[1]
    method = make_method(config, build_network(model_on(config, {}, device), SHAPE, CLASSES, 0))
    cap = make_cap(device, config.fleet.accounting)
    cap.begin_stage()
    stage = method.enter_stage(index, device)
    trial = StageTrial(stage, config, black_images(config.train.batch_size, SHAPE, CLASSES), cap, device)
    if isinstance(cap, CudaFractionCap):
        yield from held_against(what, traced(what, trial, cap), reserved)
    else:
        peak = trial.train(None).peak_bytes
        yield Row(f"{what}: reserved", "", mib(reserved), mib(peak), peak == reserved)
    method.leave_stage(stage)
    del trial, stage, method
    gc.collect()


def traced(what: str, trial: StageTrial, cap: CudaFractionCap) -> Trace:
    """Train a device under no cap while the allocator notes each of its actions."""
    device = cap.cuda_device
    number = device.index or 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = [
        {
            "address": segment["address"],
            "type": segment["segment_type"],
            "total": segment["total_size"],
            "blocks": [[block["size"], block["size"], block["state"]] for block in segment["blocks"]],
        }
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == number
    ]
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MOST_ENTRIES)
    try:
        earlier = len(torch.cuda.memory._snapshot()["device_traces"][number])
        memory = trial.train(None)
        most = torch.cuda.max_memory_reserved(device)
        entries = torch.cuda.memory._snapshot()["device_traces"][number][earlier:]
    finally:
        torch.cuda.memory._record_memory_history(None)
    actions = [(entry["action"], entry["addr"], entry["size"]) for entry in entries if "addr" in entry]
    return Trace(what, before, actions, cap.emulator_bytes, most, memory.peak_bytes, memory.tensor_peak_bytes)


def held_against(what: str, trace: Trace, reserved: int) -> list[Row]:
    """Return a trace's rows: the model against each of its allocations, and the prediction against its peaks."""
    allocator, addresses = trace.replayed(at_its_addresses=True)
    same = sum(one == other for one, other in zip(addresses, trace.addresses, strict=True))
    without = trace.replayed(at_its_addresses=False, workspaces=False)[0].peak_bytes - trace.emulator
    figures = {"predicted_mib": reserved / MIB, "reserved_mib": trace.peak / MIB, "tensors_mib": trace.tensor / MIB}
    return [
        Row(
            f"{what}: the allocator's model on what it did",
            "",
            f"{mib(trace.max_reserved)}, {len(addresses)} addresses",
            f"{mib(allocator.peak_bytes)}, {same} addresses the same",
            (allocator.peak_bytes, same) == (trace.max_reserved, len(addresses)),
        ),
        Row(
            f"{what}: reserved but for workspaces",
            "",
            f"predicted {mib(reserved)}",
            f"{mib(without)}; with them {mib(trace.peak)}",
            abs(without - reserved) <= _SLACK_BYTES,
            figures | {"without_workspaces_mib": without / MIB},
        ),
    ]


def mib(size: int) -> str:
    """Return bytes as MiB."""
    return f"{size / MIB:.1f} MiB"
