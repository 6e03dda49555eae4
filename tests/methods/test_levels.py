"""Levels from caps: predicted memory is what a real step takes, and each method fits itself to the fleet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cap import count_peak
from fedfreeze.device.cost import fake_tensors, fit_method, measure_costs, step_memory
from fedfreeze.errors import ConfigError
from fedfreeze.methods import METHODS, make_method
from fedfreeze.methods.fedavg import full_model_stage
from fedfreeze.methods.widths import level_widths, scaled
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.units import MIB
from tests.support.checks import assert_one_line

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
BATCH = 8
OURS = ("exclusivefl", "allsmall", "heterofl", "fedrolex", "depthfl", "progfed", "progfed_layerwise")
OTHERS = [("heterofl", "vgg11"), ("depthfl", "resnet10"), ("progfed_layerwise", "vit")]

OWN = """
from torch import nn

def convolutions(num_classes, in_channels, image_size, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 1, 1), nn.GroupNorm(1, 2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))

def flattened(num_classes, in_channels, image_size, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * image_size[0] * image_size[1], num_classes))

def grouped(num_classes, in_channels, image_size, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def config_of(name: str, **sections: Any) -> Config:
    values: dict[str, Any] = {"model": {"name": "resnet8", "width": 8}, "train": {"batch_size": BATCH}}
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    values["method"] = {"name": name} | values.get("method", {})
    return make_config(values)


def measured_peak(stage: Stage, config: Config) -> int:
    """Peak of the second real step, so that nothing of a first time is in it."""
    trainer = LocalTrainer(stage, config.train)
    images, labels = torch.randn(BATCH, *SHAPE), torch.randint(0, 5, (BATCH,))
    stage.begin_device(torch.arange(5))
    trainer.step(images, labels)
    return count_peak(lambda: trainer.step(images, labels), [*trainer.held_tensors(), images, labels])


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "resnet8") for name in OURS), *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)],
)
def test_measured_peak_is_the_predicted_one(name: str, model: str) -> None:
    norm = "group" if model == "resnet10" else "batch"
    config = config_of(name, model={"name": model, "norm": norm}, method={"widths": [1.0, 0.5, 0.25]})
    fitted = fit_method(config, SHAPE, 10, [None])
    costs = measure_costs(config, SHAPE, 10, fitted)
    network = METHODS[name].network(config.model, fitted)
    method = make_method(config, build_network(network, SHAPE, 10, 0), fitted)
    assert len(costs.levels) == method.num_stages == len(method.stage_names)
    for index, levels in enumerate(costs.levels):
        assert len(levels) == method.num_levels(index)
        memory = [level.memory_bytes for level in levels]
        assert memory == sorted(set(memory))
        whole = method.enter_stage(index, CPU)
        for level, cost in enumerate(levels):
            stage = method.enter_level(index, level, CPU) if method.counted else whole
            assert measured_peak(stage, config) == cost.memory_bytes
            assert cost.trained_elements == len(stage.flat)
        method.leave_stage(whole)


@pytest.mark.parametrize("name", ["heterofl", pytest.param("fedrolex", marks=pytest.mark.slow), "depthfl"])
def test_each_device_gets_the_largest_level_that_its_cap_holds(name: str) -> None:
    config = config_of(name)
    needed = [cost.memory_bytes for cost in measure_costs(config, SHAPE, 10).levels[0]]
    caps = [*needed, *(n - 1 for n in needed[1:]), *(n + 1 for n in needed)]
    fitted = fit_method(config, SHAPE, 10, caps)
    costs = measure_costs(config, SHAPE, 10, fitted)
    assert [cost.memory_bytes for cost in costs.levels[0]] == needed
    for cap in caps:
        level = costs.level_of(0, cap)
        assert needed[level] <= cap
        assert level == len(needed) - 1 or needed[level + 1] > cap
    assert costs.level_of(0, None) == len(needed) - 1


def test_shares_become_widths() -> None:
    assert level_widths([1.0, 0.5, 0.25, 0.125, 0.0625], 16) == [1, 2, 4, 8, 16]
    assert level_widths([1.0, 0.5, 0.25, 0.125, 0.0625], 8) == [1, 2, 4, 8]
    assert level_widths([0.1, 0.3], 30) == [3, 9]
    assert level_widths([0.3, 1.0], 4) == [2, 4]


def test_heterofl_is_as_wide_as_the_strongest_device_and_fedrolex_as_configured() -> None:
    config = config_of("heterofl", model={"width": 16})
    needed = [10, 20, 30, 40, 50]

    def fit(*caps: int | None) -> dict[str, Any]:
        return METHODS["heterofl"].fit(config, caps, lambda model: needed)

    for level, width in enumerate([1, 2, 4, 8, 16]):
        assert fit(10, needed[level]) == {"width": width}
        assert fit(needed[level] - 1) == {"width": max(1, width // 2)}
    assert fit(10, None) == {"width": 16}
    assert METHODS["heterofl"].network(config.model, {"width": 4}).width == 4
    rolex = config_of("fedrolex", model={"width": 16})
    assert fit_method(rolex, SHAPE, 10, [1000]) == {}
    assert METHODS["fedrolex"].network(rolex.model, {}).width == 16


def test_a_single_share_is_a_sub_model_and_not_the_whole_stage() -> None:
    config = config_of("fedrolex", method={"widths": [0.5]})
    costs = measure_costs(config, SHAPE, 10)
    assert len(costs.levels[0]) == 1
    assert costs.levels[0][0].memory_bytes < costs.full.memory_bytes


def test_depthfl_is_as_deep_as_the_strongest_device() -> None:
    config = config_of("depthfl")
    for caps, depth in (([10, 15], 1), ([20, 10], 2), ([29], 2), ([5, 30], 3), ([5], 1)):
        assert METHODS["depthfl"].fit(config, caps, lambda model: [10, 20, 30]) == {"depth": depth}
    assert METHODS["depthfl"].fit(config, [5, None], lambda model: [10, 20, 30]) == {}
    method = make_method(config, build_network(config.model, SHAPE, 10, 0), {"depth": 2})
    stage = method.enter_stage(0, CPU)
    deployed = method.deployed(0).eval()
    stage.eval()
    images = torch.randn(2, *SHAPE)
    assert torch.equal(deployed(images), stage(images))
    assert len(deployed.blocks) == method.num_levels(0) == 2  # type: ignore[arg-type]


def memory_of_width(config: Config, width: int) -> int:
    with fake_tensors():
        network = build_network(scaled(config.model, width), SHAPE, 10, 0)
        return step_memory(full_model_stage(network, CPU), config.train, SHAPE)


@pytest.mark.parametrize("model", ["resnet8", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_allsmall_takes_the_largest_width_that_fits(model: str) -> None:
    config = config_of("allsmall", model={"name": model, "width": 16})
    cap = MIB // 2
    width = fit_method(config, SHAPE, 10, [None, cap, 4 * cap])["width"]
    assert 1 < width < 15
    assert memory_of_width(config, width) <= cap < memory_of_width(config, width + 1)
    costs = measure_costs(config, SHAPE, 10, {"width": width})
    assert costs.stages[0].memory_bytes == memory_of_width(config, width)
    assert METHODS["allsmall"].network(config.model, {"width": width}) == replace(config.model, width=width)


def test_allsmall_searches_every_width() -> None:
    config = config_of("allsmall", model={"width": 16})

    def fit(*caps: int | None) -> int:
        found = METHODS["allsmall"].fit(config, caps, lambda model: [100 * model.width**2])
        width: int = found["width"]
        return width

    for width in range(1, 17):
        assert fit(None, 10**9, 100 * width**2) == width
        assert width == 1 or fit(100 * width**2 - 1) == width - 1
    assert fit(None, None) == fit(10**9) == 16


def test_allsmall_names_the_cap_that_would_do() -> None:
    config = config_of("allsmall")
    with pytest.raises(ConfigError) as caught:
        fit_method(config, SHAPE, 10, [1000, 10 * MIB])
    needed = memory_of_width(config, 1) / MIB
    assert_one_line(caught.value, "no width of resnet8 fits", f"width 1 needs {needed:.1f}"[:-1], "batch 8")
    told = float(str(caught.value).split("width 1 needs ")[1].split()[0])
    assert fit_method(config, SHAPE, 10, [int(told * MIB)])["width"] >= 1


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_a_vit_has_no_channels_to_scale(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_costs(config_of(name, model={"name": "vit"}), SHAPE, 10)
    assert_one_line(caught.value, f"method.name: {name}", "vit")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "allsmall"])
def test_an_own_network_is_scaled_by_its_option_width(name: str) -> None:
    factory = {"factory": "networks_of_mine:convolutions", "split": ["0", "3"]}
    predict = fit_method if name == "allsmall" else lambda *arguments: measure_costs(*arguments[:3])
    with pytest.raises(ConfigError) as caught:
        predict(config_of(name, model=factory), SHAPE, 10, [100_000])
    assert_one_line(caught.value, f"method.name: {name}", "model.options", "width")
    config = config_of(name, model={**factory, "options": {"width": 8}})
    fitted = fit_method(config, SHAPE, 10, [100_000])
    costs = measure_costs(config, SHAPE, 10, fitted)
    assert costs.levels[0][0].memory_bytes <= 100_000 < costs.full.memory_bytes
    network = METHODS[name].network(config.model, fitted)
    method = make_method(config, build_network(network, SHAPE, 10, 0), fitted)
    stage = method.enter_stage(0, CPU)
    assert isinstance(stage.active[0][0], nn.Conv2d)
    if name != "allsmall":
        part = method.enter_level(0, 0, CPU)
        assert part.active[0][0].out_channels == 1
        index = method.part_index(stage, part, 1, torch.arange(10))
        assert len(index) == len(index.unique()) == len(part.flat)


@pytest.mark.usefixtures("own")
def test_channels_that_cannot_be_chosen_are_refused() -> None:
    for name, network, words in (
        ("fedrolex", "flattened", "pool before it"),
        ("fedrolex", "grouped", "2 groups"),
        ("heterofl", "grouped", "2 groups"),
    ):
        model = {"factory": f"networks_of_mine:{network}", "split": ["0"], "options": {"width": 8}}
        with pytest.raises(ConfigError) as caught:
            measure_costs(config_of(name, model=model), SHAPE, 10)
        assert_one_line(caught.value, "method.name", name, words)
    # the first channels of a flattened image come first
    model = {"factory": "networks_of_mine:flattened", "split": ["0"], "options": {"width": 8}}
    config = config_of("heterofl", model=model, method={"widths": [1.0, 0.5]})
    method = make_method(config, build_network(config.model, SHAPE, 10, 0))
    stage, part = method.enter_stage(0, CPU), method.enter_level(0, 0, CPU)
    index = method.part_index(stage, part, 1, torch.arange(10))
    linear = next(slot for slot in stage.flat.slots if slot.shape == (10, 8 * 256))
    kept = index[(index >= linear.begin) & (index < linear.end)] - linear.begin
    assert kept.reshape(10, -1)[1].tolist() == [2048 + i for i in range(1024)]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["depthfl", "fedepth", "progfed", "progfed_layerwise"])
def test_blocks_of_an_own_network_must_be_given(name: str) -> None:
    config = config_of(name, model={"factory": "networks_of_mine:convolutions"})
    with pytest.raises(ConfigError) as caught:
        measure_costs(config, SHAPE, 10)
    assert_one_line(caught.value, "model.split is needed")
