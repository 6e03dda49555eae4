"""The caps: what is counted, where it stops, and that counting changes nothing."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.device.cap import (
    GRANULE_BYTES,
    MIB,
    CountedCap,
    DeviceMemory,
    DeviceOutOfMemoryError,
    TensorByteCounter,
    count_peak,
)
from fedfreeze.network.stage import LocalTrainer, Stage


def small_trainer(momentum: float = 0.9) -> LocalTrainer:
    torch.manual_seed(0)
    active = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    stage = Stage(0, [], active, output, torch.device("cpu"))
    return LocalTrainer(stage, make_config({"train": {"momentum": momentum}}).train)


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (size,), generator=generator)


def run_step(cap: CountedCap, trainer: LocalTrainer, cap_bytes: int | None, size: int = 16) -> int:
    images, labels = batch(size)
    with cap.device(cap_bytes) as memory:
        trainer.begin(trainer.stage.flat.buffer.clone(), 0.1)
        cap.step(
            memory,
            (0, size),
            lambda: [*trainer.held_tensors(), images, labels],
            lambda: trainer.step(images, labels),
        )
    return memory.peak_bytes


def test_counts_live_bytes_and_gives_them_back() -> None:
    counter = TensorByteCounter()
    with counter:
        first = torch.ones(1024, dtype=torch.float32)
        assert counter.live_bytes == 4096
        view = first.view(32, 32)[3:]
        assert counter.live_bytes == 4096  # a view holds no memory of its own
        second = first + 1
        assert counter.live_bytes == 8192
        del second
        assert counter.live_bytes == 4096
        del first
        assert counter.live_bytes == 4096  # the view keeps the storage
        del view
    assert counter.live_bytes == 0
    assert counter.peak_bytes == 8192


def test_rounds_up_as_the_cuda_allocator_does() -> None:
    assert count_peak(lambda: torch.zeros(1), []) == GRANULE_BYTES
    assert count_peak(lambda: torch.zeros(129), []) == 2 * GRANULE_BYTES


def test_what_is_held_counts_once() -> None:
    held = torch.zeros(256)
    assert count_peak(lambda: None, [held, held.view(16, 16), held[1:]]) == 1024


def test_error_names_operation_bytes_and_cap() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        count_peak(lambda: torch.ones(MIB), [], cap_bytes=3 * MIB)
    error = caught.value
    assert isinstance(error, DeviceOutOfMemoryError)
    assert (error.operation, error.needed_bytes, error.cap_bytes) == ("aten.ones.default", 4 * MIB, 3 * MIB)
    assert str(error) == "memory cap: aten.ones.default needs 4.00 MiB, the cap is 3.00 MiB"


def test_what_a_device_must_load_counts_against_its_cap() -> None:
    with pytest.raises(DeviceOutOfMemoryError, match="load needs"):
        count_peak(lambda: None, [torch.zeros(1024)], cap_bytes=4095)


@pytest.mark.parametrize("known", [False, True])
def test_cap_of_exactly_the_peak_passes_and_one_byte_less_fails(known: bool) -> None:
    trainer = small_trainer()
    peak = run_step(CountedCap(), trainer, None)
    cap = CountedCap()
    if known:  # a kind of step that was counted before must be held to the cap all the same
        run_step(cap, trainer, None)
    assert run_step(cap, trainer, peak) == peak
    with pytest.raises(DeviceOutOfMemoryError, match="aten"):
        run_step(cap, trainer, peak - 1)
    assert run_step(cap, trainer, peak) == peak  # the device after it is not harmed


def test_recorded_peak_never_exceeds_the_cap() -> None:
    trainer, cap = small_trainer(), CountedCap()
    peaks = {size: run_step(CountedCap(), small_trainer(), None, size) for size in (2, 8, 16)}
    assert peaks[2] < peaks[8] < peaks[16]
    for size, peak in peaks.items():
        for cap_bytes in (peak, peak + 1, 2 * peak):
            assert run_step(cap, trainer, cap_bytes, size) == peak <= cap_bytes


def test_a_step_that_hit_the_cap_leaves_nothing_behind() -> None:
    trainer = small_trainer()
    peak = run_step(CountedCap(), trainer, None)

    def live() -> int:
        gc.collect()
        return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor))

    before = live()
    for divisor in range(2, 20):
        with pytest.raises(DeviceOutOfMemoryError):
            run_step(CountedCap(), trainer, peak - peak // divisor)
        trainer.drop_gradients()
    assert live() <= before


def test_counting_does_not_change_the_bits() -> None:
    counted, plain = small_trainer(), small_trainer()
    images, labels = batch()
    for _ in range(3):
        counter = TensorByteCounter()
        with counter:
            counted.step(images, labels)
        plain.step(images, labels)
    assert counter.peak_bytes > 0
    assert torch.equal(counted.stage.flat.buffer, plain.stage.flat.buffer)
    assert torch.equal(counted.descent.momentum, plain.descent.momentum)


def test_momentum_costs_its_bytes() -> None:
    trainer = small_trainer()
    with_momentum = run_step(CountedCap(), trainer, None)
    without = run_step(CountedCap(), small_trainer(momentum=0.0), None)
    assert with_momentum - without == -(-trainer.stage.flat.parameters * 4 // GRANULE_BYTES) * GRANULE_BYTES


# --- GPU ---

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture
def cuda_trainer() -> Iterator[LocalTrainer]:
    from fedfreeze.methods import full_model_stage
    from fedfreeze.network.blocks import build_network

    config = make_config({"model": {"name": "resnet18", "width": 64}, "train": {"batch_size": 128}})
    blocked = build_network(config.model, (3, 32, 32), 10, 0)
    yield LocalTrainer(full_model_stage(blocked, torch.device("cuda")), config.train)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@needs_cuda
def test_cuda_fraction_passes_at_the_reserved_peak_and_fails_one_segment_below(cuda_trainer: LocalTrainer) -> None:
    from fedfreeze.device.cuda_cap import CudaFractionCap

    images = torch.randn(128, 3, 32, 32)
    labels = torch.randint(0, 10, (128,))

    def one_step(cap: CudaFractionCap, memory: DeviceMemory, x: torch.Tensor, y: torch.Tensor) -> None:
        cap.step(memory, "step", lambda: [*cuda_trainer.held_tensors(), x, y], lambda: cuda_trainer.step(x, y))

    def train(cap: CudaFractionCap, cap_bytes: int | None) -> int:
        with cap.device(cap_bytes) as memory:
            for _ in range(2):
                one_step(cap, memory, images.cuda(), labels.cuda())
        return memory.peak_bytes

    cap = CudaFractionCap(torch.device("cuda", 0))  # the emulator itself holds nothing: all of it is the device's
    train(cap, None)  # libraries are warmed before anything is measured
    peak = train(cap, None)
    assert train(cap, peak) <= peak
    with pytest.raises(DeviceOutOfMemoryError, match="tried to allocate"):
        train(cap, peak - 2 * MIB)
    cuda_trainer.drop_gradients()
    assert train(cap, peak) <= peak
