"""Federated methods: a registry of names to classes; a method is one file and one line here."""

from fedfreeze.blocks import BlockedNetwork
from fedfreeze.config import Config
from fedfreeze.methods.base import Method
from fedfreeze.methods.fedavg import FedAvg, full_model_stage
from fedfreeze.methods.smartfreeze import SmartFreeze

__all__ = ["METHODS", "Method", "full_model_stage", "make_method"]

METHODS: dict[str, type[Method]] = {"smartfreeze": SmartFreeze, "fedavg": FedAvg}


def make_method(config: Config, blocked: BlockedNetwork) -> Method:
    """Return the configured method over a network."""
    return METHODS[config.method.name](config, blocked)
