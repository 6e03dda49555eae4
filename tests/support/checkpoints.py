"""Checkpoints with known content, and ways to spoil them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedfreeze.storage.checkpoint import Checkpoint, CheckpointStore

WINDOW = 2  # a checkpoint of round n refers to the updates of rounds n - 1 and n


def open_folder(folder: Path, keep: int = 2) -> tuple[CheckpointStore, list[str]]:
    notices: list[str] = []
    return CheckpointStore(folder, keep, notices.append), notices


def tensors_of(number: int, salt: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * salt + number)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "norm.num_batches_tracked": torch.tensor(number),
        "transposed": torch.randn(5, 2, generator=generator).T,
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
    }


def update_of(number: int, salt: int = 0) -> np.ndarray:
    return np.random.default_rng(1000 * salt + number).standard_normal(20).astype(np.float32)


def state_of(number: int, salt: int = 0) -> dict[str, Any]:
    return {"round": number, "salt": salt, "loss": 0.1 + number, "stages": [None, "é", {"a": True}]}


def save(store: CheckpointStore, number: int, salt: int = 0) -> None:
    rounds = range(max(1, number - WINDOW + 1), number + 1)
    updates = [(n, update_of(n, salt if n == number else 0)) for n in rounds]
    store.save(number, tensors_of(number, salt), state_of(number, salt), updates)


def assert_is(found: Checkpoint | None, number: int, salt: int = 0) -> None:
    assert found is not None
    assert found.state == state_of(number, salt)
    wanted = tensors_of(number, salt)
    assert set(found.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert [n for n, _ in found.updates] == list(range(max(1, number - WINDOW + 1), number + 1))
    for n, update in found.updates:
        assert update.dtype == np.float32
        np.testing.assert_array_equal(update, update_of(n, salt if n == number else 0))


def rounds_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "updates")


def rewrite_content(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json and make its digest right again, as another program would have written it."""
    path = folder / "state.json"
    content = json.loads(json.loads(path.read_text())["content"])
    change(content)
    text = json.dumps(content)
    path.write_text(json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "content": text}))


def flip_byte(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut_weights(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 100)


def no_state(path: Path) -> None:
    (path / "state.json").unlink()
