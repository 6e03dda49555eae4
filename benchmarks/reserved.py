"""Reserved bytes of ResNet-18's stages: predicted without a GPU, and what an H200 reserved; for docs/caps.md.

    python benchmarks/reserved.py [--batch 32 128] [--fit auto]

The H200's figures are those of benchmarks/results/allocator_h200.json.gz, of steps that held all gradients to their
end, which those predicted here do not: what it reserved, the same without workspaces
(what an operation allocated and gave back at once), the largest of these, and the least cap under which the trace
passes in the model. Below the table: what last batches of other sizes reserve.
"""

import argparse

import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cap import DeviceOutOfMemoryError
from fedfreeze.device.cost import chunked_as_on_gpu, fake_tensors, measure_costs, trained_stage
from fedfreeze.device.reserved import DeviceSegments, Held, StepRecord, first_batches, step_record
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.units import MIB
from tests.support.allocator_traces import TRACES

SHAPE, CLASSES = (3, 32, 32), 10
_SMALL = (2, 3, 4, 5, 6, 8, 10, 12, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--fit", default="auto")
    options = parser.parse_args()
    print(
        "| batch | stage | way | tensors | reserved, predicted | H200 without workspaces | H200 | workspaces, largest"
    )
    print("| H200, least cap by the model |\n|---|---|---|--:|--:|--:|--:|--:|--:|")
    told = []
    for batch in options.batch:
        values = {"model": {"name": "resnet18", "width": 64}, "train": {"batch_size": batch, "fit": options.fit}}
        config = make_config(values)
        for index, cost in enumerate(measure_costs(config, SHAPE, CLASSES, reserved=True).stages):
            found = [trace for trace in TRACES if trace.name == f"smartfreeze/resnet18/64/{batch}/{cost.name}"]
            for number, way in enumerate(cost.ways):
                figures = [""] * 4
                if number == 0 and found:
                    trace = found[0]
                    without = trace.replayed(at_its_addresses=False, workspaces=False)[0].peak_bytes - trace.emulator
                    sizes = (without, trace.peak, trace.largest_workspace, trace.least_cap())
                    figures = [f"{size / MIB:.1f}" for size in sizes]
                names = (str(batch), cost.name) if number == 0 else ("", "")
                reserved = (way.reserved_bytes or 0) / MIB
                row = [*names, way.way.name, f"{way.memory_bytes / MIB:.1f}", f"{reserved:.0f}", *figures]
                print("| " + " | ".join(row) + " |", flush=True)
            told.append(last_batches(config, index, cost.ways[0].reserved_bytes or 0))
    print("\n" + "\n".join(told))


def last_batches(config: Config, index: int, reserved_bytes: int) -> str:
    """Return in words what a device reserves with two full batches and a last one of any of some sizes."""
    batch = config.train.batch_size
    lasts = sorted({n for n in (*_SMALL, batch // 4, batch // 3, batch * 3 // 4, batch - 1) if 1 < n <= batch})
    with fake_tensors():
        method = make_method(config, build_network(config.model, SHAPE, CLASSES, 0))
        with trained_stage(config, method, index, 0, torch.device("cpu")) as stage:
            trainer = LocalTrainer(stage, chunked_as_on_gpu(config.train))
            holds = Held(trainer)
            sizes = {*lasts, *first_batches(batch)}
            records = {samples: step_record(trainer, holds, samples, SHAPE) for samples in sizes}
    most = max(reserved(holds, records, [batch, batch, last], None) or 0 for last in lasts)
    failing = [last for last in lasts if reserved(holds, records, [batch, batch, last], reserved_bytes) is None]
    caps = range(2 * MIB, reserved_bytes + 1, 2 * MIB)
    least = next(cap for cap in caps if reserved(holds, records, first_batches(batch), cap) is not None)
    return (
        f"batch {batch}, {method.stage_names[index]}: predicted {reserved_bytes / MIB:.0f} MiB, of which "
        f"{least / MIB:.0f} would do; with a last batch of another size up to {most / MIB:.0f} under no cap; under the "
        f"predicted bytes as cap {len(failing)} of {len(lasts)} sizes fail"
    )


def reserved(holds: Held, records: dict[int, StepRecord], batches: list[int], cap_bytes: int | None) -> int | None:
    """Return what a device reserves at most; None where its cap does not hold it."""
    try:
        segments = DeviceSegments(holds, cap_bytes)
        for samples in batches:
            segments.step(records[samples])
    except DeviceOutOfMemoryError:
        return None
    return segments.peak_bytes


if __name__ == "__main__":
    main()
