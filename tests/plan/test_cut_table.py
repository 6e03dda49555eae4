"""What `plan --cut` prints and writes: the proposal, what it replaces, who goes which way."""

import json
from pathlib import Path

import pytest
import yaml

from fedfreeze.cli import main
from fedfreeze.config.ways import AUTO

SYNTHETIC = [
    "--data.name=synthetic",
    "--data.synthetic_shape=[3, 12, 12]",
    "--data.synthetic_samples=200",
    "--data.partition=iid",
    "--model.name=resnet8",
    "--model.width=4",
    "--train.batch_size=16",
    "--train.fit=auto",
    "--fleet.devices=10",
    "--fleet.memory_cap_mib=[0.4, 0.32, 0.001]",
]


def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    (tmp_path / "small.yaml").write_text(f"data: {{cache_dir: {tmp_path / 'cache'}}}\n")
    code = main(["plan", str(tmp_path / "small.yaml"), "--cut", *SYNTHETIC, *options])
    return code, *capsys.readouterr()


def test_json_has_the_proposal_the_runners_up_and_who_goes_which_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "cut.yaml"
    code, out, _ = planned(tmp_path, capsys, "--share=0.7", "--json", f"--write={written}")
    assert code == 0
    told = json.loads(out)
    chosen, others = told["proposal"], told["runners_up"]
    assert told["reached"]
    assert (told["devices"], told["share"], chosen["eligible"]) == (10, 0.7, 7)
    assert len(chosen["split"]) == chosen["blocks"] == len(chosen["devices_by_way"])
    assert others
    for cut in others:
        assert cut["step_gflop"] > chosen["step_gflop"]
        assert cut["eligible"] == 7
    for cut in (chosen, *others):
        for stage in cut["devices_by_way"]:
            assert list(stage) == list(AUTO)
            assert 7 <= sum(stage.values()) <= 10
    assert {stage["way"] for stage in chosen["stages"]} == set(AUTO)
    assert told["usual"]["split"] == []
    assert len(told["usual"]["stages"]) == 4 * len(AUTO)
    values = yaml.safe_load(written.read_text())
    assert values["model"]["split"] == chosen["split"]
    assert values["train"]["fit"] == "auto"
    assert values["name"] == "cut"


def test_the_terminal_shows_the_trade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = planned(tmp_path, capsys, "--share=0.7")
    assert code == 0
    rows = out.split("the cheapest cut of each number of blocks")[1].splitlines()
    proposals = [line for line in rows if line.strip().startswith("* ") and "7/10" in line]
    assert len(proposals) == 1
    others = [line for line in rows if "7/10" in line and line not in proposals]
    assert others
    assert any("recompute" in line for line in others)
    assert "GFLOP/step, peak " in out
    assert "7 of 10 devices can join every stage" in out
    assert "devices by way, in stage 1: " in out
    assert "train with --model.split='[conv1, " in out
    assert max(len(line.rstrip()) for line in out.splitlines() if "--model.split" not in line) <= 100


def test_one_way_goes_without_saying(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(tmp_path, capsys, "--share=0.4", "--train.fit=whole")
    assert code == 0
    assert "whole" not in out
    assert "GFLOP/step" in out


def test_where_nobody_can_join_there_are_no_mean_operations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = planned(tmp_path, capsys, "--fleet.memory_cap_mib=0.001", "--json")
    assert code == 64
    told = json.loads(out)
    assert not told["reached"]
    assert told["proposal"]["step_gflop"] is None
    peaks = [cut["peak_mib"] for cut in (*told["runners_up"], told["proposal"])]
    assert peaks == sorted(set(peaks), reverse=True)
    assert f"the best has a peak of {peaks[-1]:.2f} MiB and lets 0% join" in err
