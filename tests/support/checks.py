"""What several test files share beside fixtures."""

from pathlib import Path

import numpy as np

from fedfreeze.errors import ConfigError, ExitCode

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout."""


def assert_one_line(error: BaseException, *parts: object) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert str(part) in str(error)


def pictures(count: int, *, height: int = 6, width: int = 5, colour: bool = False, seed: int = 0) -> list[np.ndarray]:
    shape = (count, height, width, 3) if colour else (count, height, width)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def checked_line(error: ConfigError) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert error.exit_code == ExitCode.BAD_CONFIG == 64
    return message
