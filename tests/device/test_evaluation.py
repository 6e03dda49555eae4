"""Evaluation: the same samples and the same count on any number of ranks; a sample of them between the full ones."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedfreeze.config.file import make_config
from fedfreeze.data.store import Data, Split
from fedfreeze.device.evaluation import count_correct, evaluated_rows
from fedfreeze.network.stage import Stage


def data(samples: int) -> Data:
    """Images of one pixel whose place of the brightest says the label; every third label is wrong."""
    labels = np.arange(samples) % 4
    images = np.zeros((samples, 1, 2, 2), dtype=np.uint8)
    images.reshape(samples, 4)[np.arange(samples), labels] = 255
    labels[::3] = (labels[::3] + 1) % 4
    split = Split(images, labels)
    return Data(split, split, 4, (0.5,), (0.25,), None)


def reading() -> Stage:
    """A stage that reads the label off."""
    classifier = nn.Linear(4, 4)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(4))
        classifier.bias.zero_()
    return Stage(0, [], nn.Flatten(), classifier, torch.device("cpu"))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_ranks_count_each_sample_once(samples: int, batch_size: int, world_size: int) -> None:
    rows = np.arange(samples)
    counts = [
        count_correct(
            reading(), data(samples), rows, batch_size, rank=rank, world_size=world_size, features=None, check=list
        )
        for rank in range(world_size)
    ]
    assert sum(counts) == samples - len(range(0, samples, 3))


def test_the_sample_is_drawn_once_by_the_seed() -> None:
    config = make_config({"eval": {"samples": 30}})
    rows = evaluated_rows(config, 100, sampled=True)
    assert len(set(rows.tolist())) == 30
    assert rows.tolist() == sorted(rows.tolist())
    assert np.array_equal(rows, evaluated_rows(config, 100, sampled=True))
    other = make_config({"eval": {"samples": 30}, "seed": 1})
    assert not np.array_equal(rows, evaluated_rows(other, 100, sampled=True))
    assert len(evaluated_rows(config, 100, sampled=False)) == 100
    assert len(evaluated_rows(config, 20, sampled=True)) == 20  # no more than there are
