"""A new block starts as its surrogate: logits go on, own networks fit as far as their shapes do, the rest is named."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import MethodConfig
from fedfreeze.methods import make_method
from fedfreeze.methods.smartfreeze import SmartFreeze
from fedfreeze.network.blocks import BlockedNetwork, build_network, outline_of
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.pieces import UnfitError
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.network.start import rectified_moments, start_from

CPU = torch.device("cpu")
# smooth, as photographs are
IMAGES = functional.interpolate(
    torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(3)), size=(16, 16), mode="bicubic"
)
LABELS = torch.arange(64) % 10


def method_of(**sections: dict[str, object]) -> SmartFreeze:
    config = make_config({"model": {"width": 8}, **sections})
    made = make_method(config, build_network(config.model, (3, 16, 16), 10, seed=0))
    assert isinstance(made, SmartFreeze)
    return made


def trained(stage: Stage, steps: int = 12) -> None:
    trainer = LocalTrainer(stage, make_config({}).train)
    trainer.begin(stage.flat.values().clone(), 0.02)
    for step in range(steps):
        rows = torch.arange(step * 16, step * 16 + 16) % len(IMAGES)
        trainer.step(IMAGES[rows], LABELS[rows])


def logits(stage: Stage, mode: bool) -> torch.Tensor:
    """In training mode by the statistics of these images; running ones are put back."""
    before = copy.deepcopy(stage.state_dict())
    stage.train(mode)
    with torch.no_grad():
        out = stage(IMAGES)
    stage.load_state_dict(before)
    return out


def jumps(method: SmartFreeze, mode: bool = False) -> list[tuple[float, float]]:
    """Largest and mean change of the logits at each stage change, in units of their mean distance from the mean."""
    found = []
    for index in range(method.num_stages - 1):
        stage = method.enter_stage(index, CPU)
        trained(stage)
        before = logits(stage, mode)
        method.leave_stage(stage)
        method.begin_stage(index + 1)
        stage = method.enter_stage(index + 1, CPU)
        apart = (logits(stage, mode) - before).abs()
        spread = (before - before.mean(0)).abs().mean()
        found.append((float(apart.max() / spread), float(apart.mean() / spread)))
        method.leave_stage(stage)
    return found


# model, normalisation -> the bounds of the mean change with nothing of the first weights kept, and with 0.3
BOUNDS = {
    ("resnet10", "batch"): (1e-5, 0.7),
    ("resnet18", "batch"): (1e-5, 0.4),
    ("resnet10", "group"): (0.2, 0.25),  # its statistics are each image's own
    ("vit", "batch"): (1e-5, 0.4),
}


@pytest.mark.parametrize(("name", "norm"), BOUNDS)
@pytest.mark.parametrize("window", [1, 2])
def test_logits_go_on_at_a_stage_change(name: str, norm: str, window: int) -> None:
    model = {"name": name, "norm": norm, "width": 16 if name == "vit" else 8}

    def mean_jump(start: str, kept: float) -> float:
        method = {"start": start, "start_kept": kept, "window": window}
        return max(mean for _, mean in jumps(method_of(model=model, method=method)))

    exact, near = BOUNDS[name, norm]
    assert mean_jump("surrogate", 0.0) < exact
    assert mean_jump("surrogate", 0.3) < near
    assert mean_jump("anew", 0.3) > 1.5


def mean_jumps_in_training(**model: object) -> dict[str, list[float]]:
    return {
        start: [mean for _, mean in jumps(method_of(model=model, method={"start": start}), mode=True)]
        for start in ("surrogate", "anew")
    }


def test_with_batch_statistics_too() -> None:
    """As devices train: the second normalisation's guess of its statistics is replaced by those of the batch."""
    mean = mean_jumps_in_training(name="resnet10")
    assert max(mean["surrogate"]) < 0.6 < 1 < min(mean["anew"])


@pytest.mark.parametrize("name", ["vgg11", "vgg16"])
def test_pooling_blocks_only_come_near(name: str) -> None:
    """Of two pixels a surrogate takes the first, the block the larger; it is the last one that does not pool."""
    mean = mean_jumps_in_training(name=name)
    assert all(ours < 0.8 * anew for ours, anew in zip(mean["surrogate"], mean["anew"], strict=True))
    assert mean["surrogate"][-1] < 0.3


def test_a_whole_surrogate_is_copied() -> None:
    """A residual block that imitates a layer of one residual block, an encoder layer that imitates encoder layers."""
    for model in ({"name": "resnet10"}, {"name": "resnet18"}, {"name": "vit", "width": 16}):
        method = method_of(model={"width": 8, **model}, method={"start": "surrogate", "output_module": "block"})
        assert not method.notices()
        assert max(largest for largest, _ in jumps(method)) < 1e-4


def test_without_surrogates_all_start_anew_with_one_notice() -> None:
    method = method_of(method={"start": "surrogate", "output_module": "pool"})
    assert method.notices() == [
        "method.start: with method.output_module=pool nothing imitates a block, so all start anew"
    ]
    before = copy.deepcopy(method.blocked.network.state_dict())
    method.begin_stage(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.blocked.network.state_dict().items())


@given(st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_rectified_moments_are_those_of_samples(weight: float, bias: float) -> None:
    z = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    density /= density.sum()
    values = (weight * z + bias).relu()
    expected = float((values * density).sum())
    mean, variance = rectified_moments(torch.tensor(weight), torch.tensor(bias))
    assert float(mean) == pytest.approx(expected, abs=1e-3)
    assert float(variance) == pytest.approx(float(((values - expected) ** 2 * density).sum()), abs=2e-3)


# Networks of a user's own: stem, then the block that is tried, then pooling and a linear layer.
class Own(nn.Module):
    def __init__(self, block: nn.Module, channels: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block
        self.activation = activation
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        x = self.activation(self.block(x))
        return self.fc(x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x)


class Basic(nn.Module):
    """A residual block with the names that most people give its parts."""

    def __init__(self, before: int, after: int, stride: int, *, first_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(before if first_norm else after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.first_norm = first_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.first_norm:
            return self.bn2(self.conv2(functional.relu(self.conv1(functional.relu(self.bn1(x)))))) + shortcut
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class Around(nn.Module):
    """A shortcut in the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.a(x))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layer1, self.layer2 = (transformer(norm_first=True) for _ in range(2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.layer2(self.layer1(x)).mean(1))


def transformer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )


def conv(before: int, after: int, stride: int = 1, size: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, **more)  # type: ignore[arg-type]


def bn(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def cut(network: nn.Module, at: tuple[str, ...]) -> BlockedNetwork:
    return outline_of(network, (3, 16, 16), 10).cut(at)


def own(block: nn.Module, channels: int = 16, activation: Callable[..., torch.Tensor] = functional.relu) -> nn.Module:
    torch.manual_seed(0)
    return Own(block, channels, activation)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def tried(network: nn.Module, at: tuple[str, ...], kept: float = 0.0) -> float:
    """Start the second block from its surrogate; return the mean difference of the two, in units of the spread."""
    blocked = cut(network, at)
    surrogate = OutputModules(blocked, MethodConfig(), "batch", 0).surrogates[0]
    x = torch.randn(32, *blocked.shapes[0], generator=torch.Generator().manual_seed(1))
    x = x.relu() if x.dim() == 4 else x
    surrogate.train()
    for _ in range(30):  # statistics of its own
        surrogate(x)
    start_from(blocked.blocks[1], surrogate, blocked.shapes[0], kept)
    surrogate.eval()
    blocked.blocks[1].eval()
    with torch.no_grad():
        wanted = surrogate(x)
        return float((blocked.blocks[1](x.clone()) - wanted).abs().mean() / (wanted - wanted.mean()).abs().mean())


SPLIT = ("stem", "block")
FITTING: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "a convolution and its normalisation, the activation in the forward": (
        lambda: own(nn.Sequential(conv(8, 16), bn(16))),
        1e-5,
    ),
    "two more layers": (
        lambda: own(nn.Sequential(conv(8, 16, 2), bn(16), nn.ReLU(), conv(16, 16), bn(16), nn.ReLU(), conv(16, 16))),
        1e-5,
    ),
    "a larger kernel": (lambda: own(nn.Sequential(conv(8, 16, size=5), bn(16))), 1e-5),
    "no normalisation": (lambda: own(conv(8, 16, 2)), 1e-5),
    "padding 'same'": (lambda: own(nn.Sequential(nn.Conv2d(8, 16, 3, padding="same"), bn(16))), 1e-5),
    "dropout": (lambda: own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), nn.Dropout(0.3)), activation=same), 1e-5),
    "GELU": (lambda: own(nn.Sequential(conv(8, 16), bn(16)), activation=functional.gelu), 0.3),
    "SiLU": (lambda: own(nn.Sequential(conv(8, 16), bn(16)), activation=functional.silu), 0.5),
    "pooling behind": (lambda: own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), nn.AvgPool2d(2))), 2.0),
    "residual blocks of the user's own": (
        lambda: own(nn.Sequential(Basic(8, 16, 2), Basic(16, 16, 1)), activation=same),
        1e-5,
    ),
    "pixels into a linear layer": (lambda: own(nn.Sequential(nn.Flatten(), nn.Linear(8 * 256, 16))), 1e-5),
    "pooled pixels into a linear layer": (
        lambda: own(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 16))),
        1e-4,
    ),
    "the mean of the pixels into a linear layer": (
        lambda: own(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16))),
        1e-5,
    ),
}


@pytest.mark.parametrize("case", FITTING)
def test_blocks_of_a_users_own(case: str) -> None:
    make, bound = FITTING[case]
    torch.manual_seed(0)
    at = SPLIT if not isinstance(make().block, nn.Sequential) else ("stem", first_weights(make()))
    assert tried(make(), at) < bound
    assert tried(make(), at, kept=0.3) < max(0.7, bound)


def first_weights(network: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if name.startswith("block.") and has_own(module))


def has_own(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear | Basic)


def test_what_cannot_be_copied_is_looked_at_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    network = own(Locked(conv(8, 16), bn(16)))
    blocked = cut(network, SPLIT)
    method = SmartFreeze(make_config({"method": {"start": "surrogate"}}), blocked)
    before = copy.deepcopy(network.block[0].state_dict())  # type: ignore[index]
    reason = "its first values cannot be a surrogate's: Locked"
    assert method.notices() == [f"method.start: block block starts anew, not from the surrogate: {reason}"]
    after = network.block[0].state_dict()  # type: ignore[index]
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_encoder_layers_of_torch() -> None:
    torch.manual_seed(0)
    assert tried(Patches(), ("embed", "layer1")) < 1e-5


def frozen(network: nn.Module) -> nn.Module:
    network.block[0].weight.requires_grad_(False)  # type: ignore[index]
    return network


def twice() -> nn.Module:
    layer = conv(8, 8)
    return own(nn.Sequential(layer, nn.ReLU(), layer), 8)


def tied() -> nn.Module:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    named = {"stem": conv(3, 8), "r": nn.ReLU(), "block": first, "s": nn.ReLU(), "second": second, "t": nn.ReLU()}
    return nn.Sequential(OrderedDict(named, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))


class Last(Patches):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = (transformer(norm_first=False) for _ in range(2))


class Standardised(nn.Conv2d):
    """A layer that calculates with other weights than it holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


class Demanding(nn.Module):
    """Takes only what a ReLU puts out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert bool((x >= 0).all()), "takes what a ReLU puts out"
        return x


class Locked(nn.Sequential):
    """Cannot be copied."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return super().forward(x)


def parametrized() -> nn.Module:
    network = own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), conv(16, 16), bn(16)))
    nn.utils.parametrizations.weight_norm(network.block[3])  # type: ignore[index]
    return network


def old_weight_norm() -> nn.Module:
    network = own(nn.Sequential(conv(8, 16), bn(16)))
    nn.utils.weight_norm(network.block[0])  # type: ignore[index]
    return network


def hooked() -> nn.Module:
    network = own(nn.Sequential(conv(8, 16), bn(16)))
    network.block[1].register_forward_hook(lambda module, given, out: -2 * out)  # type: ignore[index]
    return network


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a bottleneck": (lambda: own(Bottleneck(), activation=same), "surrogate's: Bottleneck"),
    "a shortcut that hands on": (lambda: own(Basic(8, 8, 1), 8, same), "its shortcut cannot be silenced"),
    "normalisation first": (lambda: own(Basic(8, 8, 2, first_norm=True), 8, activation=same), "its parts' names tell"),
    "another activation": (lambda: own(nn.Sequential(conv(8, 16), bn(16)), activation=torch.tanh), "no ReLU"),
    "no activation": (lambda: own(nn.Sequential(conv(8, 16), bn(16)), activation=same), "has an activation, the other"),
    "a smaller kernel": (lambda: own(nn.Sequential(conv(8, 16, size=1), bn(16))), "smaller than its surrogate's"),
    "no padding": (lambda: own(nn.Sequential(nn.Conv2d(8, 16, 3), bn(16))), "so its surrogate pools"),
    "a dilated kernel": (
        lambda: own(nn.Sequential(nn.Conv2d(8, 16, 3, padding=2, dilation=2), bn(16))),
        "not centred",
    ),
    "groups": (lambda: own(nn.Sequential(conv(8, 16, groups=2), bn(16))), "has weights of"),
    "channels that change twice": (
        lambda: own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), conv(16, 32), bn(32)), 32),
        "its first layer has weights of (16, 8, 3, 3), its surrogate (32, 8, 3, 3)",
    ),
    "a later stride": (
        lambda: own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), conv(16, 16, 2), bn(16))),
        "a later layer cannot hand on",
    ),
    "group normalisation": (
        lambda: own(nn.Sequential(conv(8, 16), nn.GroupNorm(4, 16))),
        "of another kind than its surrogate's (model.norm)",
    ),
    "normalisation without weights": (
        lambda: own(nn.Sequential(conv(8, 16), nn.BatchNorm2d(16, affine=False))),
        "a BatchNorm2d has no weights",
    ),
    "no bias to fold into": (lambda: own(conv(8, 16, bias=False)), "or no bias"),
    "pooling first": (lambda: own(nn.Sequential(nn.MaxPool2d(2), conv(8, 16), bn(16))), "begins with pooling"),
    "a shortcut in the forward": (lambda: own(Around(), 8, same), "surrogate's: Around"),
    "weights that the user froze": (lambda: frozen(own(nn.Sequential(conv(8, 16), bn(16)))), "do not train"),
    "a layer that runs twice": (twice, "several modules that cannot be parted"),
    "tied layers": (tied, "share their weights"),
    "weights that are calculated anew": (parametrized, "surrogate's: ParametrizedConv2d"),
    "weights that are calculated, as it was once done": (old_weight_norm, "calculated from others"),
    "a subclass of a layer": (
        lambda: own(nn.Sequential(Standardised(8, 16, 3, padding=1), bn(16))),
        "surrogate's: Standardised",
    ),
    "a hook that changes what comes out": (hooked, "its parts' names tell"),
    "a module that does not take random values": (
        lambda: own(nn.Sequential(conv(8, 16), bn(16), nn.ReLU(), Demanding()), activation=same),
        "takes what a ReLU puts out",
    ),
    "encoder layers that normalise last": (Last, "normalises last"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named_and_left_alone(case: str) -> None:
    make, says = UNFIT[case]
    network = make()
    before = copy.deepcopy(network.state_dict())
    at: tuple[str, ...] = ("embed", "layer1") if isinstance(network, Patches) else SPLIT
    if isinstance(network, Own):
        at = ("stem", first_weights(network)) if isinstance(network.block, nn.Sequential) else SPLIT
        at = ("stem", "block") if case == "pooling first" else at
    with pytest.raises(UnfitError) as raised:
        tried(network, at)
    assert says in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
