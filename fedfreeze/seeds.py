"""Random generators keyed by what they are for, so that no draw depends on ranks, order or wall time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed that depends on the run's seed, the purpose and the key (round, device, ...) only. [ours]"""
    text = json.dumps([seed, purpose, *key])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return a numpy generator of its own for one purpose."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, purpose, *key)))


def torch_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """Return a CPU generator of its own for one purpose; the draws are the same whatever device trains."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *key))


@contextmanager
def global_seed(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside, as module initialisation and dropout draw from it; restore it after."""
    state = torch.get_rng_state()
    torch.manual_seed(derive_seed(seed, purpose, *key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
