"""Participant selectors: a registry of names to classes; a selector is one file and one line here."""

from fedfreeze.config.schema import Config
from fedfreeze.plugins import choose_class, own_code
from fedfreeze.select.base import ProbeRequest, Probes, Selector, Situation
from fedfreeze.select.oort import Oort
from fedfreeze.select.power_of_choice import PowerOfChoice
from fedfreeze.select.smartfreeze import SmartFreezeSelector
from fedfreeze.select.tifl import TiFL
from fedfreeze.select.uniform import Uniform

__all__ = ["SELECTORS", "ProbeRequest", "Probes", "Selector", "Situation", "make_selector", "selector_class"]

SELECTORS: dict[str, type[Selector]] = {
    "uniform": Uniform,
    "smartfreeze": SmartFreezeSelector,
    "oort": Oort,
    "tifl": TiFL,
    "power_of_choice": PowerOfChoice,
}


def selector_class(config: Config) -> type[Selector]:
    """Return the class of the configured selector, registered or the user's own. Raises ConfigError."""
    return choose_class("select.name", config.select.name, SELECTORS, Selector)


def make_selector(config: Config) -> Selector:
    """Return the configured selector. Raises ConfigError."""
    with own_code("select.name", config.select.name):
        return selector_class(config)(config)
