"""On what, and with how many threads, torch computes in this process."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from fedfreeze.errors import ConfigError, UnavailableError, one_line

# Buffers of cuBLAS, as KiB and how many: one of the two with which it is deterministic, and 32 MiB on every card.
CUBLAS_WORKSPACE = ":4096:8"

_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def device_kind(wanted: str) -> str:
    """Return cpu or cuda for `train.device`.

    Raises UnavailableError if CUDA is asked for and missing, or if this process can never use the GPU that is here.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda._is_in_bad_fork() and torch.cuda.device_count():
        raise UnavailableError(
            "this process was forked from one that has used CUDA, so it cannot; start fedfreeze by a command of its "
            "own, or use train.device=cpu"
        )
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "auto":
        return "cpu"
    raise UnavailableError("train.device is cuda, but torch finds no CUDA device here; use train.device=cpu")


def check_can_fork(wanted: str, ranks: int) -> None:
    """Raise ConfigError where ranks forked from this process could not use the GPU, as this process has begun to."""
    if wanted != "cpu" and torch.cuda.is_initialized():
        raise ConfigError(
            f"--nproc {ranks} in a process that has used CUDA, which forked ranks cannot use then; start fedfreeze by "
            "a command of its own, leave --nproc out, or use train.device=cpu"
        )


@contextmanager
def cuda_not_started() -> Iterator[None]:
    """Have whoever asks inside whether there is a GPU be answered without CUDA being started, as ranks are forked."""
    ours = _ASK_NVML not in os.environ
    if ours:
        os.environ[_ASK_NVML] = "1"
    try:
        yield
    finally:
        if ours:
            os.environ.pop(_ASK_NVML, None)


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
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE  # read when cuBLAS starts
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UnavailableError(
            f"torch finds a GPU but cannot use it ({one_line(error)[:160]}); see nvidia-smi, or use train.device=cpu"
        ) from None
    compute_deterministically()
    return device


def compute_deterministically() -> None:
    """Have the GPU give the same bits again; an operation that cannot raises RuntimeError.

    What was timed fastest must not decide, as peaks of memory depend on the algorithm.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # not torch.use_deterministic_algorithms, which imports torch's compiler: two seconds of every start
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    # it would be a kernel more for every tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
