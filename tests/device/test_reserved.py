"""What a device would reserve: its steps noted on a CPU, and predicted as an H200 reserved without workspaces."""

import pytest
import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import way_of
from fedfreeze.device.cap import DeviceOutOfMemoryError, TensorByteCounter
from fedfreeze.device.cost import chunked_as_on_gpu, fake_tensors, trained_stage
from fedfreeze.device.reserved import (
    DeviceSegments,
    Held,
    StepRecord,
    StepRecorder,
    batch_bytes,
    first_batches,
    predicted,
    recorded,
)
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.units import MIB
from tests.support.allocator_traces import TRACES, Trace

CPU, SHAPE = torch.device("cpu"), (3, 32, 32)


def config_of(name: str, width: int, batch: int) -> Config:
    model = {"name": name, "width": width, "memory_format": "contiguous"}
    return make_config({"model": model, "train": {"batch_size": batch}})


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_prediction_is_what_an_h200_reserved_but_for_workspaces(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, of each stage there is; with workspaces it reserved up to 1.7 times as much (docs/caps.md).

    The steps that were traced held all gradients to their end.
    """
    monkeypatch.setattr("fedfreeze.network.descent.LARGE_ELEMENTS", 2**62)
    _, name, width, batch, blocks = trace.name.split("/")
    config = config_of(name, int(width), int(batch))
    with fake_tensors():
        method = make_method(config, build_network(config.model, SHAPE, 10, 0))
        with trained_stage(config, method, method.stage_names.index(blocks), 0, CPU) as stage:
            tensors, reserved = predicted(stage, chunked_as_on_gpu(config.train), SHAPE)
            reserved_at_start = DeviceSegments(Held(LocalTrainer(stage, config.train))).peak_bytes
    assert tensors == trace.tensor
    without_workspaces = trace.replayed(at_its_addresses=False, workspaces=False)[0].peak_bytes - trace.emulator
    assert reserved == pytest.approx(without_workspaces, abs=1024)  # the trace's emulator held 1 KiB of a stage's first
    assert reserved % (2 * MIB) == 0
    start = sum(segment["total"] for segment in trace.before) - trace.emulator
    assert reserved_at_start == pytest.approx(start, abs=1024)


def test_batches_are_those_of_the_trial_on_a_gpu() -> None:
    assert [first_batches(size) for size in (1, 2, 3, 8, 32)] == [
        [1, 1, 1, 1],
        [2, 2, 2],
        [3, 3, 2],
        [8, 8, 4],
        [32, 32, 16],
    ]


def test_a_recorder_notes_what_comes_and_goes_in_its_order() -> None:
    recorder = StepRecorder()
    counter = TensorByteCounter()
    before = torch.zeros(1000)
    counter.adopt([before])
    counter.listener = recorder
    with counter:
        first = torch.zeros(100)
        second = first + 1
        view = second[3:]
        del first
        third = torch.zeros(50, dtype=torch.int64)
        del second, before
        del third
        del view
        torch.zeros(1)
        left = torch.zeros(7)
    recorder.end()
    del left  # it has gone already
    assert recorder.events == [400, 400, -1, 400, -3, -2, 4, -4, 28, -5]


@pytest.mark.parametrize("way", ["whole", "recompute", "micro(2)"])
def test_fake_and_real_tensors_have_the_same_sequence(way: str) -> None:
    config = config_of("resnet10", 16, 8)
    records = []
    for fake in (True, False):
        with fake_tensors() if fake else torch.device(CPU):
            method = make_method(config, build_network(config.model, SHAPE, 10, 0))
            with trained_stage(config, method, 1, 0, CPU) as stage:
                trainer = LocalTrainer(stage, config.train)
                trainer.go(way_of(way))
                images, labels = torch.zeros(8, *SHAPE), torch.zeros(8, dtype=torch.int64)
                for _ in range(2):
                    records.append(
                        recorded(
                            lambda trainer=trainer, batch=(images, labels): trainer.step(*batch),
                            lambda trainer=trainer, batch=(images, labels): [*trainer.held_tensors(), *batch],
                            Held(trainer),
                        )[1]
                    )
    assert records[0].batch == (8 * 3 * 32 * 32, 8 * 3 * 32 * 32 * 4, 64)
    assert len(records[0].events) > 50
    assert all(record == records[0] for record in records)


def test_what_a_device_holds_lies_in_the_places_of_a_gpu() -> None:
    """Of each tensor in the flat buffer a multiple of four floats; what does not train is on its own."""
    config = config_of("resnet10", 6, 4)  # six channels: their statistics are no multiple of four
    method = make_method(config, build_network(config.model, SHAPE, 10, 0))
    method.leave_stage(method.enter_stage(0, CPU))
    stage = method.enter_stage(1, CPU)
    holds = Held(LocalTrainer(stage, config.train))
    lengths = [slot.end - slot.begin for slot in stage.flat.slots]
    trained = [slot.end - slot.begin for slot in stage.flat.slots if slot.is_parameter]
    assert any(length % 4 for length in lengths)
    assert holds.flat_bytes == 4 * sum(length + -length % 4 for length in lengths)
    assert holds.momentum_bytes == 4 * sum(length + -length % 4 for length in trained)
    assert sum(size for size, moves in holds.loaded if moves) == holds.flat_bytes
    counters = [tensor for tensor in stage.trained_tensors() if not tensor.is_floating_point()]
    staying = sum(size for size, moves in holds.loaded if not moves)
    assert staying == sum(t.nbytes for t in stage.frozen_tensors()) + 2 * 8 * len(counters)


def test_a_batch_goes_when_the_next_is_there_and_a_step_is_replayed() -> None:
    segments = DeviceSegments(None)
    images, labels = torch.zeros(16, 3, 256, 256), torch.zeros(16, dtype=torch.int64)
    assert batch_bytes([images, labels]) == (3 * MIB, 12 * MIB, 128)
    step = StepRecord(batch_bytes([images, labels]), (30 * MIB, 512, -1, 512, -2, -3), 0)
    segments.step(step)
    assert segments.peak_bytes == (20 + 2 + 30) * MIB
    segments.step(step)  # the new images lie where 30 MiB were
    assert segments.peak_bytes == (20 + 2 + 30 + 30) * MIB
    segments.step(step)
    assert segments.peak_bytes == (20 + 2 + 30 + 30) * MIB
    assert segments.allocator.live_bytes == 15 * MIB + 512


def test_a_refusal_names_request_need_and_cap() -> None:
    segments = DeviceSegments(None, 40 * MIB)
    with pytest.raises(DeviceOutOfMemoryError) as caught:
        segments.step(StepRecord((), (30 * MIB, 11 * MIB), 0))
    assert str(caught.value) == "memory cap: an allocation of 11.00 MiB needs 42.00 MiB, the cap is 40.00 MiB"
    config = config_of("resnet10", 16, 4)
    method = make_method(config, build_network(config.model, SHAPE, 10, 0))
    holds = Held(LocalTrainer(method.enter_stage(0, CPU), config.train))
    with pytest.raises(DeviceOutOfMemoryError, match=r"load needs 2\.00 MiB, the cap is 1\.00 MiB"):
        DeviceSegments(holds, MIB)
