"""Participant selectors: a registry of names to classes; a selector is one file and one line here."""

from fedfreeze.config import Config
from fedfreeze.select.base import Selector
from fedfreeze.select.uniform import Uniform

__all__ = ["SELECTORS", "Selector", "make_selector"]

SELECTORS: dict[str, type[Selector]] = {"uniform": Uniform}


def make_selector(config: Config) -> Selector:
    """Return the configured selector."""
    return SELECTORS[config.select.name](config)
