"""Devices asked together: what each would tell alone, the same bits on any ranks, each under its own cap."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.data.store import Data, Split
from fedfreeze.device.asking import Asker, samples_stay_apart
from fedfreeze.device.cap import CountedCap
from fedfreeze.device.probe import LOSSES, Probe
from fedfreeze.messages import AskedGroup, ProbePlan
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import Stage

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
SIZES = (5, 7, 1, 8, 11, 5, 20, 3, 9, 5)  # samples of the devices
BATCH = 8


def data_of(samples: int) -> Data:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (samples, *SHAPE), dtype=np.uint8)
    split = Split(images, generator.integers(0, 10, samples))
    return Data(split, split, 10, (0.5,) * 3, (0.25,) * 3)


DATA = data_of(sum(SIZES))
PARTS = np.split(np.random.default_rng(1).permutation(sum(SIZES)), np.cumsum(SIZES)[:-1])


def stage_of(index: int = 1, **model: object) -> Stage:
    config = make_config({"model": {"width": 4} | model})
    return make_method(config, build_network(config.model, SHAPE, 10, 0)).enter_stage(index, CPU)


class Counting(CountedCap):
    """Notes how often a step was counted."""

    counted = 0

    def step(self, memory, kind, held, run, shortened=None):
        def watched():
            self.counted += 1
            return held()

        return super().step(memory, kind, watched, run, shortened)


def asker(stage: Stage, *, size: int = 512, cap: CountedCap | None = None) -> Asker:
    cap = cap or CountedCap()
    peaks: dict = {}
    probe = Probe(stage, cap, 10, size, seed=0)
    nothing = {"begin": lambda rows: None, "check": lambda: None}
    return Asker(probe, cap, DATA, PARTS, CPU, batch_size=BATCH, kind=("asked",), peaks=peaks, **nothing)


def plan_of(ranks: Sequence[int], caps: Sequence[int | None] | None = None) -> ProbePlan:
    """Three groups of devices, on these ranks."""
    members = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
    caps = caps or [None] * len(SIZES)
    groups = tuple(
        AskedGroup(rank, devices, tuple(caps[d] for d in devices)) for rank, devices in zip(ranks, members, strict=True)
    )
    return ProbePlan(1, 0, groups, 512)


@pytest.mark.parametrize("size", [0, 64, 10**6])
@pytest.mark.parametrize("index", [0, 2])
def test_a_device_tells_together_what_it_tells_alone(index: int, size: int) -> None:
    stage = stage_of(index)
    alone = asker(stage, size=size).ask(plan_of([0, 0, 0]), 0, together=False)
    joined = asker(stage, size=size).ask(plan_of([0, 0, 0]), 0, together=True)
    assert joined[:, 0].all()
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-6)
    assert (joined.shape[1] > 1 + LOSSES) == (size > 0)


def test_answers_have_the_same_bits_whatever_rank_asks_and_counted_before_or_not() -> None:
    stage = stage_of()
    once = asker(stage)
    whole = once.ask(plan_of([0, 0, 0]), 0, together=True)
    assert torch.equal(once.ask(plan_of([0, 0, 0]), 0, together=True), whole)
    spread = [asker(stage).ask(plan_of([0, 2, 1]), rank, together=True) for rank in range(3)]
    assert torch.equal(sum(spread), whole)
    assert all(int((table[:, 0] > 0).sum()) in (3, 4) for table in spread)


def test_each_kind_of_step_is_counted_once_under_a_cap() -> None:
    cap = Counting()
    asking = asker(stage_of(), cap=cap)
    asking.ask(plan_of([0, 0, 0]), 0, together=True)
    # batches of a device of n samples: n // 8 of eight, and the rest
    kinds = {length for size in SIZES for length in [BATCH] * (size >= BATCH) + [size % BATCH] if length}
    assert set(asking.peaks) == {("asked", length) for length in kinds}
    assert cap.counted == len(kinds)
    asking.ask(plan_of([0, 0, 0]), 0, together=True)
    assert cap.counted == len(kinds)


@pytest.mark.parametrize("known", [False, True])
def test_a_device_whose_cap_is_too_small_fails_alone_and_changes_nobody(known: bool) -> None:
    stage = stage_of()
    asking = asker(stage)
    whole = asking.ask(plan_of([0, 0, 0]), 0, together=True)
    peaks = asking.peaks
    if not known:
        asking = asker(stage)
    need = peaks[("asked", 5)]
    caps: list[int | None] = [None] * len(SIZES)
    caps[0], caps[5] = need - 1, need
    table = asking.ask(plan_of([0, 0, 0], caps), 0, together=True)
    answered = [device for device in range(len(SIZES)) if table[device, 0] > 0]
    assert answered == list(range(1, len(SIZES)))
    assert torch.equal(table[1:], whole[1:])
    assert not table[0].any()


def test_a_device_whose_rest_fits_but_not_its_batch_fails() -> None:
    asking = asker(stage_of())
    asking.ask(plan_of([0, 0, 0]), 0, together=True)
    rest, batch = (asking.peaks[("asked", length)] for length in (3, BATCH))
    assert rest < batch
    caps: list[int | None] = [None] * len(SIZES)
    caps[4] = batch - 1  # 11 samples: a batch of eight, and three
    assert not asking.ask(plan_of([0, 0, 0], caps), 0, together=True)[4].any()


def test_no_samples_and_losses_that_are_no_number_are_no_answer() -> None:
    stage = stage_of()
    asking = asker(stage)
    asking.parts = [*PARTS[:1], np.zeros(0, dtype=np.int64), *PARTS[2:]]
    table = asking.ask(plan_of([0, 0, 0]), 0, together=True)
    assert [device for device in range(len(SIZES)) if not table[device, 0]] == [1]
    with torch.no_grad():
        stage.flat.buffer.fill_(torch.nan)
    assert not asking.ask(plan_of([0, 0, 0]), 0, together=True).any()


def test_a_network_that_mixes_samples_is_found_out() -> None:
    assert samples_stay_apart(stage_of(), DATA, CPU)
    stage = stage_of()
    stage.active.append(nn.BatchNorm2d(4 * 2, track_running_stats=False))
    assert not samples_stay_apart(stage.eval(), DATA, CPU)
