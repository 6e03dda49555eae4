"""Weights that lie channels last: the same values, views of one buffer in that order, and who cannot be run so."""

import itertools

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import BlockedNetwork, build_network
from fedfreeze.network.flat import FlatPart
from fedfreeze.network.memory import gains, is_channels_last, lay_channels_last, spoils, takes_channels_last
from fedfreeze.network.stage import LocalTrainer
from tests.support.checks import assert_one_line

CPU = torch.device("cpu")
FORMATS = ("channels_last", "contiguous")


class Viewed(nn.Module):
    """A forward that calls view on what a convolution puts out."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: object = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(x.view(x.size(0), -1))


def configured(memory_format: str, **model: object) -> Config:
    return make_config({"model": {"width": 16, "memory_format": memory_format, **model}})


def built(memory_format: str, **model: object) -> BlockedNetwork:
    return build_network(configured(memory_format, **model).model, (3, 8, 8), 10, 0)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_a_stage_trains_the_same_but_for_rounding(name: str, norm: str) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for memory_format in FORMATS:
        config = configured(memory_format, name=name, norm=norm)
        method = make_method(config, built(memory_format, name=name, norm=norm))
        for index in range(method.num_stages):
            method.begin_stage(index)
            stage = method.enter_stage(index, CPU)
            laid = [is_channels_last(p) for p in stage.parameters() if p.dim() == 4 and p.shape[2] > 1 < p.shape[1]]
            assert set(laid) == {memory_format == "channels_last"}
            trainer = LocalTrainer(stage, config.train)
            trainer.begin(stage.flat.values().clone(), 0.01)
            for _ in range(2):
                trainer.step(images, torch.arange(8) % 10)
            method.leave_stage(stage)
        found[memory_format] = method.state_dict()
    for key, tensor in found["contiguous"].items():
        torch.testing.assert_close(found["channels_last"][key], tensor, rtol=1e-3, atol=1e-4)


def test_slots_are_views_in_the_order_of_memory() -> None:
    active = nn.Sequential(nn.Conv2d(3, 4, (3, 2)), nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in active.state_dict().items()}
    lay_channels_last(active)
    flat = FlatPart(active, nn.Linear(2, 2), CPU)
    slot = flat.slots[0]
    assert slot.channels_last
    for name, tensor in active.state_dict().items():
        assert torch.equal(tensor, before[name])
    numbers = torch.arange(len(flat), dtype=torch.float32)
    flat.load(numbers)
    weight = active[0].weight.detach()
    for place in itertools.product(*map(range, weight.shape)):
        assert int(weight[place]) == slot.begin + sum(a * b for a, b in zip(place, slot.strides, strict=True))
    assert torch.equal(slot.flattened(weight), numbers[slot.begin : slot.end])
    assert torch.equal(slot.view_of(numbers), weight)
    flat.release()
    assert is_channels_last(active[0].weight)


def test_the_values_that_a_network_begins_with_do_not_depend_on_it() -> None:
    one, other = (built(memory_format).network.state_dict() for memory_format in FORMATS)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_auto_takes_it_where_there_are_convolutions_enough() -> None:
    assert built("auto").channels_last
    assert not built("auto", name="vit", width=16).channels_last
    assert not gains(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)))


class ViewedInEvaluation(Viewed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(x.flatten(1) if self.training else x.view(x.size(0), -1))


class Contiguous(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).contiguous()


class ViewedInHead(Viewed):
    """The last block puts out maps that can be viewed; what stands in for it does not."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: object = None) -> None:
        super().__init__(num_classes, in_channels)
        self.last = Contiguous(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.conv2(self.conv1(x).relu()).relu())
        return self.fc(x.view(x.size(0), -1))


class GroupFirst(Viewed):
    """Group normalisation of what a frozen block puts out; channels last, torch would end the process."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: object = None) -> None:
        super().__init__(num_classes, in_channels)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()
        return self.fc(x.flatten(1))


class GroupFunction(Viewed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(nn.functional.group_norm(self.conv1(x), 2).relu()).relu()
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("network", ["GroupFirst", "GroupFunction", "Viewed", "ViewedInEvaluation", "ViewedInHead"])
def test_networks_that_cannot_be_run_so_train_and_are_judged(network: str) -> None:
    own = {"factory": f"{__name__}:{network}", "split": ["conv1", "norm" if network == "GroupFirst" else "conv2"]}
    blocked = built("auto", **own)
    assert not blocked.channels_last
    method = make_method(configured("auto", **own), blocked)
    for index in range(method.num_stages):
        stage = method.enter_stage(index, CPU)
        LocalTrainer(stage, configured("auto").train).step(torch.rand(4, 3, 8, 8), torch.arange(4))
        stage.eval()
        stage(torch.rand(2, 3, 8, 8))
        method.leave_stage(stage)


def test_a_forward_that_calls_view_stays_as_it_is() -> None:
    own = {"factory": f"{__name__}:Viewed", "split": ["conv1", "conv2"]}
    network = Viewed()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert not takes_channels_last(network, (3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(p.is_contiguous() and p.grad is None for p in network.parameters())
    blocked = built("auto", **own)
    assert not blocked.channels_last
    assert all(p.is_contiguous() for p in blocked.network.parameters())
    with pytest.raises(ConfigError) as raised:
        built("channels_last", **own)
    assert_one_line(raised.value, "model.memory_format", "view", "use contiguous")


class Strided(Viewed):
    """A shortcut of few channels, as a function."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: object = None, width: int = 4) -> None:
        super().__init__(num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, width, 1, 1))
        self.fc = nn.Linear(4 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(nn.functional.conv2d(x, self.weight, stride=2).flatten(1))


@pytest.mark.parametrize(
    ("layer", "spoilt"),
    [
        (nn.Conv2d(4, 8, 1, 2), True),
        (nn.Conv2d(15, 32, 1, (1, 2)), True),
        (nn.Conv2d(32, 32, 1, 2, groups=4), True),
        (nn.Conv2d(16, 32, 1, 2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, 2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_convolutions_with_which_torch_spoils_memory_are_known(layer: nn.Module, spoilt: bool) -> None:
    assert spoils(nn.Sequential(nn.ReLU(), layer)) == spoilt


def test_networks_with_such_convolutions_stay_contiguous() -> None:
    assert not built("auto", width=8).channels_last
    assert built("auto", name="vgg11", width=8).channels_last  # it has none
    with pytest.raises(ConfigError) as raised:
        built("channels_last", width=8)
    assert_one_line(raised.value, "model.memory_format", "fewer than 16 channels", "use contiguous")
    assert not takes_channels_last(Strided(), (3, 8, 8))
    assert takes_channels_last(Strided(width=16), (3, 8, 8))


def test_output_modules_with_such_convolutions_have_the_network_contiguous() -> None:
    config = make_config({"model": {"name": "vgg11", "width": 8}, "method": {"output_module": "block"}})
    blocked = build_network(config.model, (3, 32, 32), 10, 0)
    assert blocked.channels_last
    stage = make_method(config, blocked).enter_stage(0, CPU)
    assert not any(is_channels_last(parameter) for parameter in stage.parameters())
    assert spoils(stage)


def test_a_narrow_sub_model_may_lie_otherwise_than_the_whole() -> None:
    config = make_config({"method": {"name": "heterofl"}, "model": {"width": 16}})
    method = make_method(config, build_network(config.model, (3, 8, 8), 10, 0))
    stage, part = method.enter_stage(0, CPU), method.enter_level(0, 0, CPU)
    wide = {slot.path: slot for slot in stage.flat.slots}
    assert any(slot.channels_last for slot in stage.flat.slots)
    assert not any(slot.channels_last for slot in part.flat.slots)
    values = stage.flat.values()
    taken = values[method.part_index(stage, part, 1, torch.arange(10))]
    for slot in part.flat.slots:
        whole = wide[slot.path].view_of(values)
        assert torch.equal(slot.view_of(taken), whole[tuple(slice(size) for size in slot.shape)]), slot.path
