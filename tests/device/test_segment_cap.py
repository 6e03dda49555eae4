"""The cap by reserved segments: measured as predicted, held where an allocator would refuse, for every device."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import WHOLE, Way, ways_of
from fedfreeze.device.cap import CountedCap, DeviceMemory, DeviceOutOfMemoryError, enforcer_name, make_cap
from fedfreeze.device.reserved import first_batches, predicted
from fedfreeze.device.segment_cap import SegmentCap
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.units import MIB

CPU, SHAPE, BATCH = torch.device("cpu"), (3, 32, 32), 8
CONFIG = make_config(
    {
        "model": {"name": "resnet10", "width": 16, "memory_format": "contiguous"},
        "train": {"batch_size": BATCH, "fit": "auto, micro(2)"},
    }
)


def trainer_of(stage: int, config: Config = CONFIG) -> LocalTrainer:
    method = make_method(config, build_network(config.model, SHAPE, 10, 0))
    for each in range(stage):
        method.leave_stage(method.enter_stage(each, CPU))
    return LocalTrainer(method.enter_stage(stage, CPU), config.train)


class Device:
    """Trains devices of one stage under a cap."""

    def __init__(self, stage: int = 1):
        self.cap = SegmentCap()
        self.cap.begin_stage()
        self.trainer = trainer_of(stage)
        self.cap.holds(self.trainer)
        self.values = self.trainer.stage.flat.values().clone()
        self.counted = 0
        """Steps that ran counted."""

    def train(
        self, cap_bytes: int | None, kind: object = None, way: Way = WHOLE, batches: list[int] | None = None
    ) -> DeviceMemory:
        with self.cap.device(cap_bytes, kind) as memory:
            self.trainer.begin(self.values, 0.1, way)
            for samples in batches or first_batches(BATCH):
                batch = torch.ones(samples, *SHAPE), torch.zeros(samples, dtype=torch.int64)
                held: Callable[[], list[torch.Tensor]] = partial(self._held, *batch)
                self.cap.step(memory, (way, samples), held, partial(self.trainer.step, *batch))
        return memory

    def _held(self, *batch: torch.Tensor) -> list[torch.Tensor]:
        self.counted += 1
        return [*self.trainer.held_tensors(), *batch]


@pytest.mark.parametrize("stage", range(4))
def test_measured_is_predicted_to_the_byte_counted_or_replayed(stage: int) -> None:
    device = Device(stage)
    for way in ways_of(CONFIG.train.fit):
        tensors, reserved = predicted(trainer_of(stage).stage, CONFIG.train, SHAPE, way)
        for _ in range(2):  # the second time no step is counted
            memory = device.train(None, way=way)
            assert (memory.tensor_peak_bytes, memory.peak_bytes) == (tensors, reserved)
        assert reserved > tensors
    assert device.counted == 2 * len(ways_of(CONFIG.train.fit))


def test_a_cap_of_the_peak_passes_and_one_below_what_is_needed_fails_in_the_same_words() -> None:
    device = Device()
    peak = device.train(None).peak_bytes
    for fresh in (device, Device()):  # replayed, and counted
        assert fresh.train(peak).peak_bytes == peak
    needed = next(cap for cap in range(2 * MIB, peak + MIB, 2 * MIB) if passes(Device(), cap))
    assert MIB < needed <= peak
    errors = []
    for fresh in (device, Device()):
        with pytest.raises(DeviceOutOfMemoryError) as caught:
            fresh.train(needed - 2 * MIB, "kind")
        fresh.trainer.drop_gradients()
        errors.append(str(caught.value))
        assert fresh.train(needed, "kind").peak_bytes <= needed  # the device after it is not harmed
    assert errors[0] == errors[1]
    assert "an allocation of" in errors[0]


def passes(device: Device, cap_bytes: int) -> bool:
    try:
        device.train(cap_bytes)
    except DeviceOutOfMemoryError:
        return False
    return True


def two_in_turn() -> torch.Tensor:
    """Allocate 30 MiB, let go of them, and allocate 36."""
    for mib in (30, 36):
        torch.empty(mib * MIB, dtype=torch.uint8)
    return torch.zeros(2)


def test_under_a_cap_what_is_cached_is_given_back_before_a_request_is_refused() -> None:
    """So a device may hold with less than it takes where nobody limits it; its recorded peak is within its cap."""
    peaks = {}
    for cap_bytes in (None, 68 * MIB, 66 * MIB, 36 * MIB):
        cap = SegmentCap()
        for again in (False, True):  # counted, then replayed
            with cap.device(cap_bytes) as memory:
                cap.step(memory, "kind", list, two_in_turn)
            assert peaks.setdefault(cap_bytes, memory.peak_bytes) == memory.peak_bytes, again
    assert peaks == {None: 68 * MIB, 68 * MIB: 68 * MIB, 66 * MIB: 66 * MIB, 36 * MIB: 36 * MIB}
    with (
        pytest.raises(DeviceOutOfMemoryError, match=r"36\.00 MiB needs 36\.00 MiB, the cap is 34\.00 MiB"),
        cap.device(34 * MIB) as memory,
    ):
        cap.step(memory, "kind", list, two_in_turn)
    with pytest.raises(AssertionError):  # outside of a device it would not be held to anything
        cap.step(memory, "kind", list, two_in_turn)


def test_a_device_like_one_that_fitted_under_its_cap_has_its_peaks_and_is_not_counted() -> None:
    device = Device()
    first = device.train(100 * MIB, "kind")
    device.cap._records.clear()  # if it were measured it would have to be counted
    counted = device.counted
    second = device.train(100 * MIB, "kind")
    assert (second.peak_bytes, second.tensor_peak_bytes) == (first.peak_bytes, first.tensor_peak_bytes)
    assert device.counted == counted
    for cap_bytes, kind in ((102 * MIB, "kind"), (100 * MIB, "another"), (100 * MIB, None)):
        assert device.train(cap_bytes, kind).peak_bytes == first.peak_bytes
    assert device.counted > counted


def test_counting_changes_no_bits() -> None:
    device, plain = Device(), Device()
    device.train(None)
    plain.train(None, "kind")
    plain.train(None, "kind")  # runs as it is
    assert torch.equal(device.trainer.stage.flat.buffer, plain.trainer.stage.flat.buffer)


def test_the_accounting_counts_on_a_cpu_alone() -> None:
    assert isinstance(make_cap(CPU, "cuda_segments"), SegmentCap)
    assert isinstance(make_cap(CPU), CountedCap)
    assert enforcer_name(CPU, "cuda_segments") == "cuda_segments"
    assert enforcer_name(torch.device("cuda", 0), "cuda_segments") == "cuda_memory_fraction"
