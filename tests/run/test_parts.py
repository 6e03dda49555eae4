"""Where a round's seconds go: parts follow one another without gaps, and a run's records tell them."""

import time
from pathlib import Path

import pytest

from fedfreeze.run.parts import PARTS, RoundParts
from tests.support.launching import metrics


def test_parts_follow_one_another_without_gaps() -> None:
    before, began = time.process_time(), time.monotonic()
    parts = RoundParts()
    time.sleep(0.02)
    parts.end("plan")
    while time.process_time() - before < 0.02:
        pass
    parts.end("train")
    taken = time.monotonic() - began
    assert parts.wall_s["plan"] >= 0.02 > parts.processor_s["plan"]
    assert parts.processor_s["train"] > 0.005
    assert sum(parts.wall_s.values()) == pytest.approx(taken, abs=0.005)


def test_what_was_written_before_stands_in_front() -> None:
    writing, parts = RoundParts(), RoundParts()
    writing.end("write")
    parts.end("ask")
    joined = parts.before(writing)
    assert list(joined.wall_s) == list(joined.processor_s) == ["write", "ask"]
    assert joined.wall_s["write"] == writing.wall_s["write"]


def test_each_round_of_a_run_tells_its_parts(small_run: tuple[Path, Path]) -> None:
    rounds = [record for record in metrics(small_run[1]) if record["kind"] == "round"]
    for record in rounds:
        assert tuple(record["parts_s"]) == tuple(record["parts_processor_s"]) == PARTS
        assert all(seconds >= 0 for seconds in record["parts_s"].values())
        told = sum(seconds for part, seconds in record["parts_s"].items() if part != "write")
        assert told == pytest.approx(record["wall_s"], rel=0.05, abs=0.02)
    assert any(record["parts_s"]["write"] > 1e-4 for record in rounds[1:])  # the line of the round before, at least
