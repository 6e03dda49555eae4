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
from fedfreeze.data.batches import drawn_in_round, training_batches
from fedfreeze.data.store import Data, Split
from fedfreeze.device.features import FrozenFeatures, why_not_kept
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import Stage
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


def config_of(
    augment: str = "flip",
    budget_mib: float = 100.0,
    features: bool = True,
    views: int | None = None,
    folder: Path | None = None,
    **model: object,
) -> Config:
    return make_config(
        {
            "data": {"augment": augment, "views": views},
            "model": {"width": 4, **model},
            "train": {"batch_size": 8, "local_epochs": 2},
            "cache": {"features": features, "budget_mib": budget_mib, "dir": None if folder is None else str(folder)},
        }
    )


def stage_of(config: Config, index: int = 1) -> Stage:
    return make_method(config, build_network(config.model, SHAPE, 10, 0)).enter_stage(index, CPU)


def features_of(config: Config, rows: np.ndarray | None = None, index: int = 1) -> FrozenFeatures:
    parts = [np.arange(SAMPLES) if rows is None else rows]
    return FrozenFeatures(stage_of(config, index), data(), parts, config, CPU)


@pytest.mark.parametrize(("augment", "views"), [("none", None), ("flip", None), ("flip", 3), ("crop_flip", 2)])
def test_batches_are_those_of_training_without(augment: str, views: int | None) -> None:
    config = config_of(augment, views=views)
    kept = features_of(config)
    drawn = drawn_in_round(config, data(), SAMPLES, stage=1, round_number=3, device=0)
    plain = training_batches(data(), np.arange(SAMPLES), drawn, CPU)
    count = 0
    for ours, (images, labels) in zip(kept.batches(0, 3), plain, strict=True):
        assert torch.equal(ours.make_images(), images)
        assert torch.equal(ours.labels, labels)
        torch.testing.assert_close(ours.features(), kept.stage.frozen_forward(images), rtol=1e-4, atol=1e-5)
        count += 1
    assert count == 6  # 21 samples in batches of 8, twice


@given(st.permutations(range(SAMPLES)), st.integers(1, SAMPLES), st.permutations(range(4)), st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_samples_features_have_the_same_bits_in_whatever_batch_and_round(
    order: list[int], count: int, rounds: list[int], keeps: bool
) -> None:
    """And whether they are kept, and whichever rounds came before: calculated are always the same samples together."""
    rows = np.array(order[:count])
    found: dict[tuple[int, int], torch.Tensor] = {}
    for each, config in ((range(4), config_of("flip")), (rounds, config_of("flip", budget_mib=1.0 * keeps))):
        kept = features_of(config, rows)
        for number in each:
            for batch in kept.batches(0, number):
                drawn = batch.drawn
                for view, chosen, features in zip(drawn.views, drawn.chosen, batch.features(), strict=True):
                    key = int(view), int(rows[int(chosen)])
                    assert torch.equal(found.setdefault(key, features), features)


def test_a_small_device_calculates_no_more_than_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = features_of(config_of("none"), np.arange(3))
    asked = []
    forward = kept.stage.frozen_forward
    monkeypatch.setattr(kept.stage, "frozen_forward", lambda images: asked.append(len(images)) or forward(images))
    list(kept.batches(0, 1))
    assert asked == [3]


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_kept_features_lie_in_memory_as_the_prefix_puts_them_out(memory_format: str) -> None:
    config = config_of("none", memory_format=memory_format, width=16)
    for index in (1, 2):
        kept = features_of(config, index=index)
        batch = next(kept.batches(0, 1))
        direct = kept.stage.frozen_forward(batch.make_images())
        assert batch.features().stride() == direct.stride()
        assert torch.equal(batch.counted_features(), batch.features())
        assert batch.counted_features().stride() == direct.stride()


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("augment", "views"), [("flip", None), ("crop_flip", 3)])
def test_a_budget_is_held_and_what_is_over_it_is_calculated_anew_or_on_disk(
    augment: str, views: int | None, disk: bool, tmp_path: Path
) -> None:
    one = SAMPLES * 4 * 8 * 8 * 4  # of a view: samples x channels x pixels x bytes
    folder = tmp_path if disk else None
    config = config_of(augment, budget_mib=(one + 100) / 2**20, views=views, folder=folder)
    parts = [np.arange(SAMPLES), np.arange(SAMPLES)[::-1].copy()]
    kept = FrozenFeatures(stage_of(config), data(), parts, config, CPU)
    enough = config_of(augment, views=views)
    ample = FrozenFeatures(stage_of(enough), data(), parts, enough, CPU)
    for number in range(8):
        for device in (0, 1):
            for ours, theirs in zip(kept.batches(device, number), ample.batches(device, number), strict=True):
                assert torch.equal(ours.features(), theirs.features())
                assert ours.features().stride() == theirs.features().stride()
    assert kept.store.used_bytes == one <= kept.store.budget_bytes
    assert ample.store.used_bytes == 2 * (views or 2) * one
    assert (kept.store.used_disk_bytes > 0) == disk
    assert bool(kept.store.refused) == (not disk)
    for _ in range(2):
        assert torch.equal(kept.of_test(np.arange(16)), ample.of_test(np.arange(16)))
    assert kept.store.used_bytes == one
    assert list(tmp_path.iterdir()) == []  # a file without a name


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
    assert (why_not_kept(stage, config, SHAPE, CPU) is None) == kept
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


def test_what_cannot_be_kept_says_why() -> None:
    config = config_of()
    assert why_not_kept(stage_of(config), config, SHAPE, CPU) is None
    assert why_not_kept(stage_of(config, 0), config, SHAPE, CPU) == "nothing is frozen"
    endless = config_of("crop_flip")
    assert "no end of views" in str(why_not_kept(stage_of(endless), endless, SHAPE, CPU))
    block = nn.Sequential(nn.Conv2d(3, 3, 3))
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 10))
    assert why_not_kept(Stage(1, [nn.Identity()], block, head, CPU), config, SHAPE, CPU) is None
    assert "random numbers" in str(why_not_kept(Stage(1, [Noise()], block, head, CPU), config, SHAPE, CPU))
    own = OwnLoss(1, [nn.Identity()], block, head, CPU)
    assert why_not_kept(own, config, SHAPE, CPU) == "OwnLoss has a forward or a loss of its own"


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
    "disk": (["--cache.budget_mib=0.05", "--cache.dir=."], 2, 3),
    "disk too small": (["--cache.budget_mib=0.05", "--cache.dir=.", "--cache.disk_mib=0.1"], 1, None),
    "stored": (["--train.prefix=stored"], 1, None),
    "stored, nothing kept": (["--train.prefix=stored", "--cache.features=false"], 2, 4),
    "stored, small caps": (["--train.prefix=stored", *SMALL_CAPS], 2, None),
    "counted views": (["--data.augment=crop_flip", "--data.views=2"], 2, 5),
    "counted views, off": (["--data.augment=crop_flip", "--data.views=2", "--cache.features=false"], 1, None),
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
    codes = [json.loads(line)["codes"] for line in done.stdout.splitlines()]
    assert codes == [[0] if kill is None else [76, 0] for _, _, kill in RUNS.values()], done.stderr[-3000:]
    return paths


@pytest.mark.parametrize(
    "name", ["exceeded", "zero", "disk", "disk too small", "two ranks, killed and resumed", "three ranks"]
)
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


@pytest.mark.parametrize("names", [("ample", "off"), ("counted views", "counted views, off")], ids="/".join)
def test_devices_are_charged_as_if_nothing_were_kept(runs: dict[str, Path], names: tuple[str, str]) -> None:
    """Peaks, time, traffic and operations are those of devices that calculate their prefix; results by rounding."""
    kept, plain = ([r for r in metrics(runs[name]) if r["kind"] == "round"] for name in names)
    assert len(kept) == len(plain) == 6
    for ours, theirs in zip(kept, plain, strict=True):
        for key in ("selected", "peak_memory_mib", "tensor_peak_mib", "emulated_s", "bytes_up", "bytes_down", "flops"):
            assert ours[key] == theirs[key], key
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)


def test_devices_that_store_features_train_the_same_with_less_memory_and_work(runs: dict[str, Path]) -> None:
    stored, plain = ([r for r in metrics(runs[name]) if r["kind"] == "round"] for name in ("stored", "ample"))
    assert sha256(runs["stored"]) == sha256(runs["ample"])
    seen: set[tuple[int, int]] = set()
    for ours, theirs in zip(stored, plain, strict=True):
        new = {(ours["stage"], device) for device in ours["selected"]} - seen
        seen |= new
        if ours["stage"] == 0:
            assert ours["flops"] == theirs["flops"]
            assert ours["peak_memory_mib"] == theirs["peak_memory_mib"]
        elif not new:
            assert ours["flops"] < theirs["flops"]
            assert ours["emulated_s"] < theirs["emulated_s"]
        elif len(new) == len(ours["selected"]):  # two views are calculated, of which one trains
            assert ours["flops"] > theirs["flops"]
    stages = ([r for r in metrics(runs[name]) if r["kind"] == "stage"] for name in ("stored", "ample"))
    for ours, theirs in zip(*stages, strict=True):
        assert ours["peak_memory_mib"] == ours["memory_mib"]
        assert ours["memory_mib"] < theirs["memory_mib"] or ours["stage"] == 0


def test_devices_that_store_features_give_the_same_whatever_the_emulation_keeps(runs: dict[str, Path]) -> None:
    assert sha256(runs["stored, nothing kept"]) == sha256(runs["stored"])
    assert without_wall_time(metrics(runs["stored, nothing kept"])) == without_wall_time(metrics(runs["stored"]))


def test_devices_that_store_features_are_held_to_their_caps(runs: dict[str, Path]) -> None:
    rounds = [r for r in metrics(runs["stored, small caps"]) if r["kind"] == "round"]
    for record in rounds:
        assert all("memory" in reason for reason in record["failed"].values())
        for device, peak in record["peak_memory_mib"].items():
            assert peak <= record["cap_mib"][device]
    before = [r for r in metrics(runs["ample, small caps"]) if r["kind"] == "round"]
    failed = [sum(len(record["failed"]) for record in of if record["stage"]) for of in (rounds, before)]
    assert 0 < failed[0] <= failed[1]


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
