"""What torch's transport waits for: NCCL's work is only asked, by its account, and never waited for. Of fakes: no GPU.

Its collectives between real ranks are in test_every_launcher.py, its losses in test_lost_ranks.py.
"""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.torch_transport import GpuPending, TorchPending, TorchTransport, host_copy


class Work:
    """What NCCL hands out, as far as we use it: `wait` before it is done would wait for ever."""

    def __init__(self, done_after: int | None = 0, error: str | None = None):
        self.left = done_after
        self.error = error
        self.waited: list[timedelta] = []

    def is_completed(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0

    def wait(self, timeout: timedelta) -> None:
        assert self.left is not None, "a wait that has no end"
        assert self.left < 0, "a wait that has no end"
        self.waited.append(timeout)
        if self.error is not None:
            raise RuntimeError(self.error)


def test_a_work_that_never_ends_is_told_in_time() -> None:
    work = Work(done_after=None)
    started = time.monotonic()
    assert GpuPending(work).wait(0.2) is False
    assert 0.2 <= time.monotonic() - started < 2.0
    assert work.waited == []


def test_a_work_that_ends_is_waited_for_once_it_has_ended() -> None:
    work = Work(done_after=5)
    pending = GpuPending(work)
    assert pending.wait(10.0) is True
    assert len(work.waited) == 1


def test_a_work_that_has_failed_raises() -> None:
    with pytest.raises(RuntimeError, match="remote process exited"):
        GpuPending(Work(error="NCCL error: remote process exited")).wait(1.0)


def transport(gpu_group: Any) -> TorchTransport:
    made = object.__new__(TorchTransport)
    made.gpu_group = gpu_group
    made.device = torch.device("cpu")
    return made


def on_gpu(values: list[int]) -> Any:
    """A tensor that says that it lies on a GPU; what is computed with it is computed on the host."""
    held = torch.tensor(values)

    class Elsewhere:
        device = SimpleNamespace(type="cuda")
        is_cuda = False
        shape, dtype = held.shape, held.dtype
        tensor = held

        def copy_(self, other: torch.Tensor) -> None:
            held.copy_(other)

    return Elsewhere()


def test_a_tensor_on_the_gpu_goes_by_nccl_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def all_reduce(tensor: Any, group: Any = None, async_op: bool = False) -> Work:
        assert async_op
        asked.append((tensor, group))
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    tensor = on_gpu([1, 2])
    assert isinstance(transport("nccl").all_reduce(tensor), GpuPending)
    assert asked == [(tensor, "nccl")]
    host = torch.tensor([3])
    assert isinstance(transport("nccl").all_reduce(host), TorchPending)
    assert asked[1] == (host, None)


def test_where_ranks_share_a_gpu_its_tensor_travels_from_the_host_and_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "fedfreeze.comm.torch_transport.host_copy", lambda tensor: torch.empty_like(tensor.tensor).copy_(tensor.tensor)
    )

    class Doubled:
        """Two ranks with the same tensor."""

        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor

        def wait(self, timeout: timedelta) -> None:
            self.tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None, async_op=False: Doubled(tensor))
    tensor = on_gpu([1, 2])
    pending = transport(None).all_reduce(tensor)
    assert tensor.tensor.tolist() == [1, 2]
    assert pending.wait(1.0)
    assert tensor.tensor.tolist() == [2, 4]


def test_a_host_copy_is_a_copy() -> None:
    tensor = torch.arange(6).view(2, 3)
    copy = host_copy(tensor)
    assert torch.equal(copy, tensor)
    copy.zero_()
    assert tensor.sum() == 15


def test_abandoning_does_not_wait_for_a_communicator_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfreeze.comm.torch_transport._ABORT_S", 0.1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    end, begun = threading.Event(), threading.Event()

    def abort() -> None:
        begun.set()
        end.wait(30)

    backend = SimpleNamespace(abort=abort)
    started = time.monotonic()
    try:
        transport(SimpleNamespace(_get_backend=lambda device: backend)).abandon()
        assert begun.is_set()
        assert time.monotonic() - started < 5
    finally:
        end.set()


def test_without_nccl_there_is_nothing_to_abandon() -> None:
    transport(None).abandon()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_one_rank_sums_on_its_gpu_by_nccl(tmp_path: Any) -> None:
    device = torch.device("cuda", 0)
    launch = Launch("nproc", store_file=str(tmp_path / "store"), local_world_size=1)
    found = TorchTransport(launch, device, timeout_s=60, join_s=60)
    try:
        assert found.backend == "nccl"
        tensor = torch.arange(2**40, 2**40 + 4096, device=device)
        assert found.all_reduce(tensor).wait(30)
        assert torch.equal(tensor.cpu(), torch.arange(2**40, 2**40 + 4096))
    finally:
        found.close()
