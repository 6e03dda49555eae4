"""Floating-point operations, against torch's own counter and by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedfreeze.config.file import make_config
from fedfreeze.device.flops import count_flops
from fedfreeze.network.blocks import build_network


def by_torch(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_as_torch_counts(name: str) -> None:
    config = make_config({"model": {"name": name, "width": 4}})
    network = build_network(config.model, (3, 16, 16), 10, 0).network
    images = torch.randn(4, 3, 16, 16)

    def step() -> None:
        network(images).sum().backward()

    counted = count_flops(step)
    assert counted == by_torch(step) > 0
    network.eval()
    with torch.no_grad():
        assert count_flops(lambda: network(images)) == by_torch(lambda: network(images)) < counted


def test_what_is_made_of_other_operations() -> None:
    """In inference mode a linear layer, a convolution and a product of any shapes come whole."""
    linear, convolution = nn.Linear(5, 7), nn.Conv1d(3, 4, 3)
    x, y, pixels = torch.randn(2, 3, 5), torch.randn(2, 5, 6), torch.randn(2, 3, 10)
    with torch.inference_mode():
        assert count_flops(lambda: linear(x)) == 2 * 2 * 3 * 5 * 7
        assert count_flops(lambda: x @ y) == 2 * 2 * 3 * 5 * 6
        assert count_flops(lambda: convolution(pixels)) == 2 * 2 * 8 * 4 * 3 * 3
    assert count_flops(lambda: x + 1) == 0


def test_recurrent_layers_and_errors() -> None:
    layer = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    assert count_flops(lambda: layer(x)) == by_torch(lambda: layer(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_flops(lambda: x[0] @ x[0])


def test_shapes_that_are_asked_for_are_no_work() -> None:
    weight = torch.empty(4, 3, 3, 3, device="meta")
    assert count_flops(lambda: torch.nn.functional.conv2d(torch.empty(2, 3, 8, 8, device="meta"), weight)) == 0
