"""The command line: every mistake is one line with its exit code, and leaves nothing half-written."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.cli import main
from fedfreeze.errors import ExitCode
from tests.support.checks import ROOT
from tests.support.launching import ENVIRONMENT, command, metrics, run, summary, write_config

BAD_CONFIGURATIONS = {
    "unknown key": (["--train.roundz=3"], "unknown key train.roundz; did you mean train.rounds?"),
    "unknown section": (["--trian.rounds=3"], "unknown section trian; did you mean train?"),
    "wrong type": (["--train.rounds=many"], "train.rounds: 'many'"),
    "out of range": (["--train.momentum=1.5"], "train.momentum: 1.5: Input should be less than 1"),
    "not in the list": (["--method.name=fedprox"], "allowed: smartfreeze, fedavg"),
    "participants beyond devices": (["--train.participants=99"], "99 is more than fleet.devices (24)"),
    "no override": (["rounds=3"], "unexpected argument 'rounds=3'"),
    "a fleet in which nobody holds a stage": (
        ["--fleet.memory_cap_mib=0.2"],
        "the smallest cap that holds every stage is 0.",
    ),
    "a cap that is none": (["--fleet.memory_cap_mib=uniform(9,3)"], "low <= high"),
    "fewer rounds than stages": (["--train.rounds=2", "--pace.policy=fixed"], "less than the 3 stages"),
    "a batch too small for batch norm": (
        ["--train.batch_size=1", "--model.name=resnet10"],
        "train.batch_size: 1 is too small",
    ),
    "a CSV that is missing": (["--fleet.memory_cap_mib=none.csv"], "none.csv cannot be read"),
}


@pytest.mark.parametrize("case", BAD_CONFIGURATIONS)
def test_bad_configuration(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, says = BAD_CONFIGURATIONS[case]
    config = write_config(tmp_path)
    assert main(["run", str(config), "--run-dir", str(tmp_path / "deep" / "run"), *options]) == ExitCode.BAD_CONFIG
    assert_one_line(capfd.readouterr().err, says)
    assert not (tmp_path / "deep").exists()


def assert_one_line(err: str, says: str) -> None:
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("fedfreeze: error: ")
    assert says in lines[0]


def test_data_that_is_missing_or_torn(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    write_parquet: Callable[..., Path],
) -> None:
    config = write_config(tmp_path, data={"cache_dir": str(tmp_path / "cache")})
    run_dir = tmp_path / "run"
    arguments = ["run", str(config), "--run-dir", str(run_dir)]
    assert main([*arguments, f"--data.path={tmp_path / 'nowhere'}"]) == ExitCode.BAD_DATA
    assert_one_line(capfd.readouterr().err, "nowhere is not a folder")
    folder = tmp_path / "torn"
    folder.mkdir()
    images = [np.full((8, 8), shade, np.uint8) for shade in range(8)]
    for split in ("train", "test"):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", images, [0, 1] * 4)
    train = folder / "train-00000-of-00001.parquet"
    train.write_bytes(train.read_bytes()[:-40])
    assert main([*arguments, f"--data.path={folder}"]) == ExitCode.BAD_DATA
    assert_one_line(capfd.readouterr().err, str(folder))
    assert not run_dir.exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_plan_prints_every_stage_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert main(["plan", str(config), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["blocks"] for row in plan["stages"]] == ["conv1..layer1", "layer2", "layer3", "full model"]
    caps = [0.33, 0.4, 0.6, 0.9] * 6
    for row in plan["stages"]:
        assert row["eligible"] == sum(cap >= row["memory_mib"] for cap in caps)
    assert main(["plan", str(config)]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 100 for line in table.splitlines())
    for row in plan["stages"]:
        assert f"{row['memory_mib']:.2f}" in table
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


def test_plan_says_what_devices_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    options = ["--train.prefix=stored", "--data.augment=crop_flip", "--data.views=3", "--data.partition=iid"]
    assert main(["plan", str(config), "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert rows[0]["feature_kib"] == rows[-1]["flash_mib"] == 0
    for row in rows[1:-1]:
        samples = row["flash_mib"] * 1024 / row["feature_kib"] / 3
        assert samples == pytest.approx(1437 / 24, abs=1)  # of the device with most
    assert main(["plan", str(config), *options]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 100 for line in table.splitlines())
    assert "flash" in table
    assert f"{rows[1]['flash_mib']:.2f}" in table
    assert "for 3 views of each sample" in table
    assert "and of the first of each device, in which it stores" in table
    assert rows[0]["first_round_s_median"] == rows[0]["round_s_median"]
    assert all(row["first_round_s_median"] > row["round_s_median"] for row in rows[1:-1])
    assert main(["plan", str(config), *options, "--method.name=fedavg"]) == 0
    table = capsys.readouterr().out
    assert "flash" not in table
    assert "frozen: share of a step's FLOPs" in table


def test_help_lists_exit_codes_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for code in ExitCode:
        assert f"{code.value:>3}  {code.help_text}" in text
    assert "--pace.slope_limit=0.002" in text
    assert "least" in text


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run"], ["run", "digits", "--nproc", "0"], ["run", "digits", "--x"]]
)
def test_usage_mistakes(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == ExitCode.BAD_CONFIG
    assert_one_line(capfd.readouterr().err, "")


def test_cuda_asked_for_and_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = write_config(tmp_path)
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run"), "--train.device=cuda"]) == 69
    assert_one_line(capfd.readouterr().err, "train.device is cuda, but torch finds no CUDA device")


def test_several_ranks_tell_a_mistake_once(tmp_path: Path) -> None:
    """A mistake that only rank 0 meets (no device holds a stage) ends all ranks with its code, without a traceback."""
    config = write_config(tmp_path, fleet={"memory_cap_mib": 0.2})
    result = run(command(config, tmp_path / "run", ranks=3))
    assert result.returncode == ExitCode.BAD_CONFIG
    assert_one_line(result.stderr, "no device holds stage")
    assert not (tmp_path / "run").exists()


def test_torchrun_and_nproc_together_are_refused(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    arguments = command(write_config(tmp_path), tmp_path / "run", ranks=2)
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == ExitCode.BAD_CONFIG
    assert_one_line(result.stderr, "--nproc 2 under torchrun")


def test_a_job_of_several_tasks_in_which_srun_was_forgotten(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    arguments = command(write_config(tmp_path), tmp_path / "run")[:-2]  # without --nproc, which says that one is meant
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == ExitCode.BAD_CONFIG
    assert_one_line(result.stderr, "this SLURM job has 2 tasks, but fedfreeze was started once; use `srun")


def test_another_configurations_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, train={"rounds": 3}, pace={"policy": "fixed"})
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    assert summary(tmp_path / "run")["status"] == "finished"
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    capfd.readouterr()
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run"), "--seed=1"]) == ExitCode.BAD_CONFIG
    assert_one_line(capfd.readouterr().err, "holds another run: seed was 0 and is now 1")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_a_device_that_cannot_learn_is_left_out_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those without samples enough are not selected; where all of a run diverged, it does not end as finished."""
    config = write_config(
        tmp_path,
        data={"alpha": 0.01},
        fleet={"devices": 300, "memory_cap_mib": 1.0},
        train={"rounds": 3, "participants": 120},
        pace={"policy": "fixed"},
    )
    assert main(["run", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    rounds = [record for record in metrics(tmp_path / "run") if record["kind"] == "round"]
    rows = list(csv.DictReader((tmp_path / "run" / "partition.csv").open()))
    samples = [int(row["samples"]) for row in rows]
    assert (len(samples), sum(samples)) == (300, 1437)
    able = [device for device in range(300) if samples[device] >= 2]
    assert [record["selected"] for record in rounds] == [able] * 3
    assert [record["failed"] for record in rounds] == [{}] * 3
    assert f"{300 - len(able)} of 300 devices have no sample or one" in capfd.readouterr().out

    wild = ["run", str(config), "--run-dir", str(tmp_path / "wild"), "--train.learning_rate=1e30"]
    for _ in range(2):  # started again, it says so again
        assert main(wild) == ExitCode.BAD_CONFIG
        assert_one_line(capfd.readouterr().err, "no device completed any of the 3 rounds")
        figures = summary(tmp_path / "wild")
        assert (figures["status"], figures["exit_code"], figures["rounds"]) == ("failed", 64, 3)
        assert (figures["participation"], figures["all_frozen"]) == (0, False)
        assert figures["final_accuracy"] is not None
        assert not (tmp_path / "wild" / "model.safetensors").exists()
    records = metrics(tmp_path / "wild")
    rounds = [record for record in records if record["kind"] == "round"]
    assert all(reason.startswith("diverged: ") for record in rounds for reason in record["failed"].values())
    assert [record["train_loss"] for record in rounds] == [None] * 3
    assert [(record["reason"], record["device_rounds"]) for record in records if record["kind"] == "stage"] == [
        ("fixed", 0)
    ] * 3


@pytest.mark.parametrize("program", [["-m", "fedfreeze"], ["-u", "-m", "fedfreeze"], ["-P", "-m", "fedfreeze"]])
def test_files_of_the_working_folder_do_not_stand_for_packages(program: list[str], tmp_path: Path) -> None:
    """Nor for modules of Python; but fedfreeze itself may lie there."""
    for name in ("typing", "signal", "random", "select", "json", "yaml", "pydantic", "numpy", "torch", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user's {name}')\n")
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    if "-P" not in program:  # as in a checkout that is not installed
        (tmp_path / "fedfreeze").symlink_to(ROOT / "fedfreeze")
        del environment["PYTHONPATH"]
    asked = [sys.executable, *program, "run", "digits", "--show-run-dir"]
    result = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "runs/digits\n", "")
