"""A pytest plugin: `--rooms` tells, at the end, what the tests of each room took and how many programs they started."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

# Programs that this process has started since the last report of a test: a start of its own, or forked from one that
# has its imports (see preloaded.py).
_started = {"started": 0, "forked": 0}


@dataclass
class Sum:
    """What the tests of a room took."""

    tests: int = 0
    seconds: float = 0.0
    started: int = 0
    forked: int = 0


_rooms: dict[str, Sum] = defaultdict(Sum)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rooms", action="store_true", help="tell time and started programs by room")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rooms"):
        sys.addaudithook(_count)


def _count(event: str, arguments: object) -> None:
    if event == "subprocess.Popen":
        _started["started"] += 1
    elif event == "fedfreeze.preloaded":
        _started["forked"] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    report.user_properties = [*report.user_properties, (report.when, dict(_started))]  # it may travel between processes
    _started.update(started=0, forked=0)
    return report  # type: ignore[return-value]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # whoever started the workers adds up
    folders = report.nodeid.split("::")[0].split("/")[1:-1]
    room = _rooms[folders[0] if folders else "(the root)"]
    programs = dict(report.user_properties).get(report.when)
    if programs is None:
        return  # a worker has crashed
    room.tests += report.when == "call"
    room.seconds += report.duration
    room.started += programs["started"]
    room.forked += programs["forked"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--rooms"):
        return
    rows = sorted(_rooms.items(), key=lambda row: -row[1].seconds)
    rows.append(("all", Sum(*(sum(getattr(room, name) for _, room in rows) for name in Sum.__annotations__))))
    terminalreporter.section("rooms: tests, their seconds, programs started, programs forked with their imports")
    for name, room in rows:
        terminalreporter.write_line(f"{name:12} {room.tests:5} {room.seconds:7.0f} s {room.started:5} {room.forked:4}")
