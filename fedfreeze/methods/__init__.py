"""Federated methods: a registry of names to classes; a method is one file and one line here."""

from typing import Any

from fedfreeze.config.schema import Config
from fedfreeze.methods.allsmall import AllSmall
from fedfreeze.methods.base import Method
from fedfreeze.methods.depthfl import DepthFL
from fedfreeze.methods.exclusivefl import ExclusiveFL
from fedfreeze.methods.fedavg import FedAvg, full_model_stage
from fedfreeze.methods.fedepth import FeDepth
from fedfreeze.methods.fedrolex import FedRolex
from fedfreeze.methods.heterofl import HeteroFL
from fedfreeze.methods.progfed import ProgFed, ProgFedLayerwise
from fedfreeze.methods.smartfreeze import SmartFreeze
from fedfreeze.network.blocks import BlockedNetwork
from fedfreeze.plugins import choose_class, own_code

__all__ = ["METHODS", "Method", "full_model_stage", "make_method", "method_class"]

METHODS: dict[str, type[Method]] = {
    "smartfreeze": SmartFreeze,
    "fedavg": FedAvg,
    "exclusivefl": ExclusiveFL,
    "allsmall": AllSmall,
    "heterofl": HeteroFL,
    "fedrolex": FedRolex,
    "depthfl": DepthFL,
    "fedepth": FeDepth,
    "progfed": ProgFed,
    "progfed_layerwise": ProgFedLayerwise,
}


def method_class(config: Config) -> type[Method]:
    """Return the class of the configured method, registered or the user's own. Raises ConfigError."""
    return choose_class("method.name", config.method.name, METHODS, Method)


def make_method(config: Config, blocked: BlockedNetwork, fitted: dict[str, Any] | None = None) -> Method:
    """Return the configured method over its network; `fitted` is what Method.fit found. Raises ConfigError."""
    with own_code("method.name", config.method.name):
        method = method_class(config)(config, blocked)
    method.fitted = fitted or {}
    return method
