"""Runs whose selectors ask devices: one result, bit for bit, on one rank and on two."""

from pathlib import Path

import pytest

from tests.support.launching import command, metrics, run, sha256, without_wall_time, write_config


@pytest.mark.parametrize("select", [{"name": "smartfreeze", "refresh_rounds": 2}, {"name": "power_of_choice"}])
def test_devices_asked_together_tell_the_same_on_any_ranks(select: dict, tmp_path: Path) -> None:
    config = write_config(tmp_path, select=select, train={"rounds": 5}, fleet={"devices": 40}, eval={"batch_size": 100})
    found = []
    for ranks in (1, 2):
        done = run(command(config, tmp_path / f"{ranks}", ranks=ranks))
        assert done.returncode == 0, done.stderr
        found.append(tmp_path / f"{ranks}")
    assert sha256(found[0]) == sha256(found[1])
    assert without_wall_time(metrics(found[0])) == without_wall_time(metrics(found[1]))
    assert max(record["probed"] for record in metrics(found[0]) if record["kind"] == "round") > 5
