"""Participant selectors: a registry of names to classes; a selector is one file and one line here."""

from fedfreeze.config import Config
from fedfreeze.plugins import choose_class, own_code
from fedfreeze.select.base import Selector
from fedfreeze.select.uniform import Uniform

__all__ = ["SELECTORS", "Selector", "make_selector"]

SELECTORS: dict[str, type[Selector]] = {"uniform": Uniform}


def make_selector(config: Config) -> Selector:
    """Return the configured selector, registered or the user's own. Raises ConfigError."""
    key, name = "select.name", config.select.name
    with own_code(key, name):
        return choose_class(key, name, SELECTORS, Selector)(config)
