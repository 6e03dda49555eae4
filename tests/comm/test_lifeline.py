"""The line between ranks outside the collectives: who died, who hangs, who leaves, and strangers that knock."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedfreeze.comm.lifeline import Lifeline, Message, own_addresses
from fedfreeze.errors import PreemptedError, RankLostError


class Line:
    """Rank 0's end and any number of others, in one process."""

    def __init__(self, heartbeat_s: float):
        self.heartbeat_s = heartbeat_s
        self.says: list[Message | None] = [None] * 8
        self.heard: list[tuple[str, float]] = []
        self.ends: list[Lifeline] = []
        self.root = self.new(0)
        self.where = self.root.listen()

    def new(self, rank: int) -> Lifeline:
        def poll() -> Message | None:
            said, self.says[rank] = self.says[rank], None
            return said

        end = Lifeline(rank, self.heartbeat_s, poll, lambda reason, grace_s: self.heard.append((reason, grace_s)))
        self.ends.append(end)
        return end

    def join(self, rank: int) -> Lifeline:
        end = self.new(rank)
        end.connect(self.where, "127.0.0.1")
        return end

    def stranger(self) -> socket.socket:
        """A connection that has not said hello."""
        connection = socket.create_connection(("127.0.0.1", self.where["port"]), timeout=10)
        connection.settimeout(10)
        return connection

    def silent(self, rank: int) -> socket.socket:
        """A rank that says hello and then nothing, as one that is stopped."""
        connection = self.stranger()
        hello = {"hello": self.where["token"], "rank": rank, "host": "n9", "pid": 77}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        assert json.loads(connection.makefile().readline())["welcome"] == self.where["token"]
        return connection


@pytest.fixture
def line() -> Iterator[Line]:
    found = Line(heartbeat_s=30.0)
    yield found
    for end in found.ends:
        end.root_lost = True  # so that nobody waits for rank 0 to leave first
        end.leave(0)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_all_is_well(line: Line) -> None:
    ends = [line.join(rank) for rank in (1, 2, 3)]
    time.sleep(0.5)
    for end in [line.root, *ends]:
        end.check()


def test_a_rank_that_dies_is_named_on_all_others(line: Line) -> None:
    survivor = line.join(1)
    line.silent(2).close()  # the kernel closes the connections of a process that is killed
    until(lambda: line.root.lost and survivor.lost)
    for end in (line.root, survivor):
        with pytest.raises(RankLostError, match=r"rank 2 on n9 \(pid 77\) has died: .*; run again to go on"):
            end.check()
    assert not survivor.root_lost


def test_a_rank_that_is_silent_is_named_after_heartbeat_s() -> None:
    line = Line(heartbeat_s=1.0)
    survivor = line.join(1)
    silent = line.silent(2)
    started = time.monotonic()
    until(lambda: line.root.lost and survivor.lost)
    assert time.monotonic() - started > 0.5
    assert "rank 2 on n9 (pid 77) has given no sign of life for" in str(survivor.lost)
    assert "rank 1" not in str(line.root.lost)
    silent.close()
    for end in line.ends:
        end.root_lost = True
        end.leave(0)


def test_rank_0_is_named_too(line: Line) -> None:
    survivor = line.join(1)
    line.root._ending.set()  # its thread ends and its connections close without a word
    assert line.root._thread is not None
    line.root._thread.join(5)
    for peer in list(line.root._peers.values()):
        peer.connection.close()
    until(lambda: survivor.lost)
    assert survivor.root_lost
    assert str(survivor.lost).startswith("rank 0 on ")


def test_a_rank_that_leaves_in_order_is_no_loss(line: Line) -> None:
    one, two = line.join(1), line.join(2)
    one.leave(0)
    time.sleep(0.5)
    line.root.check()
    two.check()


def test_a_rank_that_leaves_with_an_error_is_a_loss_after_a_moment(line: Line) -> None:
    """The others may hear of it by the collective they are in: that is the better story."""
    line.silent(1).sendall(b'{"bye": 70}\n')
    time.sleep(0.7)
    line.root.check()
    until(lambda: line.root.lost)
    assert str(line.root.lost) == "rank 1 on n9 (pid 77) left with exit code 70"


def test_after_an_error_rank_0_leaves_first(line: Line) -> None:
    """Launchers end all ranks when the first leaves, and rank 0 has books to close."""
    one = line.join(1)
    started = time.monotonic()
    line.says[0] = None
    threading.Timer(0.6, line.root.leave, (76,)).start()
    one.leave(76)
    assert 0.4 < time.monotonic() - started < 10


def test_a_wish_reaches_rank_0(line: Line) -> None:
    line.join(1)
    line.says[1] = {"wish": "signal SIGUSR1", "grace_s": 88.5}
    until(lambda: line.heard)
    assert line.heard == [("signal SIGUSR1", 88.5)]


def test_a_dropped_round_reaches_everyone(line: Line) -> None:
    ends = [line.join(rank) for rank in (1, 2)]
    line.says[0] = {"drop": "no time"}
    for end in [line.root, *ends]:
        until(lambda end=end: end.dropped)  # type: ignore[misc]
        with pytest.raises(PreemptedError, match="no time"):
            end.check()


def test_a_rank_that_left_because_it_was_told_to_takes_all_along(line: Line) -> None:
    other = line.join(2)
    line.silent(1).sendall(b'{"bye": 75}\n')
    until(lambda: other.dropped)
    assert line.root.lost is None


def test_a_late_rank_hears_what_was_said_before(line: Line) -> None:
    line.silent(1).close()
    until(lambda: line.root.lost)
    late = line.join(2)
    until(lambda: late.lost)


@pytest.mark.parametrize(
    "knock",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"hello": "wrong", "rank": 1}\n', b"[]\n", b"\x00" * 20_000, b'{"beat": 1}\n', b""],
)
def test_strangers_are_shown_the_door(line: Line, knock: bytes) -> None:
    """A port scanner, another job, noise: closed without a word, and nobody was lost."""
    stranger = line.stranger()
    stranger.sendall(knock)
    if knock:
        with contextlib.suppress(ConnectionResetError):  # where it was still sending
            while stranger.recv(100):
                pass
    stranger.close()
    one = line.join(1)
    time.sleep(0.3)
    line.root.check()
    one.check()


def test_another_program_at_the_address_is_not_rank_0(line: Line) -> None:
    """What answers must know the token; the next address is tried."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        end = line.new(1)
        end.heartbeat_s = 0.5

        def answer() -> None:
            connection, _ = other.accept()
            connection.recv(1000)
            connection.sendall(b'{"welcome": "me"}\n')
            connection.close()

            threading.Thread(target=answer, daemon=True).start()

        assert end._try("127.0.0.1", other.getsockname()[1]) is False


def test_rank_0_that_cannot_be_reached_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    end = Lifeline(1, 0.2, lambda: None, lambda reason, grace_s: None)
    with pytest.raises(RankLostError, match=r"rank 1 on .* cannot reach rank 0 at 127\.0\.0\.1, port .*MASTER_ADDR"):
        end.connect({"port": port, "token": "t", "addresses": ["127.0.0.1"]}, None)


def test_own_addresses_end_with_this_host() -> None:
    found = own_addresses()
    assert found[0] == socket.gethostname()
    assert "127.0.0.1" in found
    assert len(found) == len(set(found))
