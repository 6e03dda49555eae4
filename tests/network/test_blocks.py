"""Cutting: where blocks begin, what the head is, and every split that cannot be."""

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import MethodConfig
from fedfreeze.errors import ConfigError
from fedfreeze.network.blocks import BlockedNetwork, build_network, outline_of
from fedfreeze.network.models import MODELS
from fedfreeze.network.output_modules import OutputModules
from tests.support.checks import assert_one_line
from tests.support.networks import Functional, Reused, Shortcut

USUAL_NAMES = {
    "resnet8": ("conv1..layer1", "layer2", "layer3"),
    "resnet18": ("conv1..layer1", "layer2", "layer3", "layer4"),
    "vgg11": ("group1", "group2", "group3", "group4", "group5"),
    "vgg16": ("group1", "group2", "group3", "group4", "group5"),
    "vit": ("embed..layer2", "layer3..layer4", "layer5..layer6", "layer7..layer8"),
}


def build(name: str, shape: tuple[int, int, int] = (3, 16, 16), **model: object) -> BlockedNetwork:
    config = make_config({"model": {"name": name, "width": 8, **model}})
    return build_network(config.model, shape, 10, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 17, 11)], ids=str)
def test_blocks_and_head_one_after_the_other_are_the_network(name: str, shape: tuple[int, int, int]) -> None:
    cut = build(name, shape)
    cut.network.eval()
    images = torch.randn(3, *shape)
    x = images
    for block, size in zip(cut.blocks, cut.shapes, strict=True):
        x = block(x)
        assert x.shape[1:] == size
    assert torch.equal(cut.head(x), cut.network(images))
    assert cut.head(x).shape == (3, 10)


@pytest.mark.parametrize(("name", "names"), USUAL_NAMES.items())
def test_usual_cuts(name: str, names: tuple[str, ...]) -> None:
    assert build(name).names == names


@pytest.mark.parametrize("kind", ["conv_norm", "conv", "block", "pool"])
@pytest.mark.parametrize("name", ["vgg11", "vit"])
def test_every_output_module_gives_logits(name: str, kind: str) -> None:
    cut = build(name)
    modules = OutputModules(cut, MethodConfig(output_module=kind), "batch", 0)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16, 16)
    for stage, block in enumerate(cut.blocks):
        x = block(x)
        assert modules.behind(stage)(x).shape == (2, 10)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, 8, 8), (5, 3, 2)),
        ((3, 7, 9), (3, 7, 9)),
        ((2, 4, 4), (3, 8, 8)),
        ((4, 8, 8), (16, 6)),
        ((4, 8, 8), (64, 6)),
        ((4, 8, 8), (7,)),
        ((16, 6), (4, 8)),
        ((16, 6), (5,)),
        ((7,), (5,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["conv_norm", "conv", "block"])
def test_a_surrogate_has_the_shapes_of_the_block_it_imitates(
    before: tuple[int, ...], after: tuple[int, ...], kind: str
) -> None:
    from fedfreeze.network.output_modules import _surrogate

    surrogate = _surrogate(kind, before, after, "batch")
    assert surrogate(torch.randn(2, *before)).shape == (2, *after)
    assert any(parameter.requires_grad for parameter in surrogate.parameters())


def test_no_surrogate_turns_tokens_into_pixels() -> None:
    from fedfreeze.network.output_modules import _surrogate

    with pytest.raises(ConfigError) as caught:
        _surrogate("conv", (16, 6), (6, 4, 4), "batch")
    assert_one_line(caught.value, "(16, 6)", "method.output_module=pool")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (["layer1", "layer3"], ("conv1..norm1", "layer1..layer2", "layer3..layer4")),
        (["layer3", "layer1"], ("conv1..norm1", "layer1..layer2", "layer3..layer4")),
        (["conv1", "layer1.1", "layer2"], ("conv1..layer1.0", "layer1.1", "layer2..layer4")),
        (["conv1"], ("conv1..layer4",)),
    ],
)
def test_a_split_of_the_users_own(split: list[str], names: tuple[str, ...]) -> None:
    assert build("resnet18", split=split).names == names


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (["layer9"], ["the network has no module 'layer9'", "conv1, layer1, layer1.1, layer2", "layer4.1"]),
        (["layer1.0.conv2"], ["no block can begin at 'layer1.0.conv2'", "layer1.1"]),
        (["fc"], ["no block can begin at 'fc'"]),
        (["pool"], ["no block can begin at 'pool'"]),
        (["layer2", "layer2.0"], ["'layer2.0' and 'layer2' begin at the same place"]),
        (["relu1", "layer1"], ["'relu1' has nothing to train", "layer1.1"]),
        ([""], ["no block can begin at ''"]),
    ],
    ids=lambda value: str(value[0]),
)
def test_a_split_that_cannot_be_lists_the_names_that_can(split: list[str], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("resnet18", split=split)
    assert_one_line(caught.value, "model.split", *says)


@pytest.mark.parametrize(
    ("network", "places"),
    [(Functional(), ("conv1", "layer")), (Shortcut(), ("stem", "inner1", "last")), (Reused(), ("a", "c"))],
    ids=lambda value: type(value).__name__,
)
def test_places_of_networks_with_a_forward_of_their_own(network: nn.Module, places: tuple[str, ...]) -> None:
    cut = outline_of(network, (3, 8, 8), 5).cut(places)
    assert cut.places == places
    assert len(cut.blocks) == len(places)
    assert sum(p.numel() for part in (*cut.blocks, cut.head) for p in part.parameters()) == sum(
        p.numel() for p in network.parameters()
    )


def test_pooling_flattening_and_the_last_norm_belong_to_the_head() -> None:
    assert [type(module).__name__ for module in build("vit").head] == ["LayerNorm", "TokenMean", "Linear"]
    assert [type(module).__name__ for module in build("vgg11").head] == ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    cut = outline_of(Functional(), (3, 8, 8), 5).cut(["layer"])
    assert len(cut.head) == 3
    assert next(iter(cut.head.parameters())).shape == (5, 4)


def test_weights_shared_between_blocks_are_refused() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ConfigError) as caught:
        outline_of(network, (3, 8, 8), 4).cut(["2"])
    assert_one_line(caught.value, "weight of 2 is also in 0")
    assert len(outline_of(network, (3, 8, 8), 4).cut([]).blocks) == 1


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), "to 2x7, not to 2x4"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), "fails on images of 3x8x8"),
        (nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), "no classifier, a torch.nn.Linear with 4 outputs"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "before its classifier the network has nothing to train"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(3, 4)), "0 fails on images"),
        (nn.Sequential(), "not to 2x4"),
    ],
    ids=range(6),
)
def test_a_network_whose_shape_does_not_fit_is_one_line(network: nn.Module, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        outline_of(network, (3, 8, 8), 4).cut([])
    assert_one_line(caught.value, says)
