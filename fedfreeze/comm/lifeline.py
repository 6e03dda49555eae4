"""A line from every rank to rank 0, outside the collectives: signs of life, losses, and word that a round is dropped.

A collective tells little when a rank dies: its neighbours see an error, others wait. This line tells everyone, by name,
within a moment of a death (the kernel closes the connection) and within `heartbeat_s` of a hang (no sign of life).
"""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

from fedfreeze.errors import ExitCode, PreemptedError, RankLostError, error_of

Message = dict[str, Any]

# How often a thread looks around. A loss by a closed connection is seen at once, whatever this is.
_TICK_S = 0.2

# A rank that leaves with an error has mostly told the others by the collective they are in: give them time to hear it.
_LEAVING_S = 2.0

# How long a rank that leaves waits for rank 0 to end first: launchers kill all when one leaves, and rank 0 has books.
_ROOT_ENDS_S = 45.0

_CONNECT_S = 60.0


@dataclass
class _Peer:
    """The other end of a connection."""

    connection: socket.socket
    name: str = "a rank"
    rank: int = -1
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    left: bool = False
    """It said that it leaves."""


class Lifeline:
    """This rank's end of the line; a thread of its own, which never touches a collective.

    `poll` is asked at every tick what this rank has to tell: `{"wish": reason, "grace_s": s}` from any rank to rank 0,
    `{"drop": reason}` from rank 0 to all. `hear_wish` is called on rank 0.
    """

    def __init__(
        self,
        rank: int,
        heartbeat_s: float,
        poll: Callable[[], Message | None],
        hear_wish: Callable[[str, float], None],
    ):
        self.rank = rank
        self.heartbeat_s = heartbeat_s
        self.poll = poll
        self.hear_wish = hear_wish
        self.lost: str | None = None
        """Who was lost, as a sentence; the first loss that this rank heard of."""
        self.failed: tuple[int, str] | None = None
        """Exit code and words of a rank that left because of an error of its own."""
        self.root_lost = False
        self.interrupted = False
        """Whether a Ctrl-C has reached a rank: then it is meant for all."""
        self.dropped: str | None = None
        """Why the round was dropped."""
        self.host = socket.gethostname()
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._token = ""
        self._leaving: list[tuple[float, str, int]] = []
        self._ending = Event()
        self._root_ended = Event()
        self._last_beat = 0.0
        self._thread: Thread | None = None

    def listen(self) -> Message:
        """On rank 0: begin to listen, and return what the others need to connect."""
        listener = socket.create_server(("", 0), backlog=4096)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._token = os.urandom(8).hex()
        self._start()
        return {"port": listener.getsockname()[1], "token": self._token, "addresses": own_addresses()}

    def connect(self, where: Message, address: str | None) -> None:
        """On other ranks: connect to rank 0, by `address` if that is known to lead there. Raises RankLostError."""
        self._token = where["token"]
        addresses = [*([address] if address else []), *where["addresses"]]
        deadline = time.monotonic() + min(_CONNECT_S, 2 * self.heartbeat_s)
        while True:
            for candidate in addresses:
                if self._try(candidate, where["port"]):
                    self._start()
                    return
            if time.monotonic() > deadline:
                raise RankLostError(
                    f"rank {self.rank} on {self.host} cannot reach rank 0 at {', '.join(dict.fromkeys(addresses))}, "
                    f"port {where['port']}; set MASTER_ADDR to an address of rank 0's host that all nodes reach"
                )
            time.sleep(0.2)

    def _try(self, address: str, port: int) -> bool:
        """Connect and shake hands: what answers at an address need not be rank 0."""
        try:
            connection = socket.create_connection((address, port), timeout=5)
        except OSError:
            return False
        try:
            hello = {"hello": self._token, "rank": self.rank, "host": self.host, "pid": os.getpid()}
            connection.sendall(_line(hello))
            answer = b""
            while not answer.endswith(b"\n"):
                more = connection.recv(256)
                if not more or len(answer) > 256:
                    raise OSError
                answer += more
            welcome = json.loads(answer)
            if not isinstance(welcome, dict) or welcome.get("welcome") != self._token:
                raise OSError
        except (OSError, ValueError):
            connection.close()
            return False
        peer = _Peer(connection, f"rank 0 on {welcome['host']} (pid {welcome['pid']})", 0)
        connection.setblocking(False)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)
        return True

    def _start(self) -> None:
        self._thread = Thread(target=self._live, name="lifeline", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what this rank has heard: RankLostError if one was lost, PreemptedError if the round was dropped."""
        if self.interrupted:
            raise KeyboardInterrupt
        if self.failed is not None:
            raise error_of(*self.failed)
        if self.lost is not None:
            raise RankLostError(f"{self.lost}; run again to go on from the last checkpoint")
        if self.dropped is not None:
            raise PreemptedError(self.dropped)

    def check_within(self, seconds: float) -> None:
        """Wait for news that explains why a collective has failed, and raise it; return if none comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.02)

    def leave(self, code: int, why: str = "") -> None:
        """Tell the others that this rank leaves, and after an error let rank 0 leave first. To be called last."""
        if self._thread is None:
            return
        self._send_all({"bye": int(code), "why": why[:1000]})
        if code and self.rank and not self.root_lost:
            self._root_ended.wait(_ROOT_ENDS_S)
        self._ending.set()
        self._thread.join(2 * _TICK_S)
        for peer in self._peers.values():
            peer.connection.close()

    def _live(self) -> None:
        """The thread: listen, and look around at every tick."""
        looked = time.monotonic()
        while not self._ending.is_set():
            for key, _ in self._selector.select(_TICK_S):
                connection: Any = key.fileobj
                if connection in self._peers:
                    self._read(self._peers[connection])
                else:
                    self._accept(connection)
            now = time.monotonic()
            if now - looked > self.heartbeat_s / 2:  # this process itself was stopped: what was sent is yet to be read
                for peer in self._peers.values():
                    peer.heard = now
            looked = now
            self._look_around(now)

    def _look_around(self, now: float) -> None:
        if now - self._last_beat > min(self.heartbeat_s / 6, 5.0):
            self._last_beat = now
            self._send_all({"beat": self.rank})
        for peer in list(self._peers.values()):
            if not peer.left and now - peer.heard > self.heartbeat_s:
                self._lose(peer, f"has given no sign of life for {now - peer.heard:.0f} s (comm.heartbeat_s)")
        for leaving in list(self._leaving):
            when, text, code = leaving
            if now > when:
                self._leaving.remove(leaving)
                self._tell_loss(text, code)
        said = None
        with contextlib.suppress(OSError):  # a file system that stutters is no reason to fall silent
            said = self.poll()
        if said is not None:
            if "drop" in said:
                self._drop(said["drop"])
            else:
                self._send_all(said)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            self._peers[connection] = _Peer(connection, left=True)  # a stranger until it says hello
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._close(peer)
            return
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or (peer.rank < 0 and message.get("hello") != self._token):
                self._drop_stranger(peer)
                return
            self._hear(peer, message)
        if len(peer.unread) > 10_000:
            self._drop_stranger(peer)

    def _hear(self, peer: _Peer, message: Message) -> None:
        if "hello" in message:
            peer.rank, peer.left = message["rank"], False
            peer.name = f"rank {peer.rank} on {message['host']} (pid {message['pid']})"
            self._send(peer, {"welcome": self._token, "host": self.host, "pid": os.getpid()})
            for what, text in (("lost", self.lost), ("drop", self.dropped)):
                if text is not None:
                    self._send(peer, {what: text})
        elif "wish" in message:
            self.hear_wish(message["wish"], message["grace_s"])
        elif "drop" in message:
            self._drop(message["drop"])
        elif "lost" in message:
            self._tell_loss(message["lost"], message.get("code", 0))
        elif "interrupted" in message:
            self._interrupt()
        elif "bye" in message:
            self._part(peer, message["bye"], message.get("why", ""))

    def _part(self, peer: _Peer, code: int, why: str) -> None:
        peer.left = True
        if peer.rank == 0:
            self._root_ended.set()
        if code == ExitCode.RUN_AGAIN:
            self._drop(f"{peer.name} was told to leave")
        elif code == ExitCode.INTERRUPTED:
            self._interrupt()
        elif code:
            said = f"{peer.name}: {why}" if why else f"{peer.name} left with exit code {code}"
            self._leaving.append((time.monotonic() + _LEAVING_S, said, code))

    def _interrupt(self) -> None:
        if not self.interrupted:
            self.interrupted = True
            if self.rank == 0:
                self._send_all({"interrupted": True})

    def _drop(self, reason: str) -> None:
        if self.dropped is None:
            self.dropped = reason
            if self.rank == 0:
                self._send_all({"drop": reason})

    def _close(self, peer: _Peer) -> None:
        self._forget(peer)
        if self.rank:
            self._root_ended.set()
        if not peer.left:
            self._lose(peer, "has died: it closed its connection without a word")

    def _lose(self, peer: _Peer, how: str) -> None:
        if peer.rank == 0:
            self.root_lost = True
        peer.left = True
        self._tell_loss(f"{peer.name} {how}")

    def _tell_loss(self, text: str, code: int = 0) -> None:
        """Note who was lost; a rank that left by a user's mistake, or ours, takes all along with its own exit code."""
        if self.lost is None:
            if ExitCode.BAD_CONFIG <= code <= ExitCode.STORAGE:
                self.failed = (code, text)
            self.lost = text
            if self.rank == 0:
                self._send_all({"lost": text, "code": code})

    def _drop_stranger(self, peer: _Peer) -> None:
        self._forget(peer)
        peer.connection.close()

    def _forget(self, peer: _Peer) -> None:
        self._peers.pop(peer.connection, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)

    def _send_all(self, message: Message) -> None:
        for peer in list(self._peers.values()):
            if peer.rank >= 0:
                self._send(peer, message)

    def _send(self, peer: _Peer, message: Message) -> None:
        # lines are short and few: a full buffer means that the other end has long stopped reading
        with contextlib.suppress(OSError):
            peer.connection.send(_line(message))


def own_addresses() -> list[str]:
    """Return what this host may be reached by, the likeliest first: its name, its addresses, itself."""
    name = socket.gethostname()
    found = [name]
    with contextlib.suppress(OSError):
        found += [entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]  # type: ignore[misc]
    # no packet is sent: the kernel only says which of its addresses leads outside
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
