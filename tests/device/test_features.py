"""Features of the frozen prefix are kept: the same bits and peaks whatever is kept, on any number of ranks."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.data.batches import training_batches, training_views
from fedfreeze.data.store import Data, Split
from fedfreeze.device.features import FrozenFeatures, can_be_kept
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import Stage
from fedfreeze.seeds import torch_generator
from tests.support.checks import ROOT
from tests.support.launching import metrics, run, sha256, without_wall_time, write_config

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
SAMPLES = 21


def data() -> Data:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SAMPLES, *SHAPE), dtype=np.uint8)
    split = Split(images, generator.integers(0, 10, SAMPLES))
    return Data(split, split, 10, (0.5,) * 3, (0.25,) * 3, None)


def config_of(augment: str = "flip", budget_mib: float = 100.0, features: bool = True, **model: object) -> Config:
    return make_config(
        {
            "data": {"augment": augment},
            "model": {"width": 4, **model},
            "train": {"batch_size": 8, "local_epochs": 2},
            "cache": {"features": features, "budget_mib": budget_mib},
        }
    )


def stage_of(config: Config, index: int = 1) -> Stage:
    return make_method(config, build_network(config.model, SHAPE, 10, 0)).enter_stage(index, CPU)


def features_of(config: Config, rows: np.ndarray | None = None, index: int = 1) -> FrozenFeatures:
    parts = [np.arange(SAMPLES) if rows is None else rows]
    return FrozenFeatures(stage_of(config, index), data(), parts, config, CPU)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_batches_are_those_of_training_without(augment: str) -> None:
    config = config_of(augment)
    kept = features_of(config)
    key = (3, 0)
    plain = training_batches(
        data(),
        np.arange(SAMPLES),
        batch_size=8,
        epochs=2,
        augment=augment,
        shuffle=torch_generator(0, "shuffle", *key),
        augmentation=torch_generator(0, "augment", *key),
        device=CPU,
    )
    count = 0
    for ours, (images, labels) in zip(kept.batches(0, 3), plain, strict=True):
        assert torch.equal(ours.make_images(), images)
        assert torch.equal(ours.labels, labels)
        torch.testing.assert_close(ours.features(), kept.stage.frozen_forward(images), rtol=1e-4, atol=1e-5)
        count += 1
    assert count == 6  # 21 samples in batches of 8, twice


@given(st.permutations(range(SAMPLES)), st.integers(1, SAMPLES), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_samples_features_have_the_same_bits_in_whatever_company(order: list[int], count: int, rounds: int) -> None:
    config = config_of("flip")
    alone: dict[tuple[int, int], torch.Tensor] = {}
    for rows in (np.arange(SAMPLES), np.array(order[:count])):
        kept = features_of(config, rows)
        for number in range(rounds):
            for batch in kept.batches(0, number):
                for view, chosen, features in zip(batch.views, batch.chosen, batch.features(), strict=True):
                    key = int(view), int(rows[int(chosen)])
                    assert torch.equal(alone.setdefault(key, features), features)


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_kept_features_lie_in_memory_as_the_prefix_puts_them_out(memory_format: str) -> None:
    config = config_of("none", memory_format=memory_format)
    for index in (1, 2):
        kept = features_of(config, index=index)
        batch = next(kept.batches(0, 1))
        direct = kept.stage.frozen_forward(batch.make_images())
        assert batch.features().stride() == direct.stride()
        assert torch.equal(batch.counted_features(), batch.features())
        assert batch.counted_features().stride() == direct.stride()


def test_a_budget_is_held_and_what_is_over_it_is_calculated_anew() -> None:
    one = SAMPLES * 2 * 4 * 8 * 8 * 4  # views x channels x pixels x bytes
    config = config_of("flip", budget_mib=(one + 100) / 2**20)
    parts = [np.arange(SAMPLES), np.arange(SAMPLES)[::-1].copy()]
    kept = FrozenFeatures(stage_of(config), data(), parts, config, CPU)
    ample = FrozenFeatures(stage_of(config_of("flip")), data(), parts, config_of("flip"), CPU)
    for number in range(3):
        for device in (0, 1):
            for ours, theirs in zip(kept.batches(device, number), ample.batches(device, number), strict=True):
                assert torch.equal(ours.features(), theirs.features())
    assert kept.used_bytes == one <= kept.budget_bytes
    assert ample.used_bytes == 2 * one
    assert torch.equal(kept.of_test(np.arange(16)), ample.of_test(np.arange(16)))
    assert kept.used_bytes == one


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class OwnLoss(Stage):
    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = super().loss(images, labels)
        return loss + images.mean(), logits


class Batched(nn.Module):
    """Makes of an image what depends on the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Sliced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


class Expanded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :1, :1].contiguous().expand(-1, -1, 4, 4)


class Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).flatten(2).transpose(1, 2)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.add_(1).flatten(1))


@pytest.mark.parametrize(
    ("prefix", "kept"), [(Batched, False), (Sliced, False), (Expanded, False), (Tokens, True), (nn.Identity, True)]
)
def test_a_prefix_of_any_layout_gives_what_it_puts_out_or_is_not_kept(prefix: type[nn.Module], kept: bool) -> None:
    config = config_of("none")
    active = Linear()
    active(prefix()(torch.zeros(2, *SHAPE)).clone())
    stage = Stage(1, [prefix()], active, nn.Linear(5, 10), CPU)
    assert can_be_kept(stage, config, SHAPE, CPU) == kept
    if kept:
        features = FrozenFeatures(stage, data(), [np.arange(SAMPLES)], config, CPU)
        for batch in features.batches(0, 1):
            wanted = stage.frozen_forward(batch.make_images())
            assert torch.equal(batch.features(), wanted)
            assert torch.equal(batch.counted_features(), wanted)
            assert batch.features().stride() == batch.counted_features().stride()
        first = stage.behind(features.of_test(np.arange(8)))  # which changes what it is given
        assert torch.equal(stage.behind(features.of_test(np.arange(8))), first)
        assert torch.equal(stage.behind(features.of_test(np.arange(8))), first)


def test_what_cannot_be_kept_is_not() -> None:
    config = config_of()
    assert can_be_kept(stage_of(config), config, SHAPE, CPU)
    assert not can_be_kept(stage_of(config, 0), config, SHAPE, CPU)  # no prefix
    for other in (config_of("crop_flip"), config_of(features=False)):
        assert not can_be_kept(stage_of(other), other, SHAPE, CPU)
    block = nn.Sequential(nn.Conv2d(3, 3, 3))
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 10))
    assert can_be_kept(Stage(1, [nn.Identity()], block, head, CPU), config, SHAPE, CPU)
    assert not can_be_kept(Stage(1, [Noise()], block, head, CPU), config, SHAPE, CPU)
    assert not can_be_kept(OwnLoss(1, [nn.Identity()], block, head, CPU), config, SHAPE, CPU)


def test_views_are_drawn_as_flips_are() -> None:
    drawn = training_views(
        5,
        batch_size=2,
        epochs=1,
        augment="flip",
        shuffle=torch_generator(0, "shuffle"),
        augmentation=torch_generator(0, "augment"),
    )
    sizes = [(len(chosen), views.tolist()) for chosen, views in drawn]
    assert [size for size, _ in sizes] == [2, 2]  # a last one of a single sample is left out


# --- whole runs

# Some devices hold no stage, others the later ones, and nobody looks at it beforehand.
SMALL_CAPS = ["--fleet.memory_cap_mib=[0.2, 0.26, 0.3, 0.9]", "--select.memory=false"]
RUNS: dict[str, tuple[list[str], int, int | None]] = {
    "off": (["--cache.features=false"], 1, None),
    "ample": ([], 1, None),
    "exceeded": (["--cache.budget_mib=0.05"], 1, None),
    "zero": (["--cache.budget_mib=0"], 1, None),
    "two ranks, killed and resumed": ([], 2, 4),
    "three ranks": ([], 3, None),
    "evaluated by a sample": (["--eval.every_rounds=3", "--eval.samples=50"], 2, None),
    "off, small caps": (["--cache.features=false", *SMALL_CAPS], 1, None),
    "ample, small caps": (SMALL_CAPS, 1, None),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("features")
    config = write_config(
        folder,
        data={"augment": "flip"},
        train={"rounds": 6, "participants": 4},
        pace={"policy": "fixed"},
        cache={"features": True},
        eval={"every_rounds": 1},
    )
    paths = {name: folder / str(number) for number, name in enumerate(RUNS)}
    tasks: list[dict[str, Any]] = [
        {
            "config": str(config),
            "overrides": options,
            "run_dir": str(paths[name]),
            "ranks": ranks,
            "kill_in_round": kill,
        }
        for name, (options, ranks, kill) in RUNS.items()
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    done = run([sys.executable, str(ROOT / "tests" / "support" / "many_runs.py"), str(folder / "tasks.json")])
    codes = [json.loads(line)["codes"][-1] for line in done.stdout.splitlines()]
    assert codes == [0] * len(RUNS), done.stderr[-3000:]
    return paths


@pytest.mark.parametrize("name", ["exceeded", "zero", "two ranks, killed and resumed", "three ranks"])
def test_one_sha256_whatever_is_kept(runs: dict[str, Path], name: str) -> None:
    assert sha256(runs[name]) == sha256(runs["ample"])
    assert without_wall_time(metrics(runs[name])) == without_wall_time(metrics(runs["ample"]))


def test_rounds_between_full_evaluations_are_judged_by_a_sample(runs: dict[str, Path]) -> None:
    sampled, full = ([r for r in metrics(runs[n]) if r["kind"] == "round"] for n in ("evaluated by a sample", "ample"))
    assert sha256(runs["evaluated by a sample"]) == sha256(runs["ample"])
    assert all(record["accuracy_sampled"] is None for record in full)
    stage_of_round = [record["stage"] for record in full]
    ends = {n for n, stage in enumerate(stage_of_round, 1) if stage_of_round[n : n + 1] != [stage]}
    for number, (ours, theirs) in enumerate(zip(sampled, full, strict=True), 1):
        if number % 3 == 0 or number in ends:
            assert ours["accuracy"] == theirs["accuracy"]
            assert ours["accuracy_sampled"] is None
        else:
            assert ours["accuracy"] is None
            assert (ours["accuracy_sampled"] * 50) % 1 == pytest.approx(0, abs=1e-9)
            assert ours["accuracy_sampled"] == pytest.approx(theirs["accuracy"], abs=0.2)


def test_devices_are_charged_as_if_nothing_were_kept(runs: dict[str, Path]) -> None:
    """Peaks, time, traffic and operations are those of devices that calculate their prefix; results by rounding."""
    kept, plain = ([r for r in metrics(runs[name]) if r["kind"] == "round"] for name in ("ample", "off"))
    assert len(kept) == len(plain) == 6
    for ours, theirs in zip(kept, plain, strict=True):
        for key in ("selected", "peak_memory_mib", "tensor_peak_mib", "emulated_s", "bytes_up", "bytes_down", "flops"):
            assert ours[key] == theirs[key], key
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)


def test_who_runs_out_does_so_with_kept_features_too(runs: dict[str, Path]) -> None:
    failed = {}
    for name in ("off", "ample"):
        rounds = [r for r in metrics(runs[f"{name}, small caps"]) if r["kind"] == "round"]
        failed[name] = [(r["stage"], device) for r in rounds for device in r["failed"]]
        for record in rounds:
            assert all("memory" in reason for reason in record["failed"].values())
            for device, peak in record["peak_memory_mib"].items():
                assert peak <= record["cap_mib"][device]
    assert failed["off"] == failed["ample"]
    assert {stage for stage, _ in failed["off"]} > {0}
