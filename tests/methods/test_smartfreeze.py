"""A window of several blocks: who trains, who is frozen, what the pace controller looks at, what it costs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cost import measure_costs
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import make_fleet
from fedfreeze.methods import make_method
from fedfreeze.methods.base import Method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer
from fedfreeze.server.clock import EmulatedClock
from tests.network.test_stage import batch, fingerprint
from tests.support.checks import assert_one_line
from tests.support.launching import ENVIRONMENT, command, run, sha256, write_config

CPU = torch.device("cpu")


def config_of(window: int, **method: object) -> Config:
    return make_config({"model": {"name": "resnet10", "width": 4}, "method": {"window": window, **method}})


def method_of(window: int, **method: object) -> Method:
    config = config_of(window, **method)
    return make_method(config, build_network(config.model, (3, 16, 16), 10, 0))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("window", "names"),
    [
        (1, ("conv1..layer1", "layer2", "layer3", "layer4")),
        (2, ("conv1..layer2", "layer2..layer3", "layer3..layer4")),
        (3, ("conv1..layer3", "layer2..layer4")),
        (4, ("conv1..layer4",)),
    ],
)
def test_the_window_slides_by_one(window: int, names: tuple[str, ...]) -> None:
    method = method_of(window)
    assert method.num_stages == len(names)
    assert method.stage_names == names
    blocks = method.blocked.blocks
    for index in range(method.num_stages):
        method.begin_stage(index)
        stage = method.enter_stage(index, CPU)
        assert list(stage.frozen) == list(blocks[:index])
        trained = blocks[index : index + window]
        assert stage.flat.active_parameters == sum(map(parameters, trained))
        last = index == method.num_stages - 1
        # what the stage freezes: its first block, and all of them at the end
        assert stage.watched_parameters == (sum(map(parameters, trained)) if last else parameters(trained[0]))
        watched = {id(p) for block in (trained if last else trained[:1]) for p in block.parameters()}
        first = [slot for slot in stage.flat.slots if slot.end <= stage.watched_parameters]
        assert {id(slot.tensor) for slot in first} == watched
        method.leave_stage(stage)


@pytest.mark.parametrize("start", ["surrogate", "anew"])
@pytest.mark.parametrize("window", [2, 3])
def test_frozen_bytes_never_change(window: int, start: str) -> None:
    method = method_of(window, start=start)
    blocks = method.blocked.blocks
    images, labels = batch()
    frozen: list[str] = []
    for index in range(method.num_stages):
        method.begin_stage(index)
        stage = method.enter_stage(index, CPU)
        trainer = LocalTrainer(stage, method.config.train)
        before = [fingerprint(block) for block in blocks]
        assert before[:index] == frozen
        for _ in range(3):
            trainer.begin(stage.flat.buffer.clone(), 0.1)
            trainer.step(images, labels)
        method.leave_stage(stage)
        after = [fingerprint(block) for block in blocks]
        changed = [i for i in range(len(blocks)) if before[i] != after[i]]
        assert changed == list(range(index, index + window))
        frozen = after[: index + 1]


@pytest.mark.parametrize("window", [2, 3, 4])
def test_what_is_deployed_is_what_was_judged(window: int) -> None:
    method = method_of(window)
    images, _ = batch()
    for index in range(method.num_stages):
        stage = method.enter_stage(index, CPU)
        stage.eval()
        assert torch.equal(method.deployed(index).eval()(images), stage(images))
        method.leave_stage(stage)
    assert method.deployed(method.num_stages - 1) is method.blocked.network


def test_a_window_of_all_blocks_costs_what_the_whole_model_does() -> None:
    costs = measure_costs(config_of(4), (3, 16, 16), 10)
    (stage,) = costs.stages
    assert (stage.memory_bytes, stage.step_flops) == (costs.full.memory_bytes, costs.full.step_flops)
    assert (stage.trained_elements, stage.frozen_elements) == (costs.full.trained_elements, 0)


def test_costs_and_traffic_know_the_window() -> None:
    config = config_of(2)
    alone, both = (measure_costs(config_of(window), (3, 16, 16), 10) for window in (1, 2))
    blocks = method_of(1).blocked.blocks
    assert len(both.stages) == 3
    for index, cost in enumerate(both.stages):
        assert cost.watched_parameters == (
            parameters(blocks[index]) if index < 2 else parameters(blocks[2]) + parameters(blocks[3])
        )
        assert cost.frozen_elements == alone.stages[index].frozen_elements
        assert max(alone.stages[index].memory_bytes, 0) < cost.memory_bytes < both.full.memory_bytes
        assert cost.trained_elements > alone.stages[index + 1].trained_elements
    clock = EmulatedClock(make_fleet(config.fleet, 0), [8] * config.fleet.devices, both, config.train)
    clock.wait_for([0])
    clock.finish([0], 1)
    clock._send_down([0])
    clock.enter_stage(1)
    clock.wait_for([0])
    sent = clock._bytes_down(torch.tensor([0, 1]).numpy())
    frozen, trained = both.stages[1].frozen_elements, both.stages[1].trained_elements
    assert sent.tolist() == [4 * (frozen + trained)] * 2  # the block that left the window comes once more, as frozen
    clock._send_down([0])
    clock._has_model[:] = False
    assert clock._bytes_down(torch.tensor([0]).numpy()).tolist() == [4 * trained]


@pytest.mark.parametrize("window", [5, 100])
def test_a_window_wider_than_the_network_is_refused(window: int) -> None:
    with pytest.raises(ConfigError) as raised:
        method_of(window)
    assert_one_line(raised.value, f"method.window: {window}", "the 4 blocks", "use 1 to 4")


def test_parts_that_enter_later_start_anew_without_carry() -> None:
    """The surrogates behind the window, and the head, but neither what trains nor what is frozen."""
    method = method_of(2, carry=False, start="anew")
    with torch.no_grad():
        for module in method.state_modules().values():
            for parameter in module.parameters():
                parameter.fill_(0.5)
    method.begin_stage(1)
    blocks, modules = method.blocked.blocks, method.state_modules()
    assert all(bool((p == 0.5).all()) for block in blocks for p in block.parameters())
    kept = [all(bool((p == 0.5).all()) for p in surrogate.parameters()) for surrogate in modules["surrogates"]]
    assert kept == [True, True, False]


# Calculates on the second rank another start of a stage, as a processor of another make may in the last bits.
UNEVEN = """
import torch
import torch.distributed as dist
from fedfreeze.methods import SmartFreeze


class Uneven(SmartFreeze):
    def begin_stage(self, index):
        super().begin_stage(index)
        if dist.is_initialized() and dist.get_rank():
            with torch.no_grad():
                self.blocked.blocks[index][0].conv1.weight.add_(1)
"""


def test_all_ranks_start_a_stage_with_the_weights_of_rank_0(tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    config = write_config(tmp_path, train={"rounds": 3}, pace={"policy": "fixed"}, method={"name": "uneven:Uneven"})
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    for ranks in (1, 2):
        done = run(command(config, tmp_path / f"run{ranks}", ranks=ranks), environment=environment, fresh=True)
        assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "run1") == sha256(tmp_path / "run2")


def test_blocks_that_start_anew_are_told_once_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def bent(num_classes, in_channels, image_size):\n"
        "    layers = [nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()]\n"
        "    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    model = {"factory": "mine:bent", "split": ["0", "2", "4", "6"]}
    config = write_config(tmp_path, model=model, train={"rounds": 4}, pace={"policy": "fixed"})
    options = ["--data.augment=crop_flip", "--cache.features=true", "--fleet.memory_cap_mib=9"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = run(command(config, tmp_path / "run", *options), environment=environment, fresh=True)
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stdout.splitlines() if line.startswith("notice:")]
    reason = "it has a step (Tanh) that is no ReLU and no pooling"
    assert notices == [
        f"notice: method.start: blocks 2, 4 start anew, not from the surrogate: {reason}",
        "notice: cache.features: nothing is kept, as data.augment=crop_flip has no end of views; data.views gives it "
        "one",
    ]
