"""The checks of the GPU path on a machine without one: refusal, table, limits of time, and the checks on the CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfreeze.units import MIB
from tests.support.allocator_traces import TRACES
from tests.support.checks import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def setting(tmp_path: Path):
    from gpu_runs import Setting

    return Setting("cpu", time.monotonic() + 120, folder=tmp_path)


def refused(**environment: str) -> str:
    done = subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert done.returncode == 69
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "it needs a GPU, and torch finds none here" in refused(PYTHON=sys.executable)


def test_without_torch_it_says_so_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert f"{python} has no torch" in refused(PYTHON=str(python))


CHECK = """
import json, sys, time
from gpu_table import Row, print_row
name = sys.argv[sys.argv.index("--check") + 1]
print_row(Row(f"{name} begins", "", "", sys.argv[sys.argv.index("--device") + 1], True, {"a": 1}))
print("noise, and ROW {torn")
if name == "caps":
    sys.exit("the driver said no")
if name == "kills":
    print_row(Row("a claim", "command", "2", "3", False))
if name == "bits":
    time.sleep(60)
"""


def test_a_check_that_crashes_or_hangs_costs_its_own_rows_alone(tmp_path: Path, capfd, monkeypatch) -> None:
    import gpu_table

    (tmp_path / "check.py").write_text(CHECK)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    names = ("machine", "caps", "kills", "bits", "speed", "study")
    limits = {"bits": (4.0, 1.0), "study": (900.0, 900.0)}
    checks = tuple(gpu_table.Check(name, *limits.get(name, (60.0, 1.0))) for name in names)
    monkeypatch.setattr(gpu_table, "CHECKS", checks)
    monkeypatch.setattr(gpu_table, "GRACE_S", 0.0)
    started = time.monotonic()
    json_file = tmp_path / "gpu.json"
    arguments = ["--minutes", "0.9", "--device", "cpu", "--json", str(json_file)]
    assert gpu_table.main(arguments, [sys.executable, str(tmp_path / "check.py")]) == 1
    assert time.monotonic() - started < 30
    found = json.loads(json_file.read_text())
    seen = [(row["what"], row["passed"]) for row in found["rows"]]
    assert seen == [
        ("machine begins", True),
        ("caps begins", True),
        ("caps: end", False),
        ("kills begins", True),
        ("a claim", False),
        ("bits begins", True),
        ("bits: time", False),
        ("speed begins", True),
        ("study", None),
    ]
    assert found["failed"] == 3
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["caps: end"]["seen"] == "exit code 1: the driver said no"
    assert rows["machine begins"]["figures"] == {"a": 1}
    assert "not tried" in rows["study"]["seen"]
    out = capfd.readouterr().out
    assert "FAIL  a claim" in out
    assert "$ command" in out
    assert "5 passed, 3 failed, 1 only told or not tried" in out


def test_a_table_wraps_what_is_long_and_names_each_verdict() -> None:
    from gpu_table import Row, table

    text = table([Row("a" * 60, "python x", "b" * 40, "c" * 130, True), Row("told")])
    lines = text.splitlines()
    assert lines[2].startswith("pass  " + "a" * 43)
    assert lines[3].split() == ["a" * 17, "b" * 7, "c" * 60]
    assert lines[-1] == "1 passed, 0 failed, 1 only told or not tried"
    assert any(line.startswith("-     told") for line in lines)


def test_what_a_check_has_started_ends_with_it(tmp_path: Path) -> None:
    from gpu_table import run_limited

    code, out, _ = run_limited(["bash", "-c", "sleep 60 & echo $!; wait"], 1.0)
    assert code is None
    child = Path(f"/proc/{int(out)}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] not in "ZX" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] in "ZX"


def test_missing_packages_are_those_of_setup_cfg() -> None:
    from gpu_table import missing_packages

    assert {"torch", "numpy", "pydantic", "pytest"}.isdisjoint(missing_packages())


def test_caps_are_checked(setting) -> None:
    from gpu_checks import caps

    rows = list(caps(setting))
    assert len(rows) == 3 * 5 + 2
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    assert "the cap is" in rows[3].seen


def test_a_cap_that_does_not_hold_is_found(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks must be able to fail: here with an enforcer that lets everything pass."""
    import gpu_checks

    usual = gpu_checks.StageTrial.train
    monkeypatch.setattr(gpu_checks.StageTrial, "train", lambda self, cap_bytes: usual(self, None))
    rows, _ = gpu_checks.caps_of_stage("resnet8", 8, 4, 0, torch.device("cpu"), hold=True)
    assert [row.passed for row in rows] == [True, True, False, False, True]


def test_what_is_reserved_is_held_against_the_prediction(setting) -> None:
    from gpu_segments import segments

    rows = list(segments(setting))
    assert [row.what.rpartition(" ")[2] for row in rows] == ["reserved"] * 3
    assert all(row.passed for row in rows), rows


def test_an_allocators_trace_is_held_against_model_and_prediction() -> None:
    """As on a GPU, with what was recorded on one."""
    from gpu_segments import held_against

    trace = next(trace for trace in TRACES if trace.name == "smartfreeze/resnet18/64/128/layer2")
    assert [row.passed for row in held_against("stage 2", trace, 260 * MIB)] == [True, True]
    assert [row.passed for row in held_against("stage 2", trace, 262 * MIB)] == [True, False]
    lost = replace(trace, actions=trace.actions[:100])
    assert [row.passed for row in held_against("stage 2", lost, 260 * MIB)] == [False, False]


@pytest.mark.slow
def test_bits_are_compared(setting) -> None:
    from gpu_runs import bits

    rows = list(bits(setting))
    assert [row.passed for row in rows] == [True] * 8 + [None], rows
    assert "killed after round" in rows[3].seen
    assert rows[0].figures["sha256"][:16] == rows[1].expected == rows[2].seen


def test_a_run_that_fails_is_told_and_what_hangs_on_it_is_not_tried(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_runs

    usual = gpu_runs.write_config
    monkeypatch.setattr(gpu_runs, "write_config", lambda setting, name: usual(setting, name, train={"rounds": 0}))
    rows = list(gpu_runs.bits(setting))
    assert [row.passed for row in rows] == [False, None, None, None] * 2 + [None]
    assert "exit code 64: fedfreeze: error: train.rounds" in rows[0].seen


def test_a_killed_rank_is_timed(setting) -> None:
    from gpu_runs import kills

    gloo, nccl = kills(setting)
    assert gloo.passed is True, gloo
    assert 0 < gloo.figures["seconds"] < 10
    assert nccl.passed is None


def test_speed_is_compared_with_a_plain_loop(setting) -> None:
    from gpu_speed import TINY, Way, a_device, beside_plain

    (row,) = beside_plain(setting, TINY, Way(), goal=1e-9)
    assert row.passed is True, row
    assert row.figures["ratio"] == pytest.approx(row.figures["samples_s"] / row.figures["plain_samples_s"])
    (slow,) = beside_plain(setting, TINY, Way(), goal=1e9)
    assert slow.passed is False
    (cost,) = a_device(setting, TINY)
    assert cost.figures["device_s"] > 0


def test_a_run_that_gives_no_figure_fails(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_speed

    monkeypatch.setattr(gpu_speed, "rounds_of", lambda run_dir: [])
    (row,) = gpu_speed.beside_plain(setting, gpu_speed.TINY, gpu_speed.Way(), goal=0.1)
    assert row.passed is False
