"""How many test samples the global network gets right: the server's work, shared among the ranks."""

from collections.abc import Callable

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.data.batches import evaluation_batch
from fedfreeze.data.store import Data
from fedfreeze.device.features import FrozenFeatures
from fedfreeze.network.stage import Stage
from fedfreeze.seeds import numpy_generator


def evaluated_rows(config: Config, test_samples: int, *, sampled: bool) -> np.ndarray:
    """Return which test samples an evaluation looks at, ascending: all, or the `eval.samples` that the seed draws."""
    wanted = config.eval.samples
    if not sampled or wanted is None or wanted >= test_samples:
        return np.arange(test_samples)
    return np.sort(numpy_generator(config.seed, "evaluation").choice(test_samples, wanted, replace=False))


def count_correct(
    stage: Stage,
    data: Data,
    rows: np.ndarray,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    features: FrozenFeatures | None,
    check: Callable[[], None],
) -> int:
    """Return how many of some test samples in this rank's batches a stage gets right.

    Batches are cut the same way for any number of ranks, so their numbers do not depend on it. It runs outside the
    caps. With `features` the frozen prefix has run once a stage, if they were kept. `check` is called between batches.
    """
    stage.eval()
    device = stage.flat.buffer.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for number in range(rank, -(-len(rows) // batch_size), world_size):
            check()
            chosen = rows[number * batch_size : (number + 1) * batch_size]
            if features is None:
                images, labels = evaluation_batch(data, data.test, chosen, device)
                logits = stage(images)
            else:
                labels = torch.from_numpy(data.test.labels[chosen]).to(device)
                logits = stage.behind(features.of_test(chosen))
            correct += (logits.argmax(1) == labels).sum()
    return int(correct)
