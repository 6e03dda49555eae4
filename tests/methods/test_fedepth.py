"""FeDepth: cuts by hand, costs against real steps, and a round of the emulator against a loop in plain torch."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import Way
from fedfreeze.data.batches import drawn_in_round, training_batches
from fedfreeze.data.sources import make_source
from fedfreeze.data.store import Data, open_store, prepare
from fedfreeze.device.cap import count_peak
from fedfreeze.device.cost import Costs, fit_method, measure_costs
from fedfreeze.device.emulator import Emulator
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet
from fedfreeze.messages import Assignment, DeviceReport, RoundPlan
from fedfreeze.methods import make_method
from fedfreeze.methods.aggregate import fraction_bits
from fedfreeze.methods.fedepth import FeDepth, levels_of, pieces_under, runs_of
from fedfreeze.network.blocks import BlockedNetwork, build_network
from fedfreeze.server.clock import EmulatedClock
from tests.support.checks import assert_one_line

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
BATCH = 8
SAMPLES = (20, 33, 9, 17)
CAPS = (1, 10**12)  # whatever is between them has a level


def config_of(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "method": {"name": "fedepth"},
        "model": {"name": "resnet8", "width": 4},
        "train": {"batch_size": BATCH, "local_epochs": 2},
    }
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    return make_config(values)


def method_of(config: Config, levels: Sequence[Sequence[tuple[int, int]]]) -> FeDepth:
    blocked = build_network(config.model, SHAPE, 10, config.seed)
    method = make_method(config, blocked, {"levels": [[list(piece) for piece in level] for level in levels]})
    assert isinstance(method, FeDepth)
    return method


# --- cuts


def of_blocks(weights: Sequence[int], held: int = 0) -> dict[tuple[int, int], int]:
    """What runs need where each block needs so much, and each block before it `held`."""
    return {(begin, end): held * begin + sum(weights[begin:end]) for begin, end in runs_of(len(weights))}


def test_a_piece_goes_on_as_long_as_the_cap_holds_it() -> None:
    # the authors' ResNet-20: blocks need less as images shrink; a sixth, a third and a half of all
    needed = of_blocks([10, 10, 10, 6, 5, 5, 4, 3, 3])
    assert pieces_under(10, needed, 9) == ((0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 9))
    assert pieces_under(26, needed, 9) == ((0, 2), (2, 6), (6, 9))
    assert pieces_under(30, needed, 9) == ((0, 3), (3, 9))
    assert pieces_under(56, needed, 9) == ((0, 9),)


def test_blocks_that_the_cap_does_not_hold_are_in_no_piece() -> None:
    needed = of_blocks([10, 3, 9, 2, 2])
    assert pieces_under(5, needed, 5) == ((1, 2), (3, 5))
    assert pieces_under(9, needed, 5) == ((1, 2), (2, 3), (3, 5))
    assert pieces_under(1, needed, 5) == ()


def test_levels_need_more_and_are_worth_more() -> None:
    needed = of_blocks([4, 2, 3], held=1)
    levels = levels_of(needed, 3)
    assert levels == [((1, 2),), ((0, 1), (1, 2)), ((0, 1), (1, 2), (2, 3)), ((0, 2), (2, 3)), ((0, 3),)]
    memory = [max(needed[piece] for piece in level) for level in levels]
    assert memory == sorted(set(memory)) == [3, 4, 5, 6, 9]
    # under each cap the level that it holds has as many blocks and as few pieces as the cut for that very cap
    for cap in range(3, 12):
        held = [level for level, needs in zip(levels, memory, strict=True) if needs <= cap][-1]
        own = pieces_under(cap, needed, 3)
        assert len(held) == len(own)
        assert {block for piece in held for block in range(*piece)} == {b for piece in own for b in range(*piece)}


def test_without_caps_the_whole_model_is_one_piece() -> None:
    config = config_of()
    fitted = fit_method(config, SHAPE, 10, [None, None])
    (cost,) = measure_costs(config, SHAPE, 10, fitted).levels[0]
    assert cost.name == "1-3 of 3 blocks"
    assert cost.memory_bytes == measure_costs(config, SHAPE, 10, fitted).full.memory_bytes


# --- costs


def costs_of(config: Config) -> tuple[Costs, dict[str, Any]]:
    fitted = fit_method(config, SHAPE, 10, CAPS)
    return measure_costs(config, SHAPE, 10, fitted), fitted


@pytest.mark.parametrize(
    ("model", "fit"),
    [("resnet8", "auto, micro(2)"), ("vit", "whole"), pytest.param("vgg11", "auto", marks=pytest.mark.slow)],
)
def test_measured_peak_of_the_largest_piece_is_the_predicted_one(model: str, fit: str) -> None:
    config = config_of(model={"name": model, "width": 8}, train={"fit": fit})
    costs, fitted = costs_of(config)
    assert measure_costs(config, SHAPE, 10, fitted, values=False) == measure_costs(
        config, SHAPE, 10, fitted, values=True
    )
    method = make_method(config, build_network(config.model, SHAPE, 10, 0), fitted)
    assert len(costs.levels[0]) == method.num_levels(0) > 2
    memory = [cost.least_bytes for cost in costs.levels[0]]
    assert memory == sorted(set(memory))
    images, labels = torch.randn(BATCH, *SHAPE), torch.randint(0, 10, (BATCH,))
    for level, cost in enumerate(costs.levels[0]):
        part = method.enter_level(0, level, CPU)
        for way in cost.ways:
            assert max(peaks_of(part, config, way.way, images, labels)) == way.memory_bytes
    assert costs.levels[0][-1].ways == costs.full.ways


def peaks_of(part: Any, config: Config, way: Way, images: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Peaks of the second real step of each piece."""
    trainer = part.trainer(config.train)
    trainer.begin(part.flat.values().clone(), 0.1, way)
    found = []
    for _ in trainer.pieces():
        trainer.step(images, labels)
        held = [*trainer.held_tensors(), images, labels]
        found.append(count_peak(lambda: trainer.step(images, labels), held))
    return found


def test_operations_of_all_pieces_against_a_hand_count() -> None:
    config = config_of(train={"batch_size": 2})
    costs = measure_costs(config, SHAPE, 10, {"levels": [[[0, 1], [1, 2], [2, 3]], [[0, 3]]]})
    cost = costs.levels[0][0]
    # two operations a multiply-add; images of 8x8, 4x4 and 2x2 pixels, 4, 8 and 16 channels
    stem, layer1 = 4 * 9 * 64, 2 * (4 * 4 * 9) * 64
    enter2, layer2 = (4 * 8 * 9 + 4 * 8) * 16, 8 * 8 * 9 * 16
    enter3, layer3 = (8 * 16 * 9 + 8 * 16) * 4, 16 * 16 * 9 * 4
    head = 16 * 10
    frozen = [0, stem + layer1, stem + layer1 + enter2 + layer2]
    # forward and both gradients, but for that of what comes in
    trained = [2 * stem + 3 * layer1, 2 * enter2 + 3 * layer2, 2 * enter3 + 3 * layer3]
    assert cost.frozen_flops == 2 * 2 * sum(frozen)
    assert cost.step_flops == 2 * 2 * (sum(frozen) + sum(trained) + 3 * 3 * head)
    assert cost.forward_flops == 2 * 2 * (frozen[2] + enter3 + layer3 + head)
    assert cost.trained_elements == costs.levels[0][-1].trained_elements
    assert cost.received_elements == 0


def test_a_block_that_only_runs_is_sent_down_and_not_up() -> None:
    config = config_of()
    costs, fitted = costs_of(config)
    level = fitted["levels"].index([[1, 2]])
    cost = costs.levels[0][level]
    first, second = (sum(t.numel() for t in floats(block)) for block in blocked_of(config).blocks[:2])
    assert cost.received_elements == first
    assert cost.trained_elements == second + 16 * 10 + 10
    assert (cost.bytes_up, cost.bytes_down) == (4 * cost.trained_elements, 4 * (first + cost.trained_elements))
    fleet = Fleet((cost.memory_bytes,), speed_flops=[1e9], up_bytes_s=[1e3], down_bytes_s=[1e4])
    clock = EmulatedClock(fleet, [20], costs, config.train)
    assert clock.level.tolist() == [level]
    clock.wait_for([0])
    clock.finish([0], 1)
    clock.end_round([DeviceReport(0, 20)])
    assert (clock.bytes_up, clock.bytes_down) == (cost.bytes_up, cost.bytes_down)
    assert clock.flops == 2 * 20 * cost.step_flops / BATCH
    assert clock.emulated_s == pytest.approx(cost.bytes_up / 1e3 + cost.bytes_down / 1e4 + clock.flops / 1e9)


def blocked_of(config: Config) -> BlockedNetwork:
    return build_network(config.model, SHAPE, 10, config.seed)


def floats(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


# --- a round of the emulator


LEVELS = [((1, 2),), ((0, 1), (1, 2), (2, 3)), ((0, 2), (2, 3)), ((0, 3),)]


@pytest.fixture(scope="module")
def data() -> Data:
    config = config_of()
    assert make_source(config.data)
    return open_store(prepare(config.data))


def emulator_of(config: Config, data: Data, levels: Sequence[Any] = LEVELS) -> Emulator:
    ends = np.cumsum(SAMPLES)
    parts = [np.arange(end - samples, end) for end, samples in zip(ends, SAMPLES, strict=True)]
    emulator = Emulator(config, data, parts, method_of(config, levels), CPU)
    emulator.enter_stage(0)
    return emulator


def plan_of(assignments: Sequence[Assignment]) -> RoundPlan:
    return RoundPlan(3, 0, 3, tuple(assignments), 0.1, fraction_bits(sum(SAMPLES)))


def one_round(emulator: Emulator, assignments: Sequence[Assignment]) -> list[DeviceReport]:
    plan = plan_of(assignments)
    update = emulator.empty_update(plan)
    reports = emulator.train(plan.devices_of(0), plan, update)
    emulator.apply(update, sum(SAMPLES[report.device] for report in reports if report.failed is None))
    emulator.settle()
    return reports


def trained_plainly(config: Config, data: Data, device: int, pieces: Any, network: BlockedNetwork) -> list[float]:
    """Train a device's pieces in place, with nothing but torch; return the losses of its steps."""
    begin_row = sum(SAMPLES[:device])
    rows = np.arange(begin_row, begin_row + SAMPLES[device])
    blocks, head = network.blocks, network.head
    losses = []
    for number, (begin, end) in enumerate(pieces):
        for block in (*blocks[:begin], *blocks[end:]):
            block.eval()
        trained = [*blocks[begin:end], head]
        for module in trained:
            module.train()
        parameters = [parameter for module in trained for parameter in module.parameters()]
        optimiser = torch.optim.SGD(parameters, 0.1, config.train.momentum, weight_decay=config.train.weight_decay)
        drawn = drawn_in_round(config, data, len(rows), stage=0, round_number=3, device=device, piece=number)
        for images, labels in training_batches(data, rows, drawn, CPU):
            with torch.no_grad():
                x = images
                for block in blocks[:begin]:
                    x = block(x)
            for block in blocks[begin:end]:
                x = block(x)
            missing, stride = 16 - x.shape[1], x.shape[-1] // 2
            x = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing // 2))
            optimiser.zero_grad()
            loss = functional.cross_entropy(head(x), labels)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    return losses


def test_a_round_is_the_loop_in_plain_torch(data: Data) -> None:
    config = config_of()
    emulator = emulator_of(config, data)
    before = blocked_of(config)
    reports = one_round(emulator, [Assignment(device, 0, None, level=device) for device in range(4)])
    after = emulator.method.blocked

    locally = []
    for device, pieces in enumerate(LEVELS):
        network = copy.deepcopy(before)
        losses = trained_plainly(config, data, device, pieces, network)
        report = next(report for report in reports if report.device == device)
        assert report.steps == len(losses)
        assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        locally.append(network)
    for part in (0, 1, 2, "head"):
        # who trained it: of device 0 block 1 alone, of the others all; of all the head
        devices = [1, 2, 3] if part in (0, 2) else [0, 1, 2, 3]
        weight = sum(SAMPLES[device] for device in devices)
        theirs = [floats(part_of(locally[device], part)) for device in devices]
        for place, merged in enumerate(floats(part_of(after, part))):
            expected = sum(SAMPLES[d] * own[place].detach() for d, own in zip(devices, theirs, strict=True)) / weight
            torch.testing.assert_close(merged.detach(), expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(merged, floats(part_of(before, part))[place])


def part_of(network: BlockedNetwork, part: int | str) -> nn.Module:
    return network.head if part == "head" else network.blocks[int(part)]


def test_what_nobody_trains_stays(data: Data) -> None:
    emulator = emulator_of(config_of(), data)
    before = [t.clone() for block in (0, 2) for t in floats(emulator.method.blocked.blocks[block])]
    reports = one_round(emulator, [Assignment(0, 0, None, level=0), Assignment(1, 0, None, level=0)])
    assert [report.failed for report in reports] == [None, None]
    after = [t for block in (0, 2) for t in floats(emulator.method.blocked.blocks[block])]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_caps_hold_in_every_piece(data: Data) -> None:
    config = config_of()
    costs, fitted = costs_of(config)
    levels = costs.levels[0]
    for number, cost in enumerate(levels):
        emulator = emulator_of(config, data, fitted["levels"])
        under, over = one_round(
            emulator,
            [
                Assignment(0, 0, cost.memory_bytes, level=number),
                Assignment(1, 0, cost.memory_bytes - 1, level=number),
            ],
        )
        assert (under.failed, under.peak_bytes) == (None, cost.memory_bytes)
        assert over.out_of_memory
        assert over.peak_bytes > cost.memory_bytes - 1
        # a device that ran out leaves nothing behind: the next is as if it were the first
        alone = emulator_of(config, data, fitted["levels"])
        one_round(alone, [Assignment(0, 0, None, level=number)])
        assert torch.equal(emulator.values, alone.values)


def test_every_way_that_keeps_the_bits_keeps_them(data: Data) -> None:
    config = config_of(train={"fit": "auto, micro(2)"})
    values = {}
    for way in ("whole", "recompute", "micro(2)"):
        emulator = emulator_of(config, data)
        one_round(emulator, [Assignment(device, 0, None, level=device, way=way) for device in range(4)])
        values[way] = emulator.values
    assert torch.equal(values["whole"], values["recompute"])
    assert values["micro(2)"].isfinite().all()
    assert not torch.equal(values["whole"], values["micro(2)"])


def test_devices_do_not_depend_on_who_trained_before(data: Data) -> None:
    config = config_of()
    alone, after = emulator_of(config, data), emulator_of(config, data)
    one_round(after, [Assignment(2, 0, None, level=1), Assignment(3, 0, None, level=1)])
    after.values = alone.values.clone()
    for emulator in (alone, after):
        one_round(emulator, [Assignment(1, 0, None, level=1)])
    assert torch.equal(alone.values, after.values)


def test_the_whole_in_one_piece_trains_as_fedavg(data: Data) -> None:
    config = config_of()
    fedavg = config_of(method={"name": "fedavg"})
    ends = np.cumsum(SAMPLES)
    parts = [np.arange(end - samples, end) for end, samples in zip(ends, SAMPLES, strict=True)]
    found = []
    for each, level in ((config, len(LEVELS) - 1), (fedavg, 0)):
        method = method_of(each, LEVELS) if each is config else make_method(each, blocked_of(each))
        emulator = Emulator(each, data, parts, method, CPU)
        emulator.enter_stage(0)
        one_round(emulator, [Assignment(device, 0, None, level=level) for device in range(4)])
        found.append(emulator.values)
    assert torch.equal(*found)


def test_pieces_draw_batches_of_their_own(data: Data) -> None:
    config = config_of()
    orders = [
        torch.cat([b.chosen for b in drawn_in_round(config, data, 33, stage=0, round_number=1, device=2, piece=piece)])
        for piece in range(3)
    ]
    for order in orders:  # two epochs of 33; a last batch of one sample is dropped
        assert len(order) == 64
        assert order.bincount().max() <= 2
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(orders))
    plain = drawn_in_round(config, data, 33, stage=0, round_number=1, device=2)
    assert torch.equal(orders[0], torch.cat([b.chosen for b in plain]))


# --- what it cannot be used with


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        measure_costs(config_of(train={"prefix": "stored"}), SHAPE, 10)
    assert_one_line(caught.value, "train.prefix: stored", "fedepth", "use train.prefix=recomputed")


BRANCHES = """
from torch import nn

class Branching(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x if x.sum() > 0 else -x)

def branching(num_classes, in_channels, image_size):
    return Branching(in_channels, num_classes)
"""


def test_a_network_that_cannot_be_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "branching_of_mine.py").write_text(BRANCHES)
    monkeypatch.chdir(tmp_path)
    config = make_config({"method": {"name": "fedepth"}, "model": {"factory": "branching_of_mine:branching"}})
    with pytest.raises(ConfigError) as caught:
        fit_method(config, SHAPE, 10, CAPS)
    assert_one_line(caught.value, "model.factory", "cannot be followed", "branches on values", "method.name=fedavg")
