"""The sweep over a table of settings: run folders by name and seed, finished ones left alone, failures told."""

import contextlib
import subprocess
import sys
from pathlib import Path

from fedfreeze.config.file import load_config
from tests.support.checks import ROOT
from tests.support.launching import run, summary, write_config

TABLES = sorted((ROOT / "benchmarks" / "tables").glob("*.txt"))


def sweep(folder: Path, table: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "table.txt").write_text(table)
    config = write_config(folder, train={"rounds": 3}, pace={"policy": "fixed"}, model={"width": 4})
    arguments = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), str(config), "table.txt", "out", *options]
    with contextlib.chdir(folder):
        return run(arguments, timeout_s=300)


def test_runs_each_line_with_each_seed_and_leaves_finished_ones_alone(tmp_path: Path) -> None:
    table = "# a comment\nplain\nfree --fleet.enforce=false   # without caps\n"
    done = sweep(tmp_path, table, "--seeds", "0", "3", "--train.participants=2", "--fleet.enforce=true")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name: summary(path) for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert sorted(found) == ["free-seed0", "free-seed3", "plain-seed0", "plain-seed3"]
    assert {name: told["seed"] for name, told in found.items()} == {name: int(name[-1]) for name in found}
    # a line of the table wins over what is common
    assert found["free-seed0"]["cap_enforcement"] == "none"
    assert found["plain-seed0"]["cap_enforcement"] == "tensor_bytes"
    again = sweep(tmp_path, table, "--seeds", "0", "--train.participants=2", "--fleet.enforce=true")
    assert again.returncode == 0
    assert "is finished already" in (tmp_path / "out" / "plain-seed0.log").read_text()


def test_a_line_that_cannot_run_fails_alone(tmp_path: Path) -> None:
    done = sweep(tmp_path, "good\nbad --train.round=3\n", "--seeds", "0")
    assert done.returncode == 1
    assert "good-seed0: exit 0" in done.stdout
    assert "bad-seed0: exit 64" in done.stdout
    assert "unknown key train.round" in (tmp_path / "out" / "bad-seed0.log").read_text()


def test_shipped_tables_hold_settings_that_exist() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from sweep import read_table
    finally:
        sys.path.pop(0)
    assert TABLES
    for table in TABLES:
        lines = read_table(table)
        assert len({name for name, _ in lines}) == len(lines) > 1
        for _, overrides in lines:
            load_config("digits", overrides)
