"""What is trained is what the user's forward says: each network, cut, against itself trained by plain PyTorch."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedfreeze.errors import ConfigError
from fedfreeze.network.blocks import outline_of
from fedfreeze.network.stage import Stage, WholeStage
from fedfreeze.network.state import copied
from tests.support.checks import assert_one_line

SHAPE, CLASSES = (1, 8, 8), 3
CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions, the mean over pixels and a classifier; each class below changes one thing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)
        self.more()

    def more(self) -> None:
        """Add what the class has besides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pooled(self.second(self.first(x))))

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.conv1(x))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.conv2(x))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class StatementInPlace(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        h.clamp_(-0.5, 0.5)
        return functional.relu(h)


class AssignedInPlace(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.relu(self.conv1(x))
        h = h * 1.0
        h[:, :2] = 0
        h += 0.1
        return h.add_(0.5)


class ThroughView(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sigmoid(self.conv1(x)) * 2
        half = h[:, 4:]
        half.mul_(0.5)
        return h


class KeptInEval(Net):
    def more(self) -> None:
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(16)
        nn.init.constant_(self.bn1.running_mean, 0.25)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn1.eval()
        return self

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn1(self.conv1(x)))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn2(self.conv2(x)))


class Tied(Net):
    def more(self) -> None:
        self.features = nn.Sequential(self.conv1, nn.ReLU(), self.conv2, nn.ReLU())

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)


class TiedWithinABlock(Net):
    def more(self) -> None:
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv4 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv4.weight = self.conv3.weight

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv4(functional.relu(self.conv3(self.conv2(x))))


class Viewed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.size(0)
        x = self.second(self.first(x))
        return self.fc(x.view(n, 16, -1).sum(2) / x.shape[-1] ** 2)


class FoldedIntoBatch(Net):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(n * h, w, c)
        x = x.view(n, h, w, c).permute(0, 3, 1, 2)
        return functional.relu(self.conv2(x * (1.0 / n) + n))


class Greatest(Net):
    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).max(-1)[0] + x.flatten(2).topk(2).values.sum(-1)


class Recurrent(Net):
    def more(self) -> None:
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens)
        _, (hidden, _) = self.lstm(attended)
        return hidden[-1]


class Defaults(Net):
    def forward(self, x: torch.Tensor, return_features: bool = False, *, scale: float = 1.0) -> torch.Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(0)
        assert x.shape[1:] == SHAPE
        x = self.second(self.first(x))
        if return_features:
            return x
        return self.fc(self.pooled(x) * scale)


class Scaled(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return super().first((x * 255.0 - 128) / 64)


class Dropped(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().first(x), 0.3, self.training)


class NoisyInTraining(Net):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return super().second(x)


class PartlyFrozen(Net):
    def more(self) -> None:
        self.conv1.weight.requires_grad_(False)
        self.fc.bias.requires_grad_(False)


class WithoutGradients(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.conv1(x)
        return functional.relu(x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -0.5 * gradient


class OwnGradient(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return Reverse.apply(super().first(x))


class OwnStatistics(Net):
    """Root-level buffers: one written in place, one of doubles; a module that assigns its own."""

    def more(self) -> None:
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.centre = Centre()

    def first(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean((0, 2, 3)).view(-1, 1, 1))
        return functional.relu(self.centre(h - self.mean))


class Centre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8, 1, 1))
        self.register_buffer("total", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = 0.5 * self.seen + 0.5 * x.detach().mean((0, 2, 3)).view(-1, 1, 1)
            self.total += x.detach().double().sum()
        return x - self.seen


class Recomputed(Net):
    def first(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().first, x, use_reentrant=False)

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().second, x, use_reentrant=True)


class MadeHere(Net):
    def second(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1) / len(x)
        return nn.ReLU()(self.conv2(x + grid))


class Hooked(Net):
    def more(self) -> None:
        self.conv1.register_forward_hook(lambda module, args, out: out * 2)
        self.register_forward_hook(lambda module, args, out: out / 2)


class Features(nn.Module):
    """The two convolutions, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        n = x.size(0)
        h = functional.dropout(self.bn1(self.conv1(x * 2 * gain)), 0.3, self.training)
        h.clamp_(-0.5, 2)
        return functional.relu(self.conv2(h)).view(n, 16, -1)


class Wrapped(Net):
    def more(self) -> None:
        del self.conv1, self.conv2
        self.backbone = Features()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x - 0.5).mean(2))


class WrappedInEval(Wrapped):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.backbone.eval()
        return self


class WrappedTwice(nn.Module):
    """Classifier and all."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.DataParallel(Wrapped())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class InSequence(nn.Sequential):
    """A plain Sequential of modules of the user's own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            OrderedDict(backbone=Features(), pool=nn.AdaptiveAvgPool1d(1), flat=nn.Flatten(), fc=nn.Linear(16, CLASSES))
        )


class Pair(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)


class Residual(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.two(functional.relu(self.one(x))))


class Branching(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(functional.relu(self.one(x))) if x.sum() > -1 else -x


class KeptWhole(Net):
    """Modules of the user's own in which no block can begin: a shortcut spans one, the other branches on values."""

    def more(self) -> None:
        self.residual = Residual(8)
        self.branching = Branching(16)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(super().first(x))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return self.branching(super().second(x))


def step(network: nn.Module, parameters: list[nn.Parameter], number: int) -> None:
    """Take one step of plain SGD."""
    torch.manual_seed(number)
    images, labels = torch.rand(6, *SHAPE), torch.arange(6) % CLASSES
    torch.manual_seed(100 + number)
    functional.cross_entropy(network(images), labels).backward()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


NETWORKS: list[tuple[type[nn.Module], list[str]]] = [
    *((kind, ["conv1", "conv2"]) for kind in Net.__subclasses__() if kind not in (Tied, FoldedIntoBatch, Wrapped)),
    (FoldedIntoBatch, ["conv1"]),
    (Wrapped, ["backbone.conv1", "backbone.conv2"]),
    (WrappedInEval, ["backbone", "backbone.conv2"]),
    (WrappedTwice, ["model", "model.module.backbone.conv2"]),
    (InSequence, ["backbone", "backbone.conv2"]),
    (KeptWhole, ["conv1", "residual", "conv2", "branching"]),
    (Tied, ["conv1", "conv2"]),
    (Tied, ["features.0", "features.2"]),
]


@pytest.mark.parametrize(
    ("kind", "split"), NETWORKS, ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value)
)
def test_a_cut_network_trains_as_plain_pytorch_does(kind: type[nn.Module], split: list[str]) -> None:
    plain, cut = kind(), kind()
    before = tensors(cut)
    outline = outline_of(cut, SHAPE, CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in tensors(cut).items())
    blocked = outline.cut(split)
    assert len(blocked.blocks) == len(split)
    stage = Stage(0, [], nn.Sequential(*blocked.blocks), blocked.head, CPU)
    plain.train()
    for number in range(3):
        step(plain, [p for p in plain.parameters() if p.requires_grad], number)
        step(stage, [p for p in stage.parameters() if p.requires_grad], number)
    stage.leave()
    after = tensors(cut)
    for name, value in tensors(plain).items():
        assert torch.equal(after[name].float(), value.float()), name  # what is averaged travels as float32
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    plain.eval()
    images = torch.rand(5, *SHAPE)
    assert torch.equal(stage.eval()(images), plain(images))


@pytest.mark.parametrize("kind", [Dropped, KeptInEval, Viewed, OwnStatistics], ids=lambda kind: kind.__name__)
def test_copies_of_blocks_train_as_the_blocks_do(kind: type[Net]) -> None:
    blocked = outline_of(kind(), SHAPE, CLASSES).cut(["conv1", "conv2"])
    parts = copied([*blocked.blocks, blocked.head])
    one = Stage(0, [], nn.Sequential(*blocked.blocks), blocked.head, CPU)
    other = Stage(0, [], nn.Sequential(*parts[:-1]), parts[-1], CPU)
    for stage in (one, other):
        step(stage, list(stage.parameters()), 0)
    assert torch.equal(one.flat.values(), other.flat.values())
    assert len({p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}) == 0


def test_a_module_kept_in_evaluation_keeps_its_statistics() -> None:
    network = KeptInEval()
    blocked = outline_of(network, SHAPE, CLASSES).cut(["conv1", "conv2"])
    stage = Stage(0, [], blocked.blocks[0], nn.Sequential(blocked.blocks[1], blocked.head), CPU)
    step(stage, list(stage.parameters()), 0)
    assert bool((network.bn1.running_mean == 0.25).all())
    assert not bool((network.bn2.running_mean == 0).all())
    assert (network.bn1.training, network.bn2.training) == (False, True)


def test_own_modules_are_entered_where_they_are_a_chain() -> None:
    assert outline_of(Wrapped(), SHAPE, CLASSES).places == ("backbone.conv1", "backbone.conv2")
    assert outline_of(WrappedTwice(), SHAPE, CLASSES).places == (
        "model.module.backbone.conv1",
        "model.module.backbone.conv2",
    )
    assert outline_of(InSequence(), SHAPE, CLASSES).places == ("backbone.conv1", "backbone.conv2")
    whole = outline_of(KeptWhole(), SHAPE, CLASSES)
    assert whole.places == ("conv1", "residual", "conv2", "branching")
    with pytest.raises(ConfigError) as caught:
        whole.cut(["conv1", "branching.two"])
    assert_one_line(caught.value, "no block can begin at 'branching.two'; blocks can begin at: conv1, residual")


def test_shared_tensors_have_one_place_and_are_refused_across_a_freeze() -> None:
    blocked = outline_of(TiedWithinABlock(), SHAPE, CLASSES).cut(["conv1", "conv2"])
    stage = WholeStage(blocked.network, nn.Sequential(*blocked.blocks), blocked.head, CPU)
    assert len(stage.flat) == sum(p.numel() for p in blocked.network.parameters())

    class Apart(Net):
        def more(self) -> None:
            self.conv3 = nn.Conv2d(16, 8, 3, padding=1)
            self.conv4 = nn.Conv2d(8, 16, 3, padding=1)
            self.conv4.weight = self.conv2.weight

        def second(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv4(self.conv3(self.conv2(x)))

    with pytest.raises(ConfigError) as caught:
        outline_of(Apart(), SHAPE, CLASSES).cut(["conv1", "conv3"])
    assert_one_line(caught.value, "no block can begin at 'conv3'")


def lost(network: Net, change: Callable[[nn.Module], None]) -> str:
    """Return what is said of a network whose cut is changed behind its back."""
    from fedfreeze.network import verify
    from fedfreeze.network.chain import chain_of
    from fedfreeze.network.modes import Block

    links = chain_of(network, SHAPE)
    for link in links:
        change(link.module)
    block = Block(*(link.module for link in links), exceptions={})
    return str(verify.difference(network, block, links, SHAPE))


def test_what_differs_is_named_with_module_and_line() -> None:
    from fedfreeze.network.program import Region

    def forget(module: nn.Module) -> None:
        if isinstance(module, Region):
            for mode, program in module.programs.items():
                kept = tuple(step for step in program.steps if step.label != "clamp")
                module.programs[mode] = type(program)(kept, program.incoming, program.outgoing)
                module._dead[mode] = module.programs[mode].last_uses()

    assert lost(StatementInPlace(), lambda module: None) == "None"
    said = lost(StatementInPlace(), forget)
    assert "relu at functional.py" in said or "relu at test_following.py:" in said, said
    said = lost(KeptInEval(), lambda module: None)
    assert "bn1 puts out differs" in said, said


def test_a_network_that_does_not_repeat_is_refused() -> None:
    import random

    class Drawing(Net):
        def first(self, x: torch.Tensor) -> torch.Tensor:
            return super().first(x) * random.random()

    with pytest.raises(ConfigError) as caught:
        outline_of(Drawing(), SHAPE, CLASSES)
    assert_one_line(caught.value, "Drawing")


def test_a_second_network_has_nothing_of_the_first() -> None:
    """Deep copies of a followed network are followed anew."""
    network = Dropped()
    outline_of(network, SHAPE, CLASSES)
    other = copy.deepcopy(network)
    assert outline_of(other, SHAPE, CLASSES).network is other
