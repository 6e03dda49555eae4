"""Loads the deployed network of a finished run."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedfreeze.config.file import load_config
from fedfreeze.errors import DataError, one_line
from fedfreeze.methods import make_method, method_class
from fedfreeze.network.blocks import build_network
from fedfreeze.network.flat import load_named_once
from fedfreeze.plugins import code_digests


def load_model(run_dir: str | Path) -> nn.Module:
    """See fedfreeze.load_model."""
    folder = Path(run_dir)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a run folder: {error}") from None
    if summary.get("status") != "finished":
        raise DataError(f"the run in {folder} is {summary.get('status')}, not finished; run it to the end first")
    config = load_config(str(folder / "config.yaml"))
    channels, height, width = summary["image_shape"]
    fitted = summary.get("fitted", {})
    model = method_class(config).network(config.model, fitted)
    model = replace(model, memory_format="contiguous")
    blocked = build_network(model, (channels, height, width), summary["num_classes"], config.seed)
    network = make_method(config, blocked, fitted).deployed(summary["deployed_stage"])
    known, now = summary.get("own_code"), code_digests([config.model.factory, config.method.name])
    if known is not None and any(known.get(module) != digest for module, digest in now.items()):
        warnings.warn(f"your own code has changed since {folder} was run (summary.json: own_code)", stacklevel=3)
    try:
        load_named_once(network, load_file(folder / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{folder / 'model.safetensors'} is not the network of this run: {one_line(error)[:160]}"
        ) from None
    network.normalisation = summary["normalisation"]
    network.class_names = summary.get("class_names")
    return network.eval()
