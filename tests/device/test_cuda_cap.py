"""The cap of a GPU against an allocator that is a fake: whose bytes are whose, and what the GPU is asked, and when."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedfreeze.device.cap import DeviceOutOfMemoryError
from fedfreeze.device.cuda_cap import CudaFractionCap, fill_gaps, fraction_of
from fedfreeze.errors import UnavailableError
from fedfreeze.units import MIB
from tests.support.fake_gpu import FakeGpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    found = FakeGpu()
    found.install(monkeypatch)
    return found


def train(cap: CudaFractionCap, gpu: FakeGpu, cap_bytes: int | None, needs: list[int], kind: object = None) -> int:
    """Emulate a device that allocates as much, one after the other; return its recorded peak."""
    taken = 0
    try:
        with cap.device(cap_bytes, kind) as memory:
            for each in needs:
                gpu.take(each)
                taken += 1
    finally:
        for _ in range(taken):
            gpu.free()
    return memory.peak_bytes


@given(st.integers(1, 2**38), st.integers(2**33, 2**38))
@settings(max_examples=500, deadline=None)
@example(2**38 - 1, 2**33 + 1)  # caps beyond what the card has
def test_a_limit_is_never_rounded_below_what_is_allowed(allowed: int, total: int) -> None:
    got = int(fraction_of(allowed, total) * total)  # as torch calculates
    if allowed <= total:
        assert allowed <= got <= allowed + 64
    else:
        assert fraction_of(allowed, total) == 1.0


def test_a_plain_quotient_would_be_rounded_below() -> None:
    total = 85_045_477_376
    lost = [allowed for allowed in range(MIB, 2000 * MIB, 2 * MIB) if int(allowed / total * total) < allowed]
    assert lost
    assert all(int(fraction_of(allowed, total) * total) >= allowed for allowed in lost)


def test_what_libraries_set_aside_is_no_devices(gpu: FakeGpu) -> None:
    """Read before they are warm, the first device would pay for their workspaces, and later stages' would not."""
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    gpu.take(30 * MIB)  # the stage's weights: each device's own
    with cap.on_top():
        gpu.take(32 * MIB)  # a workspace, which stays
        gpu.take(12 * MIB)
        gpu.free()  # what the first step needed for itself
    assert cap.emulator_bytes == 32 * MIB
    assert train(cap, gpu, 50 * MIB, [20 * MIB]) == 50 * MIB
    with pytest.raises(DeviceOutOfMemoryError, match=r"an allocation of 20\.00 MiB needs") as caught:
        train(cap, gpu, 50 * MIB - 1, [20 * MIB])
    assert caught.value.needed_bytes == 50 * MIB
    # a later stage, or a resumed run, in which the workspace is there from the start
    gpu.live.remove(30 * MIB)
    later = CudaFractionCap(GPU)
    later.begin_stage()
    gpu.take(30 * MIB)
    with later.on_top():
        gpu.take(12 * MIB)
        gpu.free()
        gpu.live.append(1024)  # a constant that is made once
    gpu.live.remove(1024)
    assert later.emulator_bytes == 32 * MIB
    assert train(later, gpu, 50 * MIB, [20 * MIB]) == 50 * MIB


def test_what_a_device_loads_counts_before_it_asks_for_more(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    gpu.take(30 * MIB)
    with pytest.raises(DeviceOutOfMemoryError, match=r"load needs 30\.00 MiB, the cap is 28\.00 MiB"):
        train(cap, gpu, 28 * MIB, [])
    assert gpu.limit_bytes == gpu.total_memory  # the next one begins without a limit


def test_a_device_that_fails_leaves_no_limit_and_no_memory(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    with pytest.raises(DeviceOutOfMemoryError):
        train(cap, gpu, 30 * MIB, [20 * MIB, 20 * MIB], "kind")
    assert gpu.limit_bytes == gpu.total_memory
    assert train(cap, gpu, 40 * MIB, [20 * MIB, 20 * MIB], "kind") == 40 * MIB
    assert gpu.live == []


def test_a_device_seen_before_under_its_cap_asks_nothing_of_the_gpu(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    assert train(cap, gpu, 40 * MIB, [20 * MIB, 10 * MIB], "kind") == 30 * MIB
    gpu.calls.clear()
    assert train(cap, gpu, 40 * MIB, [20 * MIB, 10 * MIB], "kind") == 30 * MIB
    assert gpu.calls == []
    for cap_bytes, kind in ((42 * MIB, "kind"), (40 * MIB, "another"), (40 * MIB, None)):
        assert train(cap, gpu, cap_bytes, [20 * MIB, 10 * MIB], kind) == 30 * MIB
        assert {"synchronize", "empty_cache", "set_per_process_memory_fraction"} <= set(gpu.calls)
        gpu.calls.clear()


def test_a_device_that_is_measured_is_counted_whoever_came_before(gpu: FakeGpu) -> None:
    """Its steps must run the same way on any rank, or reserved bytes could differ."""
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    ways: list[str] = []

    def run(kind: str) -> None:
        with cap.device(40 * MIB, kind) as memory:
            for _ in range(2):
                cap.step(memory, "step", list, lambda: ways.append("counted"), lambda: ways.append("not"))

    run("one")
    run("another")  # with steps that were counted before
    run("one")  # runs without limit
    assert ways == ["counted", "not", "counted", "not", "not", "not"]


def test_one_that_failed_is_held_to_its_cap_again_and_a_new_stage_forgets_all(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    for _ in range(2):
        with pytest.raises(DeviceOutOfMemoryError):
            train(cap, gpu, 18 * MIB, [20 * MIB], "kind")
    train(cap, gpu, 20 * MIB, [20 * MIB], "kind")
    cap.begin_stage()
    gpu.calls.clear()
    train(cap, gpu, 20 * MIB, [20 * MIB], "kind")
    assert "empty_cache" in gpu.calls


def test_a_library_that_would_make_do_with_less_is_not_asked_twice(gpu: FakeGpu) -> None:
    """cuDNN takes torch's error for an advice, and uses a kernel of other bits for all who come after."""
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    asked = []

    def convolution() -> None:
        for workspace in (20 * MIB, 4 * MIB):
            asked.append(workspace)
            try:
                gpu.take(workspace)
                return
            except torch.OutOfMemoryError as error:
                if type(error) is not torch.OutOfMemoryError:
                    raise  # cuDNN catches what the allocator itself raises

    with pytest.raises(DeviceOutOfMemoryError), cap.device(19 * MIB):
        convolution()
    assert asked == [20 * MIB]
    gpu.others_bytes = 990 * MIB
    with pytest.raises(UnavailableError):  # an evaluation, say
        convolution()
    assert asked == [20 * MIB] * 2


def test_a_refusal_is_told_by_the_last_cap_of_its_card(gpu: FakeGpu) -> None:
    first, last = CudaFractionCap(GPU), CudaFractionCap(GPU)
    for cap in (first, last):
        cap.begin_stage()
    assert len(gpu.observers) == 1
    with pytest.raises(DeviceOutOfMemoryError), last.device(5 * MIB):
        gpu.take(10 * MIB)
    gpu.observers[0](1, 10 * MIB, 0, 0)  # of another card nobody here knows
    del first, last, cap
    gpu.observers[0](0, 10 * MIB, 0, 0)


def test_gaps_in_segments_are_filled_as_far_as_a_device_could_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(kind: str, *sizes: int, device: int = 0) -> dict[str, object]:
        blocks = [{"size": abs(size), "state": "inactive" if size < 0 else "active_allocated"} for size in sizes]
        return {"device": device, "segment_type": kind, "blocks": blocks}

    found = [
        segment("small", 512, 512 - MIB, -MIB, 1024),
        segment("small", 512, 512 - 2 * MIB),
        segment("large", 15 * MIB, -5 * MIB),
        segment("large", 19 * MIB, -MIB),
        segment("large", 4 * MIB, -16 * MIB, device=1),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: found)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **_: empty(size, dtype=torch.uint8))
    assert [len(each) for each in fill_gaps(GPU)] == [MIB - 512, MIB, MIB, MIB - 512, 5 * MIB]


def test_what_is_cached_from_others_is_no_devices(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    gpu.take(100 * MIB)
    gpu.free()  # merged values, an evaluation
    assert train(cap, gpu, 20 * MIB, [20 * MIB]) == 20 * MIB


@pytest.mark.parametrize("known", [False, True])
def test_a_card_that_is_full_is_no_devices_fault(gpu: FakeGpu, known: bool) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    if known:
        train(cap, gpu, 60 * MIB, [50 * MIB], "kind")
        gpu.empty_cache()  # a device that was seen before does not do so by itself
    gpu.others_bytes = 960 * MIB  # another process has taken the rest
    with pytest.raises(UnavailableError, match=r"the memory of cuda:0 is not enough .*start fewer ranks") as caught:
        train(cap, gpu, 60 * MIB, [50 * MIB], "kind")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnavailableError):
        train(cap, gpu, None, [50 * MIB])


def test_without_a_cap_a_device_is_measured(gpu: FakeGpu) -> None:
    cap = CudaFractionCap(GPU)
    cap.begin_stage()
    assert train(cap, gpu, None, [300 * MIB, 3 * MIB]) == 320 * MIB
