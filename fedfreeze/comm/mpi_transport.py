"""Messages between ranks by mpi4py, on host tensors without copies. mpi4py is imported only where it is asked for."""

import importlib
import importlib.util
import os
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.torch_transport import host_copy
from fedfreeze.errors import ConfigError, UnavailableError, one_line

# From so many elements on, the sum goes along a ring.
_RING_ELEMENTS = 4096

# How long a rank keeps its core while it waits for the others, who are there or about to come: on a busy machine, who
# gives it away has it back only after milliseconds.
_SPIN_S = 5e-4


def load_mpi() -> Any:
    """Import mpi4py.MPI, which starts MPI. Raises UnavailableError where it or an MPI library is missing."""
    try:
        mpi4py = importlib.import_module("mpi4py")
        mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI
        mpi4py.rc.finalize = False  # after a loss, MPI_Finalize would wait for the dead
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        missing = f"mpi4py cannot load an MPI library ({one_line(error)[:160]})"
        if importlib.util.find_spec("mpi4py") is None:
            missing = "mpi4py is not installed"
    raise UnavailableError(
        f"comm.transport is mpi, but {missing}; load the site's MPI and pip install 'mpi4py>=4', or use "
        "comm.transport=torch"
    )


def launch_by_mpi(launch: Launch) -> Launch:
    """Return who this process is by MPI's own account. Raises ConfigError if its launcher counts otherwise."""
    if launch.launcher in ("nproc", "torchrun"):
        raise ConfigError(
            f"comm.transport is mpi, but the ranks were started by {launch.launcher}, "
            "which MPI knows nothing of; start them with mpirun or srun --mpi=pmix, or use comm.transport=torch"
        )
    if (
        launch.launcher == "srun"
        and launch.world_size > 1
        and not any(n in os.environ for n in ("PMIX_RANK", "PMI_FD"))
    ):
        raise ConfigError(
            f"comm.transport is mpi, but srun started {launch.world_size} tasks that MPI knows nothing of; use srun "
            "--mpi=pmix (srun --mpi=list tells what there is), or comm.transport=torch"
        )
    world = load_mpi().COMM_WORLD
    if launch.launcher != "none":
        if (launch.rank, launch.world_size) != (world.Get_rank(), world.Get_size()):
            hint = (
                "use srun --mpi=pmix (srun --mpi=list tells what there is) with an MPI built for it"
                if launch.launcher == "srun"
                else "use the mpirun of the MPI library that mpi4py loads"
            )
            raise ConfigError(
                f"{launch.launcher} started rank {launch.rank} of {launch.world_size}, but MPI counts rank "
                f"{world.Get_rank()} of {world.Get_size()}; {hint}, or comm.transport=torch"
            )
        return launch
    local = world.Split_type(load_mpi().COMM_TYPE_SHARED)
    return replace(
        launch,
        launcher="mpirun" if world.Get_size() > 1 else "none",
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=local.Get_rank(),
        local_world_size=local.Get_size(),
    )


def finalize_mpi() -> None:
    """Collective: every rank must call this. End MPI in order, if it was begun; else mpirun would see a crash."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


class MpiTransport:
    """MPI_COMM_WORLD. Non-blocking calls, so that a rank that waits can hear that another was lost."""

    backend = "mpi"

    def __init__(self, device: torch.device, cuda_aware: bool):
        """Collective: every rank must call this. Start MPI. Raises UnavailableError."""
        self.mpi = load_mpi()
        self.world = self.mpi.COMM_WORLD
        self.device = device
        self.by_gpu = cuda_aware and device.type == "cuda"

    def root_text(self, text: str | None) -> str:
        """Collective: every rank must call this. Return rank 0's text on every rank."""
        found: str = self.world.bcast(text, 0)
        return found

    def broadcast(self, tensor: torch.Tensor) -> "MpiPending":
        """Collective: every rank must call this. Begin to overwrite a host tensor with rank 0's."""
        # as bytes: MPI has no names for some of torch's types
        raw = tensor.view(-1).view(torch.uint8).numpy()
        return MpiPending(self, lambda: self.world.Ibcast(raw, 0))

    def all_reduce(self, tensor: torch.Tensor) -> "MpiPending":
        """Collective: every rank must call this. Begin to sum a tensor over the ranks, in place.

        One on the GPU goes as it is with `comm.cuda_aware_mpi`, else through pinned memory.
        """
        if tensor.device.type == "cpu":
            return MpiPending(self, lambda: self._sum(tensor))
        if self.by_gpu:
            torch.cuda.synchronize(self.device)  # MPI knows nothing of streams
            return MpiPending(self, lambda: self.world.Iallreduce(self.mpi.IN_PLACE, tensor))
        host = host_copy(tensor)
        return MpiPending(self, lambda: self._sum(host), lambda: tensor.copy_(host))

    def _sum(self, tensor: torch.Tensor) -> Any:
        """Collective: every rank must call this. Begin to sum a host tensor; return what is asked by Test."""
        if tensor.dim() == 1 and len(tensor) >= _RING_ELEMENTS:
            return RingSum(self.mpi, self.world, tensor.numpy())
        return self.world.Iallreduce(self.mpi.IN_PLACE, tensor.numpy())

    def all_gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> "MpiPending":
        """Collective: every rank must call this. Begin to gather host tensors (length) into (world size, length)."""
        return MpiPending(self, lambda: self.world.Iallgather(tensor.numpy(), gathered.numpy()))

    def close(self) -> None:
        """Collective: every rank must call this. End MPI in order."""
        finalize_mpi()

    def abandon(self) -> None:
        """Leave without the others: nothing of MPI's waits for them then."""
        return


class RingSum:
    """Sums a flat array over the ranks, in place, along a ring: its share of the sum for each rank, then all shares.

    As fast as MPI's blocking sum, or faster; MPI's own non-blocking one takes two or three times as long (Open MPI),
    and a blocking one could wait for a dead rank for ever. All ranks get the same bits; the order in which a share is
    summed depends on the number of ranks alone. [ring: Patarasuk and Yuan, 2009]
    """

    def __init__(self, mpi: Any, world: Any, array: np.ndarray):
        """Begin; it goes on whenever `Test` is called."""
        self.mpi = mpi
        self.world = world
        self.array = array
        self.rank, self.size = world.Get_rank(), world.Get_size()
        self.borders = [len(array) * share // self.size for share in range(self.size + 1)]
        self.received = np.empty(max(end - begin for begin, end in pairwise(self.borders)), dtype=array.dtype)
        self.step = 0
        self.requests: list[Any] = []
        self._begin_step()

    def Test(self) -> bool:
        """Go on; return whether it is done."""
        while self.mpi.Request.Testall(self.requests):
            if self.step < self.size - 1:
                target = self._share(self.rank - self.step - 1)
                target += self.received[: len(target)]
            self.step += 1
            if self.step == 2 * (self.size - 1):
                return True
            self._begin_step()
        return False

    def _share(self, number: int) -> np.ndarray:
        number %= self.size
        return self.array[self.borders[number] : self.borders[number + 1]]

    def _begin_step(self) -> None:
        # first each share is added to on its way round, then the sums go round
        adding = self.step < self.size - 1
        sent = self._share(self.rank - self.step if adding else self.rank + self.size - self.step)
        target = self._share(self.rank - self.step - 1 if adding else self.rank + self.size - self.step - 1)
        got = self.received[: len(target)] if adding else target
        left, right = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        self.requests = [self.world.Irecv(got, left), self.world.Isend(sent, right)]


class MpiPending:
    """A collective on its way: first until all are there, which may take long, then the transfer, which does not."""

    def __init__(self, transport: MpiTransport, start: Any, finish: Any = None):
        self.start = start
        self.finish = finish
        self.barrier = transport.world.Ibarrier()
        self.request: Any = None

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether it is done. Raises RuntimeError (MPI.Exception) if it has failed."""
        began = time.monotonic()
        deadline = began + seconds
        pause = 0.0
        while self.request is None:
            if self.barrier.Test():
                self.request = self.start()
                began = time.monotonic()
            elif time.monotonic() > deadline:
                return False
            elif time.monotonic() - began > _SPIN_S:
                # others may need this core to get here: sleep, longer from time to time
                time.sleep(pause)
                pause = min(pause + 2e-5, 2e-3)
        while not self.request.Test():  # MPI moves the data only while it is called
            now = time.monotonic()
            if now > deadline:
                return False
            if now - began > _SPIN_S:
                os.sched_yield()  # another rank may need this core
                began = now
        if self.finish is not None:
            self.finish()
        return True
