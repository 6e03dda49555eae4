"""What a GPU's path computes, computed on the CPU: rooms, staged batches, late sums; whole runs to the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfreeze.cli import main
from fedfreeze.config.file import make_config
from fedfreeze.config.schema import DataConfig
from fedfreeze.data.batches import Draws, drawn_batches, staged_bytes, training_batches
from fedfreeze.data.store import Data, Split
from fedfreeze.device.cuda_cap import OWN_SEGMENT_BYTES, SEGMENT_BYTES
from fedfreeze.device.emulator import Emulator
from fedfreeze.device.late import LateReport
from fedfreeze.device.on_gpu import Held, held_for, warm_up
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from tests.support.launching import metrics, sha256, without_wall_time, write_config

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def data_of(samples: int = 23) -> Data:
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (samples, *SHAPE), dtype=np.uint8), generator.integers(0, 10, samples))
    return Data(split, split, 10, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def test_rooms_lie_apart_in_whole_segments():
    held = Held({"a": (3, torch.float32), "b": (5, torch.int64), "c": (0, torch.int64)}, CPU)
    assert len(held.memory) == OWN_SEGMENT_BYTES
    held.put("a", torch.tensor([1.0, 2.0, 3.0]))
    held.put("b", torch.arange(4))
    assert held.room("a", 3, torch.float32).tolist() == [1, 2, 3]
    assert held.room("b", 4, torch.int64).tolist() == [0, 1, 2, 3]
    assert held.room("a", 2, torch.float32).data_ptr() == held.memory.data_ptr()
    assert held.room("b", 5, torch.int64).data_ptr() == held.memory.data_ptr() + 512
    large = Held({"a": (OWN_SEGMENT_BYTES + 1, torch.uint8)}, CPU)
    assert len(large.memory) == OWN_SEGMENT_BYTES + SEGMENT_BYTES


@pytest.mark.parametrize(
    ("name", "count", "dtype"), [("a", 4, torch.float32), ("a", 3, torch.int64), ("z", 1, torch.int64)]
)
def test_what_does_not_fit_has_memory_of_its_own(name, count, dtype):
    held = Held({"a": (3, torch.float32)}, CPU)
    found = held.room(name, count, dtype)
    assert (found.shape, found.dtype) == ((count,), dtype)
    assert not held.memory.data_ptr() <= found.data_ptr() < held.memory.data_ptr() + len(held.memory)


def batches_of(
    augment: str, epochs: int, room: torch.Tensor | None, views: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = Draws(*(torch.Generator().manual_seed(number) for number in range(3)))
    config = DataConfig(augment=augment, views=views)
    drawn = drawn_batches(config, 19, 8, batch_size=6, epochs=epochs, draws=draws)
    batches = training_batches(data_of(), np.arange(2, 21), drawn, CPU, room)
    return [(images.clone(), labels.clone()) for images, labels in batches]


@pytest.mark.parametrize(("augment", "views"), [("none", None), ("flip", None), ("crop_flip", None), ("crop_flip", 2)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_staged_batches_are_the_same_and_lie_in_their_room(augment, views, epochs):
    usual = batches_of(augment, epochs, None, views)
    room = torch.full((staged_bytes(19, 3 * 8 * 8, epochs),), 255, dtype=torch.uint8)
    staged = batches_of(augment, epochs, room, views)
    assert len(staged) == len(usual) == 3 * epochs
    for (images, labels), (others, other_labels) in zip(staged, usual, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    assert torch.equal(room[: 19 * 3 * 8 * 8].view(19, *SHAPE), torch.from_numpy(data_of().train.images[2:21]))


def test_a_device_too_large_for_its_room_is_not_staged():
    room = torch.zeros(staged_bytes(19, 3 * 8 * 8, 1) - 1, dtype=torch.uint8)
    staged = batches_of("flip", 1, room)
    assert not room.any()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(staged, batches_of("flip", 1, None), strict=True))


def stage_and_facts(**method: object):
    config = make_config({"model": {"name": "resnet8", "width": 4}, "train": {"batch_size": 4}, "method": method})
    stage = make_method(config, build_network(config.model, SHAPE, 10, 0)).enter_stage(0, CPU)
    return stage, (config, data_of(), [np.arange(3), np.arange(3, 10)], CPU)


def test_what_is_held_has_room_for_values_sum_and_the_largest_device():
    stage, facts = stage_and_facts()
    held = held_for(stage, *facts, counted=False)
    inside = range(held.memory.data_ptr(), held.memory.data_ptr() + len(held.memory))
    elements = len(stage.flat)
    for name, dtype in (("values", torch.float32), ("total", torch.int64)):
        assert held.room(name, elements, dtype).data_ptr() in inside
    assert held.room("over", elements - stage.flat.parameters, torch.int64).data_ptr() in inside
    assert len(held.samples) == staged_bytes(7, 192, 1)
    counted = held_for(stage, *facts, counted=True)
    assert len(counted._rooms["index"]) == len(counted._rooms["count"]) == elements


def test_warming_up_runs_a_training_and_an_evaluation_step_of_the_stage():
    stage, facts = stage_and_facts()
    held = held_for(stage, *facts, counted=False)
    before = stage.flat.values().clone()
    seen = []
    stage.register_forward_hook(lambda module, given, _: seen.append((module.training, len(given[0]))))
    state = torch.get_rng_state()
    warm_up(stage, *facts, held.samples)
    assert seen == [(True, 4), (False, 23)]
    assert not torch.equal(stage.flat.values(), before)  # a step was taken
    assert stage.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in stage.parameters())


class AsOnGpu(Emulator):
    """An emulator on the CPU that works as on a GPU: tensors of its own, staged samples, sums and reports late."""

    late = 0

    def enter_stage(self, index: int) -> None:
        super().enter_stage(index)
        self._prepare_gpu()
        self.values = self._mine("values", self.stage.flat.values().clone())

    def _train(self, *arguments):
        found = super()._train(*arguments)
        AsOnGpu.late += isinstance(found, LateReport)
        return found


OWN_MERGE = """
from fedfreeze.methods import SmartFreeze

class Half(SmartFreeze):
    def merge(self, values, update_sum, weight_sum):
        assert values.device.type == update_sum.total.device.type == "cpu"
        return values + update_sum.mean(weight_sum) / 2
"""

CASES = {
    "smartfreeze": {},
    "smartfreeze float32": {"method": {"sum": "float32"}},
    "power of choice": {"select": {"name": "power_of_choice"}},
    "heterofl": {
        "method": {"name": "heterofl"},
        "fleet": {"memory_cap_mib": [0.3, 0.9]},
        "model": {"memory_format": "contiguous"},
    },
    "depthfl": {"method": {"name": "depthfl"}, "fleet": {"memory_cap_mib": [0.5, 2.0]}},
    "fedepth": {"method": {"name": "fedepth"}, "fleet": {"memory_cap_mib": [0.36, 0.5, 2.0]}},
    "a merge of one's own": {"method": {"name": "mine_on_gpu:Half"}},
    "most diverge": {"train": {"learning_rate": 300.0}},
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_as_on_a_gpu_has_the_bits_and_reports_of_one_on_a_cpu(case, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine_on_gpu.py").write_text(OWN_MERGE)
    sections = json.loads(json.dumps(CASES[case]))
    train = {"rounds": 8, "local_epochs": 2} | sections.pop("train", {})
    config = write_config(tmp_path, train=train, pace={"policy": "fixed"}, data={"augment": "crop_flip"}, **sections)
    code = main(["run", str(config), "--run-dir", "cpu"])
    assert code in (0, 64)
    monkeypatch.setattr("fedfreeze.run.experiment.Emulator", AsOnGpu)
    AsOnGpu.late = 0
    assert main(["run", str(config), "--run-dir", "gpu"]) == code
    assert AsOnGpu.late > 8
    assert without_wall_time(metrics(Path("gpu"))) == without_wall_time(metrics(Path("cpu")))
    failed = [record["failed"] for record in metrics(Path("gpu")) if record["kind"] == "round"]
    if case == "most diverge":
        assert any("diverged" in reason for each in failed for reason in each.values())
    if code == 0:
        assert sha256(Path("gpu")) == sha256(Path("cpu"))
