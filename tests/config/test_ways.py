"""Ways to take a step: what `train.fit` may say, and passes over a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.config.file import make_config
from fedfreeze.config.ways import WHOLE, Way, way_of, ways_of
from fedfreeze.errors import ConfigError
from fedfreeze.methods import make_method
from fedfreeze.network.blocks import build_network
from fedfreeze.network.stage import LocalTrainer


def test_lists_of_ways() -> None:
    auto = ["whole", "recompute", "recompute2", "recompute3"]
    assert [way.name for way in ways_of("auto")] == auto
    assert [way.name for way in ways_of("auto, micro(4)")] == [*auto, "micro(4)"]
    assert ways_of("micro(12)") == (Way("micro(12)", passes=12),)
    assert ways_of("recompute2+micro(2)") == (Way("recompute2+micro(2)", 2, 2),)
    assert [way_of(way.name) for way in ways_of("recompute,whole")] == [Way("recompute", 1), WHOLE]


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ("", "''"),
        ("fast", "'fast'"),
        ("whole,", "''"),
        ("whole, whole", "'whole'"),
        ("auto, recompute", "'recompute'"),
        ("micro", "'micro'"),
        ("micro(0)", "'micro(0)'"),
        ("micro(-1)", "'micro(-1)'"),
        ("micro(1.5)", "'micro(1.5)'"),
        ("micro(9999999)", "'micro(9999999)'"),
        ("whole+micro(2)", "'whole+micro(2)'"),
        ("micro(2)+recompute", "'micro(2)+recompute'"),
        ("recompute+", "'recompute+'"),
        ("recompute+whole", "'recompute+whole'"),
        ("auto, recompute3", "'recompute3'"),
    ],
)
def test_what_is_no_list_of_ways_is_one_line(fit: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"train": {"fit": fit}})
    assert str(caught.value).startswith(f"train.fit: {fit!r} names no way, or one twice, by {said}")
    assert "\n" not in str(caught.value)


def test_more_passes_than_samples_are_refused() -> None:
    make_config({"train": {"fit": "micro(32)", "batch_size": 32}})
    with pytest.raises(ConfigError, match=r"micro\(33\) takes more passes than train\.batch_size \(32\) has samples"):
        make_config({"train": {"fit": "whole, micro(33)", "batch_size": 32}})


def test_what_was_a_method_is_a_way() -> None:
    with pytest.raises(ConfigError, match=r"fedavg_checkpointing is now fedavg with train\.fit=recompute"):
        make_config({"method": {"name": "fedavg_checkpointing"}})


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_passes_share_a_batch_evenly(samples: int, batch_size: int, passes: int) -> None:
    samples, passes = min(samples, batch_size), min(passes, batch_size)
    sizes = Way("micro", passes=passes).sizes(samples, batch_size)
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= -(-batch_size // passes)
    assert min(sizes) >= 1
    assert WHOLE.sizes(samples, batch_size) == [samples]


@pytest.mark.parametrize("method", ["smartfreeze", "fedavg"])
def test_passes_give_the_step_of_a_whole_batch_up_to_rounding(method: str) -> None:
    """Where nothing normalises over the batch."""
    images, labels = torch.randn(11, 3, 16, 16), torch.randint(0, 10, (11,))
    after = []
    for fit in ("whole", "micro(3)"):
        config = make_config(
            {"model": {"width": 8, "norm": "group"}, "method": {"name": method}, "train": {"batch_size": 12}}
        )
        stage = make_method(config, build_network(config.model, (3, 16, 16), 10, 0)).enter_stage(0, torch.device("cpu"))
        trainer = LocalTrainer(stage, config.train)
        trainer.go(way_of(fit))
        after.append((trainer.step(images, labels), stage.flat.buffer.clone()))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(after[0][1], after[1][1])
