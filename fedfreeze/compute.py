"""On what, and with how many threads, torch computes in this process."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedfreeze.errors import UnavailableError


def device_kind(wanted: str) -> str:
    """Return cpu or cuda for `train.device`. Raises UnavailableError if CUDA is asked for and missing."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UnavailableError("train.device is cuda, but torch finds no CUDA device here; use train.device=cpu")
    return "cuda"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute on this many CPU threads inside; put back what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have glibc keep what torch frees on the CPU, for the next step to use.

    By default each step gives its activations back to the kernel and gets them again page by page: 2,500 page faults a
    step of ResNet-10 (width 16, batch 32), an eighth of the system's time. The process then stays as large as its peak.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    with contextlib.suppress(OSError, AttributeError):  # another C library: only slower
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Return where this rank computes. Raises UnavailableError if CUDA is asked for and missing.

    The index counts the GPUs that this process sees: its own alone (one GPU a task: index 0), or all of the host's.
    """
    if device_kind(wanted) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # a peak must not depend on which algorithm was timed fastest, nor a result on atomics
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return device
