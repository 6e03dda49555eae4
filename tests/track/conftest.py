"""Fixtures of the tests of tracking."""

import os

import pytest

from tests.support.wandb_runs import NOWHERE, TOKEN


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A home, a place to stand and an environment in which whatever wandb leaves behind is found."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb-config"))
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("MY_SECRET_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path / "here")
