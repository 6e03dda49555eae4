"""Handlers of signals, which only the main thread of a process may set: in others it goes without them."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


def set_handler(number: int, handler: Any) -> Any:
    """Have a signal handled so, and return the handler before; None, with nothing done, where that may not be set.

    A notebook's or a tuner's thread is no main thread, and a sub-interpreter has none.
    """
    with contextlib.suppress(ValueError):
        return signal.signal(number, handler)
    return None


@contextlib.contextmanager
def handler_kept(number: int) -> Iterator[None]:
    """Put a signal's handler back as it was before, whatever was set inside."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None:  # none: it was set by other than Python, and can only stay
            set_handler(number, before)
