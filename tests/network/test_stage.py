"""Blocks, output modules, flat views and stages: the cut network is the network, and frozen means frozen."""

import hashlib

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import MethodConfig
from fedfreeze.device.cap import count_peak
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import BlockedNetwork, build_network, outline_of
from fedfreeze.network.flat import FlatPart
from fedfreeze.network.output_modules import OutputModules
from fedfreeze.network.stage import LocalTrainer, Stage

CPU = torch.device("cpu")
DEPTHS = {"resnet8": 3, "resnet10": 4, "resnet18": 4, "resnet34": 4}
KINDS = ("conv_norm", "conv", "block", "pool")


def blocked(name: str = "resnet8", norm: str = "batch", width: int = 4) -> BlockedNetwork:
    config = make_config({"model": {"name": name, "width": width, "norm": norm}})
    return build_network(config.model, (3, 16, 16), 10, seed=0)


def fingerprint(module: nn.Module) -> str:
    """Bytes of every tensor, running statistics and counts of batches included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 10, (8,), generator=generator)


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_blocks_in_order_are_the_network(name: str, norm: str) -> None:
    cut = blocked(name, norm)
    assert len(cut.blocks) == DEPTHS[name]
    images, _ = batch()
    x = images
    cut.network.eval()
    for block, shape in zip(cut.blocks, cut.shapes, strict=True):
        x = block(x)
        assert x.shape[1:] == shape
    assert torch.equal(cut.head(x), cut.network(images))
    parts = [*cut.blocks, cut.head]
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(
        p.numel() for p in cut.network.parameters()
    )


def test_resnet18_is_the_usual_one() -> None:
    cut = blocked("resnet18", width=64)
    # conv1 1,728 instead of 9,408, and 10 classes: the CIFAR ResNet-18 of 11.17 million parameters
    assert sum(p.numel() for p in cut.network.parameters()) == 11_173_962
    assert cut.names == ("conv1..layer1", "layer2", "layer3", "layer4")
    assert cut.shapes == ((64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2))


def test_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = blocked()
    torch.manual_seed(2)
    second = blocked()
    assert fingerprint(first.network) == fingerprint(second.network)
    assert torch.initial_seed() == 2


def test_a_probe_does_not_move_running_statistics() -> None:
    network = blocked().network
    before = fingerprint(network)
    outline_of(network, (3, 16, 16), 10).cut(["conv1", "layer2", "layer3"])
    assert fingerprint(network) == before
    assert network.training


@pytest.mark.parametrize("kind", KINDS)
def test_output_module_gives_logits_in_every_stage(kind: str) -> None:
    cut = blocked("resnet10")
    modules = OutputModules(cut, MethodConfig(output_module=kind), "batch", 0)  # type: ignore[arg-type]
    images, _ = batch()
    x = images
    for stage, block in enumerate(cut.blocks):
        x = block(x)
        assert modules.behind(stage)(x).shape == (8, 10)
    convolutions = [m for m in modules.behind(0).modules() if isinstance(m, nn.Conv2d)]
    # one 3x3 a missing block; a residual block has two and, for its shortcut, a 1x1
    assert len(convolutions) == {"conv_norm": 3, "conv": 3, "block": 9, "pool": 0}[kind]
    assert [c.kernel_size for c in convolutions if c.kernel_size != (1, 1)] == [(3, 3)] * {"block": 6, "pool": 0}.get(
        kind, 3
    )
    assert modules.behind(3)[0] is cut.head


@pytest.mark.parametrize("carry", [True, False])
def test_carry_keeps_and_reinit_starts_anew(carry: bool) -> None:
    modules = OutputModules(blocked("resnet10"), MethodConfig(carry=carry), "batch", 0)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.fill_(0.5)
    modules.begin_behind(1)
    kept = all(bool((p == 0.5).all()) for p in modules.behind(1).parameters())
    assert kept is carry
    if not carry:
        once = fingerprint(modules.behind(1))
        modules.begin_behind(1)
        assert fingerprint(modules.behind(1)) == once


def test_flat_part_is_the_same_memory_and_releases_it() -> None:
    active = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    output = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    before = {name: tensor.clone() for name, tensor in active.state_dict().items()}
    flat = FlatPart(active, output, CPU)
    assert flat.active_parameters == 4 * 27 + 4 + 8
    assert flat.parameters == flat.active_parameters + 34
    assert len(flat) == flat.parameters + 8  # running mean and variance
    for name, tensor in active.state_dict().items():
        assert torch.equal(tensor, before[name])
    flat.load(torch.arange(len(flat), dtype=torch.float32))
    assert active[0].weight.flatten()[:3].tolist() == [0, 1, 2]
    assert active[1].running_var[-1] == len(flat) - 1
    active(torch.randn(2, 3, 4, 4))
    assert active[1].num_batches_tracked == 1
    assert flat.buffer[flat.parameters] != flat.parameters  # the running mean moved inside the buffer
    flat.load(torch.zeros(len(flat)))
    assert active[1].num_batches_tracked == 0  # so it does not tell which rank trained
    flat.release()
    flat.buffer.fill_(7)
    assert float(active[0].weight.detach().abs().sum()) == 0
    assert float(active[1].running_mean.abs().sum()) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_frozen_bytes_are_equal_before_and_after_every_later_stage(kind: str, norm: str) -> None:
    config = make_config({"model": {"width": 4, "norm": norm}, "method": {"output_module": kind}})
    cut = build_network(config.model, (3, 16, 16), 10, 0)
    method = make_method(config, cut)
    images, labels = batch()
    frozen: list[str] = []
    for index in range(method.num_stages):
        method.begin_stage(index)
        stage = method.enter_stage(index, CPU)
        assert [fingerprint(block) for block in cut.blocks[:index]] == frozen
        trainer = LocalTrainer(stage, config.train)
        start = stage.flat.buffer.clone()
        for _ in range(3):
            trainer.begin(stage.flat.buffer.clone(), 0.1)
            trainer.step(images, labels)
        assert not torch.equal(stage.flat.buffer[: stage.flat.active_parameters], start[: stage.flat.active_parameters])
        assert [fingerprint(block) for block in cut.blocks[:index]] == frozen
        method.leave_stage(stage)
        frozen.append(fingerprint(cut.blocks[index]))
    assert len(set(frozen)) == 3


def test_frozen_prefix_stores_nothing_for_backward() -> None:
    config = make_config({"model": {"width": 4}})
    method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
    stage = method.enter_stage(2, CPU)
    assert not any(m.training for m in stage.frozen.modules())
    assert stage.active.training
    stage.eval()
    assert not stage.active.training
    stage.train()
    assert stage.active.training
    assert not any(m.training for m in stage.frozen.modules())
    saved: list[torch.Tensor] = []
    images, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        stage(images)
    frozen_storages = {t.untyped_storage().data_ptr() for t in stage.frozen.state_dict().values()}
    assert saved
    assert not frozen_storages & {t.untyped_storage().data_ptr() for t in saved}


def test_a_frozen_block_runs_a_module_as_often_as_it_stands_there() -> None:
    bend, pool = nn.Tanh(), nn.MaxPool2d(2)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), bend, pool, nn.Sequential(nn.Conv2d(4, 4, 3), bend), pool, bend)
    stage = Stage(1, [block], nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.Linear(4, 2), CPU)
    images = torch.randn(2, 3, 14, 14)
    assert torch.equal(stage.frozen_forward(images), block(images))


def test_momentum_of_one_device_is_unknown_to_the_next() -> None:
    config = make_config({"model": {"width": 4}})
    method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
    stage = method.enter_stage(0, CPU)
    trainer = LocalTrainer(stage, config.train)
    start = stage.flat.buffer.clone()
    images, labels = batch()

    def one_device() -> torch.Tensor:
        trainer.begin(start, 0.1)
        trainer.step(images, labels)
        trainer.step(images, labels)
        return stage.flat.buffer.clone()

    assert torch.equal(one_device(), one_device())


@pytest.mark.parametrize("name", ["smartfreeze", "fedavg"])
def test_each_device_begins_in_training_mode_whatever_came_between(name: str) -> None:
    """Also a module that the stage itself does not hold: the network, whose own forward may look at its mode."""
    config = make_config({"model": {"width": 4}, "method": {"name": name}})
    method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
    stage = method.enter_stage(0, CPU)
    trainer = LocalTrainer(stage, config.train)
    start = stage.flat.values().clone()
    stage.eval()
    trainer.begin(start, 0.1)
    assert all(module.training for module in [*stage.active.modules(), *stage.output_module.modules()])
    assert method.blocked.network.training
    norm = next(module for module in stage.active.modules() if isinstance(module, nn.BatchNorm2d))
    for module in (norm, method.blocked.network):
        if module in set(stage.moded_modules()):
            module.training = False
            trainer.begin(start, 0.1)
            assert module.training


def test_sgd_on_flat_views_equals_plain_sgd() -> None:
    config = make_config({"model": {"width": 4}, "train": {"learning_rate": 0.1, "weight_decay": 0.01}})
    method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
    plain = build_network(config.model, (3, 16, 16), 10, 0).network.train()
    stage = make_method(make_config({"model": {"width": 4}, "method": {"name": "fedavg"}}), method.blocked).enter_stage(
        0, CPU
    )
    trainer = LocalTrainer(stage, config.train)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    images, labels = batch()
    for _ in range(3):
        ours = trainer.step(images, labels)
        optimizer.zero_grad()
        theirs = nn.functional.cross_entropy(plain(images), labels)
        theirs.backward()
        optimizer.step()
        torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-4, atol=1e-5)
    for name, tensor in plain.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(method.blocked.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_deployed_network_of_every_stage_runs() -> None:
    config = make_config({"model": {"width": 4}})
    method = make_method(config, build_network(config.model, (3, 16, 16), 10, 0))
    images, _ = batch()
    for index in range(method.num_stages):
        stage = method.enter_stage(index, CPU)
        stage.eval()
        deployed = method.deployed(index).eval()
        assert torch.equal(deployed(images), stage(images))
        method.leave_stage(stage)
    assert method.deployed(2) is method.blocked.network


@pytest.mark.parametrize("model", ["resnet8", "vgg11", "vit"])
@pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
def test_a_prefix_in_chunks_gives_the_same_in_less_memory(model: str, memory_format: str) -> None:
    facts = {"model": {"name": model, "width": 16, "memory_format": memory_format}}
    found = {}
    for chunk in (None, 3, 4, 16, 100):
        config = make_config(facts | {"train": {"batch_size": 16, "prefix_chunk": chunk}})
        method = make_method(config, build_network(config.model, (3, 32, 32), 10, 0))
        stage = method.enter_stage(method.num_stages - 1, CPU)
        LocalTrainer(stage, config.train)
        images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        peak = count_peak(lambda s=stage, x=images: s.frozen_forward(x), [images])
        found[chunk] = stage.frozen_forward(images), peak
    whole, peak = found[None]
    for chunk in (3, 4, 16, 100):
        torch.testing.assert_close(found[chunk][0], whole, rtol=1e-4, atol=1e-5)
        assert found[chunk][0].stride() == whole.stride()
    assert found[3][1] <= found[4][1] < peak
    assert found[16][1] == found[100][1] == peak
    assert torch.equal(found[100][0], whole)
    front = method.enter_stage(0, CPU)
    front.prefix_chunk = 3
    assert front.frozen_forward(images) is images  # nothing is frozen, and nothing need be copied
