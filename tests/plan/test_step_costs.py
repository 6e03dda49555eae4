"""What a step takes a fleet: the same figures as the cost model's, and who goes which way."""

import math
from itertools import pairwise

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.config.ways import WHOLE
from fedfreeze.device.cost import StageCost, WayCost, fake_tensors, measure_costs
from fedfreeze.fleet.devices import Fleet
from fedfreeze.network.blocks import build_outline
from fedfreeze.plan.step_costs import Caps, StageSteps, StepCost, step_costs, with_split

SHAPE, CLASSES = (3, 12, 12), 4
PLACES = ("conv1", "layer1", "layer2", "layer3")


def small(method: dict[str, object] | None = None, **train: object) -> Config:
    return make_config(
        {
            "model": {"name": "resnet8", "width": 4},
            "train": {"batch_size": 16, "fit": "auto", **train},
            "method": method or {},
        }
    )


def steps_of(config: Config) -> StageSteps:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_tensors(mode):
        outline = build_outline(config.model, SHAPE, CLASSES, config.seed)
    return StageSteps(config, outline, SHAPE, mode)


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small({"window": 2}, fit="auto, micro(4)"),
        small({"output_module": "pool"}),
        small({"output_module": "block"}, fit="whole"),
        small(prefix="stored"),
    ],
    ids=["plain", "window", "pool", "block", "stored"],
)
def test_the_figures_are_those_of_the_cost_model_and_missing_blocks_add_up(config: Config) -> None:
    steps, window = steps_of(config), config.method.window
    cut = (0, 1, 2, 3, 4)
    costs = measure_costs(with_split(config, PLACES), SHAPE, CLASSES)
    for stage, cost in enumerate(costs.stages):
        begin, tail = cut[stage], cut[stage + window :]
        assert steps.of(begin, tail) == step_costs(cost, config)
        further = sum(steps.further_flops(*block) for block in pairwise(tail))
        assert steps.of(begin, tail)[0].flops == steps.of(begin, tail[:1])[0].flops + further
        if config.train.prefix != "stored":
            assert steps.frozen_flops(begin) == cost.frozen_flops
    assert any(cost.frozen_flops for cost in costs.stages)


def test_a_span_takes_no_less_than_its_parts() -> None:
    """The bound by which the search leaves spans unmeasured."""
    steps = steps_of(small())
    for begin in range(4):
        for end in range(begin + 2, 5):
            parts = sum(
                steps.of(place, [place + 1])[0].flops - steps.frozen_flops(place) - steps.output_flops(place + 1)
                for place in range(begin, end)
            )
            least = steps.frozen_flops(begin) + parts + steps.output_flops(end)
            assert 0.5 * steps.of(begin, [end])[0].flops < least < steps.of(begin, [end])[0].flops


@pytest.mark.parametrize(
    ("needs", "takers", "mean"),
    [
        ((50, 20), (3, 2), (3 * 5 + 2 * 7) / 5),
        ((50,), (3,), 5.0),
        ((20, 50), (5, 0), 5.0),  # the second is for those that the first does not fit
        ((51, 50), (2, 1), 17 / 3),
        ((99, 99), (0, 0), math.inf),
    ],
)
def test_each_device_goes_the_first_way_that_its_cap_holds(
    needs: tuple[int, ...], takers: tuple[int, ...], mean: float
) -> None:
    fleet = Fleet((10, 50, 20, 60, 70, 30))
    steps = [StepCost(bytes_, flops) for bytes_, flops in zip(needs, (5, 7), strict=False)]
    caps = Caps(fleet)
    assert caps.takers(steps) == takers
    assert caps.mean_flops(steps) == pytest.approx(mean)
    assert sum(takers) == len(fleet.eligible(min(needs))) == caps.eligible(min(needs))
    ways = tuple(WayCost(WHOLE, step.memory_bytes, step.flops) for step in steps)
    cost = StageCost("all", ways, 0, 0, 0, 0, 0)
    able = [cap for cap in fleet.memory_cap_bytes if cap is not None and cap >= min(needs)]
    assert [sum(cost.way_for(cap) == i for cap in able) for i in range(len(steps))] == list(takers)


def test_devices_without_caps_go_the_first_way() -> None:
    caps = Caps(Fleet((None, None)))
    assert caps.takers([StepCost(10**15, 3), StepCost(1, 2)]) == (2, 0)
    assert caps.limit_bytes(2) == math.inf
    assert Caps(Fleet((10, 50, 20))).limit_bytes(2) == 20
