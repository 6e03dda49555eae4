"""Fixtures of the tests of checkpoints and run folders."""

import os
from pathlib import Path

import pytest

from fedfreeze.storage.run_folder import RunFolder
from tests.support.checkpoints import open_folder, save
from tests.support.locked import config


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


@pytest.fixture
def path(tmp_path) -> Path:
    """Where a run folder will be."""
    return tmp_path / "run"


@pytest.fixture
def begun(path) -> Path:
    """A folder in which a run has begun and been left."""
    folder = RunFolder(path)
    folder.open(config())
    folder.claim(config())
    folder.close()
    return path
