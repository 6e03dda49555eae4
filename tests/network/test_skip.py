"""Skip connections to the head, against values worked out by hand and torch's own slicing."""

import pytest
import torch
from torch import nn

from fedfreeze.errors import ConfigError
from fedfreeze.network.skip import Skip, skip_behind
from tests.support.checks import checked_line


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def test_pixels_by_a_stride_and_zeros_on_both_sides_of_the_channels() -> None:
    """As in a residual network without weights in its shortcuts."""
    x = numbered(2, 2, 8, 8)
    found = Skip((2, 8, 8), (6, 4, 4))(x)
    assert torch.equal(found, nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    # an odd number of missing channels: the last side has one more
    assert torch.equal(Skip((2, 8, 8), (5, 4, 4))(x)[:, 1:3], x[:, :, ::2, ::2])


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        ((1, 7, 7), (1, 4, 4), [0, 2, 4, 6]),
        ((1, 7, 7), (1, 5, 5), [0, 1, 2, 4, 5]),  # no stride leads from 7 to 5
        ((1, 2, 2), (1, 4, 4), [0, 0, 1, 1]),
    ],
)
def test_sizes_that_no_even_stride_gives(before: tuple[int, ...], after: tuple[int, ...], rows: list[int]) -> None:
    x = numbered(1, *before)
    assert torch.equal(Skip(before, after)(x), x[:, :, rows][:, :, :, rows])


def test_too_many_channels_are_left_out_at_the_end() -> None:
    x = numbered(2, 4, 3, 3)
    assert torch.equal(Skip((4, 3, 3), (2, 3, 3))(x), x[:, :2])


def test_images_become_features_and_tokens() -> None:
    x = numbered(2, 2, 2, 2)
    features = Skip((2, 2, 2), (4,))(x)
    assert features[0].tolist() == [0, 2.5, 6.5, 0]
    tokens = Skip((2, 2, 2), (2, 4))(x)
    assert tokens[0].tolist() == [[0, 1, 5, 0], [0, 3, 7, 0]]
    x = numbered(1, 4, 2)
    assert Skip((4, 2), (2, 2))(x)[0].tolist() == [[1, 2], [5, 6]]
    assert Skip((4, 2), (3,))(x)[0].tolist() == [4, 5, 0]


def test_nothing_where_the_shape_is_the_heads() -> None:
    assert len(skip_behind((4, 8, 8), (4, 8, 8))) == 0
    assert len(skip_behind((4, 8, 8), (8, 4, 4))) == 1
    assert not list(skip_behind((4, 8, 8), (8, 4, 4)).parameters())


def test_features_do_not_become_images() -> None:
    with pytest.raises(ConfigError) as caught:
        skip_behind((12,), (3, 2, 2))
    assert "puts out 12 to a head that takes 3x2x2; begin no block there" in checked_line(caught.value)
