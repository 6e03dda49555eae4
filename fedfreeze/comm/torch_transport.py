"""Messages between ranks by torch.distributed: gloo for host tensors, NCCL too where each rank has a GPU of its own."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from fedfreeze.comm.launcher import Launch, need_address
from fedfreeze.errors import RankLostError, one_line

# NCCL's communicator of a lost rank may not let itself be ended: no longer than this is waited for it.
_ABORT_S = 5.0


class TorchTransport:
    """The default process group, and a second one for GPUs."""

    def __init__(self, launch: Launch, device: torch.device, timeout_s: float, join_s: float):
        """Collective: every rank must call this. Find the others and join. Raises RankLostError."""
        self.device = device
        self.host = socket.gethostname()
        self.rank, self.world_size = launch.rank, launch.world_size
        self.join_s = join_s
        try:
            self.store = self._make_store(launch)
            self._await_all()
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                # ours is shorter, and knows whom it waits for
                timeout=timedelta(seconds=timeout_s + 60),
            )
            self.gpu_group = self._make_gpu_group(timeout_s)
        except (RuntimeError, ValueError, OSError) as error:
            raise RankLostError(
                f"rank {self.rank} on {self.host} could not join the {self.world_size} ranks: {one_line(error)[:200]}"
            ) from None
        self.backend = "nccl" if self.gpu_group is not None else "gloo"

    def _make_store(self, launch: Launch) -> dist.Store:
        limit = timedelta(seconds=self.join_s)
        if launch.store_file is not None:
            file_store = dist.FileStore(launch.store_file, self.world_size)
            file_store.set_timeout(limit)
            return file_store
        need_address(launch)
        address, port = launch.master_address or "127.0.0.1", launch.master_port or 0
        serves = self.rank == 0 and not launch.store_served
        try:
            store = dist.TCPStore(address, port, is_master=serves, timeout=limit, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            said = one_line(error)
            why = "is taken by another program" if "EADDRINUSE" in said else f"cannot be used ({said[:120]})"
            raise RankLostError(
                f"rank {self.rank} on {self.host}: {address} port {port}, where the ranks were to meet, {why}; set "
                "MASTER_ADDR and MASTER_PORT to a host and port that all ranks reach"
            ) from None
        # workers that torchrun starts again meet at the same store, where those that died left their addresses
        return dist.PrefixStore(f"attempt{launch.attempt}", store)

    def _await_all(self) -> None:
        """Have rank 0 wait for all, so that it can tell who is missing."""
        if self.store.add(f"count{self.rank}", 1) > 1:
            raise RankLostError(f"rank {self.rank} was started twice (now on {self.host}); start each rank once")
        self.store.set(f"here{self.rank}", str(self.world_size))
        if self.rank:
            self._wait_for(["all"], self.join_s + 30)
            missing = self.store.get("all").decode() if self.store.check(["all"]) else "0"
        else:
            names = [f"here{rank}" for rank in range(self.world_size)]
            self._wait_for(names, self.join_s)
            there = [name for name in names if self.store.check([name])]
            missing = ", ".join(name.removeprefix("here") for name in names if name not in there)
            sizes = {self.store.get(name).decode() for name in there}
            if len(sizes) > 1:
                missing = f"{missing or 'none'} (the others count {' and '.join(sorted(sizes))} ranks)"
            self.store.set("all", missing)
        if missing:
            raise RankLostError(
                f"rank {missing} of {self.world_size} did not join within {self.join_s:.0f} s; see the log of that "
                "rank, and whether as many were started"
            )

    def _wait_for(self, names: list[str], seconds: float) -> None:
        """Wait for keys, or for the time to pass; the store's own waiting would add noise of its own to the log."""
        deadline = time.monotonic() + seconds
        while not self.store.check(names) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _make_gpu_group(self, timeout_s: float) -> Any:
        """Collective: every rank must call this. Make a group for GPUs; None where two ranks share one."""
        on_gpu = self.device.type == "cuda"
        mine = f"{self.host} {torch.cuda.get_device_properties(self.device).uuid}" if on_gpu else "none"
        self.store.set(f"gpu{self.rank}", mine)
        gpus = {self.store.get(f"gpu{rank}").decode() for rank in range(self.world_size)}
        # NCCL refuses two ranks on one GPU; and a rank without one is told of where all can hear it
        if len(gpus) < self.world_size or "none" in gpus or not dist.is_nccl_available():
            return None
        # the lifeline tells who was lost, and we leave with the books closed; NCCL's watchdog would abort before that
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_s + 60))
        # NCCL connects with the first message, in a call that nothing can end: here, where the start is watched over
        first = dist.all_reduce(torch.ones(1, device=self.device), group=group, async_op=True)
        if not GpuPending(first).wait(self.join_s):
            raise RankLostError(
                f"rank {self.rank} on {self.host}: NCCL did not connect the {self.world_size} ranks within "
                f"{self.join_s:.0f} s (comm.join_s); NCCL_DEBUG=INFO tells why"
            )
        return group

    def root_text(self, text: str | None) -> str:
        """Collective: every rank must call this. Return rank 0's text on every rank."""
        if text is not None:
            self.store.set("root text", text)
            return text
        return self.store.get("root text").decode()

    def broadcast(self, tensor: torch.Tensor) -> "TorchPending":
        """Collective: every rank must call this. Begin to overwrite a host tensor with rank 0's."""
        return TorchPending(dist.broadcast(tensor, 0, async_op=True))

    def all_reduce(self, tensor: torch.Tensor) -> "TorchPending | GpuPending":
        """Collective: every rank must call this. Begin to sum a tensor over the ranks, in place.

        One on the GPU goes by NCCL without a copy where each rank has a GPU of its own, else through pinned memory.
        """
        if tensor.device.type == "cpu":
            return TorchPending(dist.all_reduce(tensor, async_op=True))
        if self.gpu_group is not None:
            return GpuPending(dist.all_reduce(tensor, group=self.gpu_group, async_op=True))
        host = host_copy(tensor)
        return TorchPending(dist.all_reduce(host, async_op=True), lambda: tensor.copy_(host))

    def all_gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> "TorchPending":
        """Collective: every rank must call this. Begin to gather host tensors (length) into (world size, length)."""
        return TorchPending(dist.all_gather(list(gathered), tensor, async_op=True))

    def close(self) -> None:
        """Collective: every rank must call this. Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """End NCCL's communicator without the others, so that what is on its way there holds nobody up."""
        if self.gpu_group is None or not dist.is_initialized():
            return
        backend = self.gpu_group._get_backend(self.device)
        ending = Thread(target=getattr(backend, "abort", lambda: None), name="abandon", daemon=True)
        ending.start()
        ending.join(_ABORT_S)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a GPU's tensor in pinned host memory, when what makes it is done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)


class TorchPending:
    """A collective of gloo on its way."""

    def __init__(self, work: Any, finish: Callable[[], Any] | None = None):
        self.work = work
        self.finish = finish

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether it is done. Raises RuntimeError if it has failed."""
        try:
            self.work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not self.work.is_completed():
                return False  # only our waiting has timed out
            self.work.wait()  # raises what made it fail; nothing if it ended just after our waiting
        if self.finish is not None:
            self.finish()
        return True


class GpuPending:
    """A collective of NCCL on its way.

    Its own wait with a time limit has the stream wait for ever, and aborts the communicator when time is up; without
    one it only orders streams, and the copy after it waits in C, where no loss is heard. So the work is only asked.
    """

    def __init__(self, work: Any):
        self.work = work

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether it is done. Raises RuntimeError if it has failed."""
        deadline = time.monotonic() + seconds
        pause = 0.0
        while not self.work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause + 2e-5, 2e-3)
        # at once, as it is done: raises what made it fail, and orders our stream behind it
        self.work.wait(timedelta(seconds=1))
        return True
