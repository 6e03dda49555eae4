"""HeteroFL, FedRolex and DepthFL: what devices start from and how updates merge, against loops in plain Python."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.methods import METHODS, Method, make_method
from fedfreeze.methods.aggregate import UpdateSum, fraction_bits
from fedfreeze.methods.fedrolex import FedRolex
from fedfreeze.methods.heterofl import HeteroFL
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer, Stage

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
CLASSES = 10
Values = dict[str, torch.Tensor]


def config_of(name: str, **sections: Any) -> Config:
    values: dict[str, Any] = {"model": {"name": "resnet8", "width": 4}, "train": {"batch_size": 8}}
    for section, change in sections.items():
        values[section] = values.get(section, {}) | change
    values["method"] = {"name": name} | values.get("method", {})
    return make_config(values)


def method_of(config: Config, fitted: dict[str, Any] | None = None) -> Method:
    model = METHODS[config.method.name].network(config.model, fitted or {})
    return make_method(config, build_network(model, SHAPE, CLASSES, config.seed), fitted)


def batch(count: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def named(stage: Stage) -> Values:
    """Every float tensor of a stage's trained part, by name."""
    tensors = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    return {name: t.detach().clone() for name, t in tensors.items() if t.is_floating_point()}


@dataclass
class Device:
    level: int
    labels: list[int]
    weight: int


@dataclass
class Trained:
    device: Device
    part: Stage
    before: Values
    after: Values


def one_round(method: Method, devices: list[Device], round_number: int) -> tuple[Stage, Values, Values, list[Trained]]:
    """Train devices as a rank does; return the stage, the global values before and after, and what devices had."""
    stage = method.enter_stage(0, CPU)
    values = stage.flat.buffer.clone()
    before = named(stage)
    update = method.empty_sum(stage, fraction_bits(sum(device.weight for device in devices)))
    trained = []
    for number, device in enumerate(devices):
        part = method.enter_level(0, device.level, CPU)
        built = part.flat.buffer.clone()
        labels = torch.tensor(device.labels)
        part.begin_device(labels)
        index = method.part_index(stage, part, round_number, labels)
        start = torch.where(index >= 0, values[index.clamp(min=0)], built)
        trainer = LocalTrainer(part, method.config.train)
        trainer.begin(start, 0.1)
        local = named(part)
        images, drawn = batch(seed=number)
        for _ in range(2):
            trainer.step(images, labels[drawn % len(labels)])
        trained.append(Trained(device, part, local, named(part)))
        change = part.flat.buffer - start
        update.add(change[index >= 0], device.weight, index[index >= 0])
    stage.flat.load(method.merge(values, update, sum(device.weight for device in devices)))
    return stage, before, named(stage), trained


def merged_by_loop(before: Values, trained: list[Trained], place_of: Any) -> Values:
    """Element by element: the weighted mean of the values of those that hold it."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name, tensor in before.items():
        for where in itertools.product(*(range(size) for size in tensor.shape)):
            total = weight = 0.0
            for each in trained:
                here = place_of(name, where, tuple(tensor.shape), each)
                if here is not None:
                    total += each.device.weight * float(each.after[name][here])
                    weight += each.device.weight
            if weight:
                after[name][where] = total / weight
    return after


def place_in_width(name: str, where: tuple[int, ...], shape: tuple[int, ...], each: Trained, offset: int) -> Any:
    """Where a sub-model has an element of the global network; None where it has not."""
    if name not in each.after:
        return None
    kept = tuple(each.after[name].shape)
    here = tuple(w if k == n else (w - offset) % n for w, n, k in zip(where, shape, kept, strict=True))
    if any(position >= size for position, size in zip(here, kept, strict=True)):
        return None
    if name.startswith("output_module.fc") and where[0] not in each.device.labels:
        return None
    return here


DEVICES = [
    Device(0, list(range(CLASSES)), 3),
    Device(1, [1, 4], 5),
    Device(1, [0, 4, 9], 2),
    Device(2, [2, 4], 7),
]


@pytest.mark.parametrize(
    ("name", "round_number", "norm"),
    [("heterofl", 1, "batch"), ("fedrolex", 1, "batch"), ("fedrolex", 7, "batch"), ("fedrolex", 18, "group")],
)
def test_width_merge_is_the_loop_over_elements(name: str, round_number: int, norm: str) -> None:
    method = method_of(config_of(name, model={"norm": norm}, method={"widths": [0.75, 0.5, 0.25]}), None)
    offset = 0 if name == "heterofl" else round_number
    _, before, after, trained = one_round(method, DEVICES, round_number)
    expected = merged_by_loop(before, trained, lambda n, w, s, e: place_in_width(n, w, s, e, offset))
    changed = 0
    for tensor_name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-5, atol=1e-6, msg=tensor_name)
        changed += int((tensor != before[tensor_name]).sum())
    assert changed > 1000
    # what each device started from were the global values of its elements
    for each in trained:
        for tensor_name, tensor in each.before.items():
            for where in itertools.product(*(range(size) for size in before[tensor_name].shape)):
                shape = tuple(before[tensor_name].shape)
                here = place_in_width(tensor_name, where, shape, each, offset)
                assert here is None or tensor[here] == before[tensor_name][where]


@pytest.mark.parametrize("kind", ["conv_norm", "pool"])
def test_depth_merge_is_the_loop_over_elements(kind: str) -> None:
    method = method_of(config_of("depthfl", method={"output_module": kind}))
    _, before, after, trained = one_round(method, DEVICES, 3)
    assert {len(each.part.active) for each in trained} == {1, 2, 3}
    expected = merged_by_loop(before, trained, lambda n, w, _, e: w if n in e.after else None)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    statistics = [name for name in after if name.endswith("running_var")]
    assert statistics
    for name in statistics:  # averaged like everything else
        assert not torch.equal(after[name], before[name])
    for each in trained:
        for name, tensor in each.before.items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_heterofl_of_whole_shares_merges_as_fedavg(weights: str) -> None:
    config = config_of("heterofl", method={"widths": [1.0, 1.0], "weights": weights})
    method, fedavg = method_of(config), method_of(config_of("fedavg", method={"weights": weights}))
    everything = list(range(CLASSES))
    samples = [3, 5, 2]
    assert [method.weight(n) for n in samples] == [fedavg.weight(n) for n in samples]
    devices = [Device(method.num_levels(0) - 1, everything, fedavg.weight(n)) for n in samples]
    stage, _, after, _ = one_round(method, devices, 1)

    whole = fedavg.enter_stage(0, CPU)
    values = whole.flat.buffer.clone()
    update = UpdateSum(len(whole.flat), fraction_bits(sum(samples)))
    trainer = LocalTrainer(whole, config.train)
    for number, device in enumerate(devices):
        trainer.begin(values, 0.1)
        images, labels = batch(seed=number)
        for _ in range(2):
            trainer.step(images, labels)
        update.add(whole.flat.buffer - values, device.weight)
    whole.flat.load(fedavg.merge(values, update, sum(device.weight for device in devices)))
    expected = named(whole)
    trained = {slot.path for slot in stage.flat.slots if slot.end <= stage.flat.parameters}
    for name in trained:
        assert torch.equal(after[name], expected[name]), name
    for name in set(after) - trained:  # static batch normalisation: no device sends statistics
        assert name.endswith(("running_mean", "running_var"))
        assert torch.equal(after[name], torch.full_like(after[name], float(name.endswith("var"))))


@pytest.mark.parametrize(("size", "kept"), [(4, 1), (8, 3), (7, 2), (64, 16)])
def test_windows_cover_every_channel_equally_often(size: int, kept: int) -> None:
    method = method_of(config_of("fedrolex"))
    assert isinstance(method, FedRolex)
    seen = torch.zeros(size, dtype=torch.int64)
    for round_number in range(1, size + 1):
        window = method.window(size, kept, round_number)
        assert len(window) == len(set(window.tolist())) == kept
        assert window[0] == round_number % size
        seen[window] += 1
    assert (seen == kept).all()
    nested = method_of(config_of("heterofl"))
    assert isinstance(nested, HeteroFL)
    assert nested.window(size, kept, 5).tolist() == list(range(kept))


def test_a_window_wraps_around() -> None:
    method = method_of(config_of("fedrolex"))
    assert isinstance(method, FedRolex)
    assert method.window(8, 4, 14).tolist() == [6, 7, 0, 1]


@pytest.mark.parametrize("model", ["resnet8", "vgg11"])
@pytest.mark.parametrize(("name", "round_number"), [("heterofl", 1), ("fedrolex", 3), ("fedrolex", 15)])
def test_a_sub_model_is_the_global_network_without_the_other_channels(name: str, round_number: int, model: str) -> None:
    """So the window is the same before and behind every layer, and on both sides of every shortcut."""
    config = config_of(name, model={"name": model, "width": 8}, method={"widths": [1.0, 0.5]})
    method = method_of(config)
    stage = method.enter_stage(0, CPU)
    part = method.enter_level(0, 0, CPU)
    index = method.part_index(stage, part, round_number, torch.arange(CLASSES))
    part.flat.load(stage.flat.buffer[index])
    others = torch.ones(stage.flat.parameters, dtype=torch.bool)
    others[index] = False
    stage.flat.buffer[: stage.flat.parameters][others] = 0  # also of normalisation, so these channels put out zero
    images, _ = batch(16)
    with torch.no_grad():
        # normalised, what the scaler multiplies differs by the normalisation's epsilon alone
        torch.testing.assert_close(part(images), stage(images), rtol=1e-2, atol=1e-3)
    assert part(images).std() > 0.05


def test_scaler_divides_by_the_share_in_training_only() -> None:
    method = method_of(config_of("heterofl", model={"width": 8}, method={"widths": [1.0, 0.25]}))
    part = method.enter_level(0, 0, CPU)
    outputs: list[torch.Tensor] = []
    convolution = part.active[0][0]
    images, _ = batch()
    with torch.no_grad():
        # hooks run in order, so this one sees what the scaler left
        convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
        plain = torch.nn.functional.conv2d(images, convolution.weight, padding=1)
        part.train()
        logits = part(images)
        classified: list[torch.Tensor] = []
        part.output_module[-1].register_forward_pre_hook(lambda module, inputs: classified.append(inputs[0]))
        part(images)
        part.eval()
        part(images)
    torch.testing.assert_close(outputs[0], plain * 4)
    torch.testing.assert_close(outputs[-1], plain)
    linear = part.output_module[-1]
    torch.testing.assert_close(logits, torch.nn.functional.linear(classified[0], linear.weight, linear.bias))


def test_masked_loss_is_cross_entropy_with_absent_logits_zero() -> None:
    method = method_of(config_of("heterofl", method={"widths": [1.0, 0.5]}))
    part = method.enter_level(0, 0, CPU)
    part.begin_device(torch.tensor([2, 5]))
    images, _ = batch(6)
    labels = torch.tensor([2, 5, 5, 2, 2, 5])
    loss, told = part.loss(images, labels)
    with torch.no_grad():
        logits = part(images)
        logits[:, [0, 1, 3, 4, 6, 7, 8, 9]] = 0
        rows = zip(logits, labels, strict=True)
        by_hand = -torch.stack([torch.log(row.exp()[y] / row.exp().sum()) for row, y in rows]).mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    torch.testing.assert_close(told.detach(), logits)
    loss.backward()
    gradient = part.output_module[-1].weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).tolist() == [label in (2, 5) for label in range(CLASSES)]
    part.begin_device(torch.arange(CLASSES))  # the next device has all labels
    torch.testing.assert_close(part.loss(images, labels)[0], torch.nn.functional.cross_entropy(part(images), labels))


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_static_batch_norm_is_the_mean_of_the_batches_statistics(name: str) -> None:
    method = method_of(config_of(name, method={"statistics_samples": 96}))
    assert method.statistics_samples == 96
    stage = method.enter_stage(0, CPU)
    batches = [batch(32, seed)[0] for seed in range(3)]
    norms = {n: m for n, m in stage.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in norms}
    hooks = [
        m.register_forward_pre_hook(lambda module, arguments, n=n: inputs[n].append(arguments[0].clone()))
        for n, m in norms.items()
    ]
    method.take_statistics(stage, iter([batch(32, 7)[0]]))  # of which nothing is left when they are taken anew
    for seen in inputs.values():
        seen.clear()
    method.take_statistics(stage, iter([*batches, batches[0][:1]]))  # a single image cannot be normalised
    for hook in hooks:
        hook.remove()
    assert not stage.training
    for n, norm in norms.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs[n]]).mean(0)
        var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs[n]]).mean(0)
        assert len(inputs[n]) == 3
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
        assert norm.momentum == 0.1
    slot = next(slot for slot in stage.flat.slots if slot.path.endswith("running_var"))
    assert not torch.equal(stage.flat.buffer[slot.begin : slot.end], torch.ones(slot.end - slot.begin))
    assert method_of(config_of(name, model={"norm": "group"})).statistics_samples == 0


def test_depth_loss_against_a_hand_calculation() -> None:
    method = method_of(config_of("depthfl", method={"distillation": 0.7}))
    part = method.enter_level(0, 2, CPU)
    images, labels = batch()
    loss, told = part.loss(images, labels)
    logits, x = [], images
    for block, head in zip(part.active, part.output_module, strict=True):
        x = block(x)
        logits.append(head(x))
    expected = 0.0
    probabilities = [torch.softmax(each.detach().double(), 1) for each in logits]
    for i, own in enumerate(probabilities):
        expected += float(-own[range(8), labels].log().mean())
        for j, other in enumerate(probabilities):
            if i != j:
                expected += 0.7 / 2 * float((other * (other / own).log()).sum(1).mean())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(told, sum(logits) / 3)
    assert len(method.enter_level(0, 0, CPU).output_module) == 1


def test_a_depth_teaches_without_learning_from_its_teaching() -> None:
    """No gradient goes into the exit that is imitated."""
    from fedfreeze.methods.depthfl import depth_loss

    first, second = (torch.randn(4, CLASSES, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, CLASSES, (4,))
    depth_loss([first, second], labels, 1.0).backward()
    ours = first.grad
    student = first.detach().clone().requires_grad_()
    (
        torch.nn.functional.cross_entropy(student, labels)
        + torch.nn.functional.kl_div(
            torch.log_softmax(student, 1), torch.softmax(second.detach(), 1), reduction="batchmean"
        )
    ).backward()
    torch.testing.assert_close(ours, student.grad)


def test_exits_have_tensors_and_first_values_of_their_own() -> None:
    method = method_of(config_of("depthfl"))
    stage = method.enter_stage(0, CPU)
    before = stage.flat.buffer.clone()
    part = method.enter_level(0, 1, CPU)
    assert all(tensor.untyped_storage().nbytes() <= 4 * len(part.flat) for tensor in part.state_dict().values())
    part.flat.buffer.fill_(7.0)
    assert torch.equal(stage.flat.buffer, before)
    heads = [head[-1][-1].weight for head in stage.output_module]
    assert not torch.equal(heads[0], heads[1])
    again = method_of(config_of("depthfl")).enter_stage(0, CPU)
    assert torch.equal(again.flat.buffer, before)
