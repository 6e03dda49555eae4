"""What several test files share beside fixtures."""

import numpy as np


def assert_one_line(error: BaseException, *parts: object) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert str(part) in str(error)


def pictures(count: int, *, height: int = 6, width: int = 5, colour: bool = False, seed: int = 0) -> list[np.ndarray]:
    shape = (count, height, width, 3) if colour else (count, height, width)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
