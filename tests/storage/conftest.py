"""Fixtures of the tests of checkpoints."""

import os
from pathlib import Path

import pytest

from tests.support.checkpoints import open_folder, save


@pytest.fixture
def quick_disk(monkeypatch):
    """Waiting for a real disk shows nothing here; that files are synced, and when, has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of rounds 1 to 3, of which 2 and 3 are kept."""
    path = tmp_path / "checkpoints"
    store, _ = open_folder(path)
    for number in (1, 2, 3):
        save(store, number)
    return path
