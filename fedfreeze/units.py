"""Units, and how a person reads them."""

MIB = 2**20
"""Bytes of a MiB."""

FLOAT_BYTES = 4
"""Bytes of a float32, in which devices send and hold weights."""


def duration(seconds: float) -> str:
    """Return emulated seconds as a person would say them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
