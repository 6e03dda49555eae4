"""Signatures of devices whose labels are known, as devices would tell them."""

import math

import numpy as np
import torch

from fedfreeze.device.probe import make_sketch


def signatures_of(
    mixes: np.ndarray, samples: np.ndarray, *, features: int = 64, noise: float = 1.0, seed: int = 0, size: int = 512
) -> np.ndarray:
    """Return what fedfreeze.device.probe makes of devices whose labels are drawn from `mixes` (devices, classes).

    Features are rectified and so share a large mean; the classifier is a little trained and biased.
    """
    generator = np.random.default_rng(seed)
    classes = mixes.shape[1]
    means = np.abs(generator.normal(size=(classes, features)))
    weights = generator.normal(size=(classes, features)) * 0.5 / math.sqrt(features)
    bias = 0.3 * generator.normal(size=classes)
    sketch = make_sketch(classes * (features + 1), size, seed)
    rows = []
    for mix, count in zip(mixes, samples, strict=True):
        labels = generator.choice(classes, size=count, p=mix)
        inputs = np.maximum(0, means[labels] + noise * generator.normal(size=(count, features)))
        error = np.exp(inputs @ weights.T + bias)
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(count), labels] -= 1
        gradient = np.concatenate([error.T @ inputs, error.sum(axis=0)[:, None]], axis=1) / count
        flat = torch.from_numpy(gradient.astype(np.float32).flatten())
        rows.append(flat.numpy() if sketch is None else sketch(flat).numpy())
    return np.stack(rows)


def planted(devices: int, groups: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Return signatures of devices in groups with disjoint labels, and the groups."""
    classes = max(10, groups)
    each = classes // groups
    group = np.arange(devices) % groups
    mixes = np.zeros((devices, classes))
    for device, number in enumerate(group):
        mixes[device, number * each : (number + 1) * each] = 1 / each
    samples = np.random.default_rng(1).integers(20, 80, devices)
    return signatures_of(mixes, samples, **options), group
