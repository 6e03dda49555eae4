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


def put_back(number: int, handler: Any) -> None:
    """Give a signal the handler that it had; none was not ours to set, or was set by other than Python, and stays."""
    if handler is not None:
        set_handler(number, handler)


@contextlib.contextmanager
def handler_kept(number: int) -> Iterator[None]:
    """Put a signal's handler back as it was before, whatever was set inside."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        put_back(number, before)
