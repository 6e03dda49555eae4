"""This process among its equals: messages as JSON, updates as one flat tensor, nothing pickled, no endless wait."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from fedfreeze.comm.joining import watched
from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.lifeline import Lifeline, Message
from fedfreeze.comm.mpi_transport import MpiTransport, finalize_mpi
from fedfreeze.comm.torch_transport import TorchTransport
from fedfreeze.config.schema import CommConfig
from fedfreeze.errors import FedfreezeError, RankLostError, error_of, one_line

T = TypeVar("T")

# How often a waiting rank asks whether another was lost.
_LOOK_S = 0.25

# A collective that breaks does so a moment before the reason is known.
_EXPLAIN_S = 5.0


class Pending(Protocol):
    """A collective on its way."""

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether it is done. Raises RuntimeError if it has failed."""
        ...


class Transport(Protocol):
    """What carries messages; each collective is begun on all ranks in the same order, one at a time."""

    backend: str

    def root_text(self, text: str | None) -> str:
        """Collective: every rank must call this. Return rank 0's text on every rank."""
        ...

    def broadcast(self, tensor: torch.Tensor) -> Pending:
        """Collective: every rank must call this. Begin to overwrite a host tensor with rank 0's."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Collective: every rank must call this. Begin to sum a tensor over the ranks, in place, wherever it lies."""
        ...

    def all_gather(self, gathered: torch.Tensor, tensor: torch.Tensor) -> Pending:
        """Collective: every rank must call this. Begin to gather host tensors (length) into (world size, length)."""
        ...

    def close(self) -> None:
        """Collective: every rank must call this. Leave in order."""
        ...

    def abandon(self) -> None:
        """Leave without the others, one of which was lost."""
        ...


class Ranks:
    """This process among its equals. With one rank, nothing is opened and every collective is local."""

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        config: CommConfig,
        *,
        poll: Callable[[], Message | None] = lambda: None,
        hear_wish: Callable[[str, float], None] = lambda reason, grace_s: None,
    ):
        """Collective: every rank must call this. Meet the others. Raises RankLostError, UnavailableError.

        `poll` and `hear_wish` are those of the Lifeline.
        """
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.device = device
        self.config = config
        self.host = socket.gethostname()
        self.backend = "none"
        self.rank_hosts = [self.host]
        self.lifeline = Lifeline(launch.rank, config.heartbeat_s, poll, hear_wish)
        self.transport: Transport
        if self.world_size > 1:
            with watched(self.rank, self.world_size, config.join_s):
                self.transport = (
                    MpiTransport(device, config.cuda_aware_mpi)
                    if config.transport == "mpi"
                    else TorchTransport(launch, device, config.timeout_s, config.join_s)
                )
                self.backend = self.transport.backend
                self._open_lifeline(launch)
                self.rank_hosts = self.all_gather(self.host)

    def _open_lifeline(self, launch: Launch) -> None:
        """Collective: every rank must call this."""
        where = self.transport.root_text(json.dumps(self.lifeline.listen()) if self.is_root else None)
        if not self.is_root:
            one_host = launch.local_world_size == launch.world_size
            self.lifeline.connect(json.loads(where), "127.0.0.1" if one_host else launch.master_address)

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
        self._run("broadcast", lambda: self.transport.broadcast(length))
        body = _bytes(text) if self.is_root else torch.empty(int(length), dtype=torch.uint8)
        self._run("broadcast", lambda: self.transport.broadcast(body))
        return json.loads(body.numpy().tobytes())

    def all_gather(self, message: Any) -> list[Any]:
        """Collective: every rank must call this. Return every rank's message (plain JSON values), by rank."""
        if self.world_size == 1:
            return [json.loads(json.dumps(message))]
        text = json.dumps(message).encode()
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self._run("all-reduce", lambda: self.transport.all_reduce(lengths))
        longest = int(lengths.max())
        gathered = torch.empty(self.world_size, longest, dtype=torch.uint8)
        body = _bytes(text.ljust(longest))
        self._run("all-gather", lambda: self.transport.all_gather(gathered, body))
        return [json.loads(row.numpy().tobytes()) for row in gathered]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Collective: every rank must call this. Sum a tensor of the host or the GPU over the ranks, in place."""
        if self.world_size > 1:
            self._run("all-reduce", lambda: self.transport.all_reduce(tensor))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Collective: every rank must call this. Overwrite a host tensor with rank 0's, in place."""
        if self.world_size > 1:
            self._run("broadcast", lambda: self.transport.broadcast(tensor))

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

    def check(self) -> None:
        """Raise what the lifeline tells: RankLostError if a rank was lost, PreemptedError if the round was dropped."""
        self.lifeline.check()

    def close(self) -> None:
        """Collective: every rank must call this. Leave in order."""
        if self.world_size > 1:
            self.transport.close()
        else:
            finalize_mpi()  # which may have been begun to learn that there is one rank

    def leave(self, code: int, why: str = "") -> None:
        """Tell the others that this rank leaves, and why; to be called last, however the run went."""
        self.lifeline.leave(code, why)
        if code and self.world_size > 1:
            self.transport.abandon()

    def _run(self, name: str, begin: Callable[[], Pending]) -> None:
        """Wait for a collective, but not for a rank that is lost, nor longer than comm.timeout_s."""
        started = time.monotonic()
        try:
            pending = begin()
            while not pending.wait(_LOOK_S):
                self.lifeline.check()
                if time.monotonic() - started > self.config.timeout_s:
                    raise RankLostError(
                        f"rank {self.rank} on {self.host} waited {self.config.timeout_s:g} s (comm.timeout_s) in "
                        f"{name} for a rank that is alive but does not come; raise comm.timeout_s if its devices take "
                        "that long, and run again to go on from the last checkpoint"
                    )
        except RuntimeError as error:
            self.lifeline.check_within(_EXPLAIN_S)
            raise RankLostError(
                f"rank {self.rank} on {self.host}: {name} with {self.world_size} ranks failed: "
                f"{one_line(error)[:160]}; run again to go on from the last checkpoint"
            ) from None


def _bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
