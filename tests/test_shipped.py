"""The shipped experiments as they are, to their ends: minutes, so only `bash tests/run.sh --full` runs them."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.support.launching import (
    command,
    kill_tree,
    metrics,
    rounds_done,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
)

pytestmark = pytest.mark.slow
DIGITS = Path("digits")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("digits") / "one"
    assert run(command(DIGITS, run_dir)).returncode == 0
    return run_dir


def test_digits_keeps_what_the_readme_promises(digits: Path) -> None:
    found = summary(digits)
    assert (found["status"], found["exit_code"], found["all_frozen"]) == ("finished", 0, True)
    assert found["stage_reasons"] == ["converged"] * 3
    assert found["final_accuracy"] >= 0.95
    assert found["trained_below_full_memory"] >= 1
    assert 0 < found["memory_cut_peak"] < found["memory_cut_mean"] < 1
    for record in metrics(digits):
        if record["kind"] == "round":
            assert all(peak <= record["cap_mib"][device] for device, peak in record["peak_memory_mib"].items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("torchrun", [False, True], ids=["nproc", "torchrun"])
def test_digits_on_any_number_of_ranks(digits: Path, tmp_path: Path, ranks: int, torchrun: bool) -> None:
    assert run(command(DIGITS, tmp_path / "run", ranks=ranks, by="torchrun" if torchrun else "nproc")).returncode == 0
    print(f"{ranks} ranks: {sha256(tmp_path / 'run')}")
    assert sha256(tmp_path / "run") == sha256(digits)


def test_digits_killed_three_times(digits: Path, tmp_path: Path) -> None:
    """The whole process tree killed with SIGKILL at three random moments, each time on another number of ranks."""
    seed = int(os.environ.get("FEDFREEZE_TEST_SEED", "0"))
    generator = random.Random(seed)
    for ranks in (2, 1, 3):
        process = start(command(DIGITS, tmp_path / "run", ranks=ranks))
        assert wait_for_round(process, tmp_path / "run", rounds_done(tmp_path / "run") + generator.randint(1, 10))
        time.sleep(generator.random())
        assert process.poll() is None
        kill_tree(process)
        print(f"killed after {rounds_done(tmp_path / 'run')} rounds")
    assert run(command(DIGITS, tmp_path / "run", ranks=2)).returncode == 0
    print(f"killed and resumed: {sha256(tmp_path / 'run')}")
    assert sha256(tmp_path / "run") == sha256(digits)


def test_cifar10_starts_on_real_data(cifar10_folder: Path, tmp_path: Path) -> None:
    """A few rounds a stage of the real thing; the whole takes ten minutes and is recorded in benchmarks/results."""
    options = [f"--data.path={cifar10_folder}", "--train.rounds=8", "--pace.policy=fixed"]
    result = run(command(Path("cifar10"), tmp_path / "run", *options, ranks=2), timeout_s=590)
    assert result.returncode == 0, result.stderr
    losses = [record["train_loss"] for record in metrics(tmp_path / "run") if record["kind"] == "round"]
    assert losses[1] < losses[0]
    assert summary(tmp_path / "run")["final_accuracy"] > 0.15
