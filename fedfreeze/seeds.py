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
    """Seed torch's global generators inside, as module initialisation and dropout draw from them.

    That of the CPU is put back after.
    """
    state = torch.get_rng_state()
    number = derive_seed(seed, purpose, *key)
    # not torch.manual_seed: for each kind of device that is not in use it notes who called, which takes a millisecond
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    try:
        yield
    finally:
        torch.set_rng_state(state)
