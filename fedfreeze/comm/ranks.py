"""The only module with collectives. Small messages travel as JSON, updates as one flat tensor, nothing is pickled."""

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fedfreeze.errors import FedfreezeError, RankLostError, error_of, one_line
from fedfreeze.launcher import Launch

T = TypeVar("T")


class Ranks:
    """This process among its equals. With one rank, no process group is made and every collective is local."""

    def __init__(self, launch: Launch, device: torch.device, timeout_s: float):
        """Collective: every rank must call this. Join the process group. Raises RankLostError."""
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.local_rank = launch.local_rank
        self.device = device
        self.backend = "none"
        self.rank_hosts = [socket.gethostname()]
        if self.world_size > 1:
            self._init_process_group(launch, timeout_s)
            self.rank_hosts = self.all_gather(socket.gethostname())

    def _init_process_group(self, launch: Launch, timeout_s: float) -> None:
        # NCCL refuses two ranks on one GPU; gloo carries host tensors there, and the JSON messages everywhere
        use_nccl = self.device.type == "cuda" and launch.local_world_size <= torch.cuda.device_count()
        self.backend = "nccl" if use_nccl else "gloo"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if use_nccl else "gloo",
                init_method=launch.init_method,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            raise RankLostError(
                f"rank {self.rank} on {socket.gethostname()} could not join the {self.world_size} ranks: "
                f"{one_line(error)[:200]}"
            ) from None

    @property
    def is_root(self) -> bool:
        """Whether this rank holds the coordinator."""
        return self.rank == 0

    def share(self, message: Any = None) -> Any:
        """Collective: every rank must call this. Return rank 0's message (plain JSON values) on every rank."""
        if self.world_size == 1:
            return json.loads(json.dumps(message))
        text = json.dumps(message).encode() if self.is_root else b""
        length = torch.tensor([len(text)])
        self._run("broadcast", lambda: dist.broadcast(length, 0))
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.is_root else _empty_bytes(int(length))
        self._run("broadcast", lambda: dist.broadcast(body, 0))
        return json.loads(body.numpy().tobytes())

    def all_gather(self, message: Any) -> list[Any]:
        """Collective: every rank must call this. Return every rank's message (plain JSON values), by rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(message))]
        text = json.dumps(message).encode()
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self._run("all-reduce", lambda: dist.all_reduce(lengths))
        longest = int(lengths.max())
        body = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        bodies = [_empty_bytes(longest) for _ in range(self.world_size)]
        self._run("all-gather", lambda: dist.all_gather(bodies, body))
        return [json.loads(other.numpy().tobytes()) for other in bodies]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Collective: every rank must call this. Sum a flat host tensor over the ranks, in place.

        With a GPU a rank it travels by NCCL through the GPU, between two devices and so outside every cap.
        """
        if self.world_size == 1:
            return
        carried = tensor.to(self.device) if self.backend == "nccl" else tensor
        self._run("all-reduce", lambda: dist.all_reduce(carried))
        if carried is not tensor:
            tensor.copy_(carried)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Collective: every rank must call this. Overwrite a host tensor with rank 0's, in place."""
        if self.world_size > 1:
            self._run("broadcast", lambda: dist.broadcast(tensor, 0))

    def decide(self, action: Callable[[], Any]) -> Any:
        """Collective: every rank must call this. Run an action on rank 0 and return its result (JSON) on every rank.

        Raises rank 0's FedfreezeError on every rank, so that all leave with the same exit code.
        """
        message: dict[str, Any] = {}
        if self.is_root:
            try:
                message = {"result": action()}
            except FedfreezeError as error:
                message = {"error": [int(error.exit_code), one_line(error)]}
        message = self.share(message)
        if "error" in message:
            raise error_of(*message["error"])
        return message["result"]

    def together(self, action: Callable[[], T]) -> T:
        """Collective: every rank must call this. Run an action on every rank; if any fails by a user's mistake, all do.

        So every rank leaves with the same error and the same exit code. Raises the first failing rank's FedfreezeError.
        """
        result, failure = None, None
        try:
            result = action()
        except FedfreezeError as error:
            failure = [int(error.exit_code), one_line(error)]
        failures = [found for found in self.all_gather(failure) if found]
        if failures:
            raise error_of(*failures[0])
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Collective: every rank must call this. Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, name: str, operation: Callable[[], Any]) -> None:
        try:
            operation()
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank} on {socket.gethostname()} (pid {os.getpid()}): {name} with {self.world_size} ranks "
                f"failed: {one_line(error)[:160]}; another rank is gone or silent; run again to go on from the last "
                "checkpoint"
            ) from None


def _empty_bytes(length: int) -> torch.Tensor:
    return torch.empty(length, dtype=torch.uint8)
