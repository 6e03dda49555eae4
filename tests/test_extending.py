"""What docs/extending.md shows works as it is copied: own network, selector, pace policy, method and data set."""

import ast
import contextlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.documents import EXTENDING, blocks_of, commands_of
from tests.support.launching import kill_tree, metrics, run, sha256, start, summary, wait_for_round, without_wall_time

NETWORK, SELECTOR, PACE, METHOD = "own-network", "own-selector", "own-pace", "own-method"
TOGETHER = "fedfreeze run own.yaml --nproc 2"
ROUNDS = 14
SHORT_TOGETHER = [f"--train.rounds={ROUNDS}", "--pace.options={patience: 1}", "--train.learning_rate=0.2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of the document."""
    folder = tmp_path_factory.mktemp("project")
    for block in blocks_of(EXTENDING):
        named = re.match(r"# (\S+\.(?:py|yaml))$", block.lines[0])
        if named:
            path = folder / named[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
    return folder


@pytest.fixture(autouse=True)
def _in_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def command_with(part: str) -> str:
    return next(command for command in commands_of(EXTENDING) if part in command)


def arguments(command: str, *options: str) -> list[str]:
    """Return a command of the document for the programs of this environment."""
    program, *rest = shlex.split(command)
    launched = {"fedfreeze": [sys.executable, "-m", "fedfreeze"], "python": [sys.executable]}[program]
    return [*launched, *rest, *options]


def run_written(part: str, *options: str) -> None:
    done = run(arguments(command_with(part), *options))
    assert done.returncode == 0, done.stdout + done.stderr


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if record["kind"] == "round"]


def stages_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run_dir) if record["kind"] == "stage"]


@pytest.fixture(scope="module")
def together(project: Path) -> Path:
    """The network, selector and pace policy of the document in one run, on one rank."""
    with contextlib.chdir(project):
        done = run(arguments(TOGETHER.removesuffix(" --nproc 2"), "--run-dir=runs/one", *SHORT_TOGETHER))
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "runs" / "one"


def test_every_example_names_its_file_and_every_command_is_run_here(project: Path) -> None:
    for block in blocks_of(EXTENDING):
        if block.is_python:
            ast.parse((project / block.lines[0].removeprefix("# ")).read_text())
    parts = [NETWORK, SELECTOR, PACE, METHOD, "make_data.py", "own-data", "--cut", "plan own.yaml", TOGETHER]
    assert sorted(map(command_with, parts)) == sorted(commands_of(EXTENDING))


def test_network(project: Path) -> None:
    run_written(NETWORK, "--train.rounds=3", "--pace.policy=fixed", "--train.local_epochs=1")
    run_dir = project / "runs" / NETWORK
    assert [stage["blocks"] for stage in stages_of(run_dir)] == ["conv1", "conv2", "conv3"]
    weights = load_file(run_dir / "model.safetensors")
    assert weights["conv2.weight"].shape == (64, 32, 3, 3)  # of model.options: a width of 32


def test_selector_chooses_those_that_were_chosen_least(together: Path) -> None:
    cap = caps(together)
    times = dict.fromkeys(cap, 0)
    for record in rounds_of(together):
        selected = record["selected"]
        # whoever has at least the cap of one that was selected was a candidate too
        least = min(cap[device] for device in selected)
        others = [device for device in cap if device not in selected and cap[device] >= least]
        assert max(times[device] for device in selected) <= min(times[device] for device in others)
        if record["round"] == 1:
            assert selected != sorted([*selected, *others])[: len(selected)], "ties go at random"
        for device in selected:
            times[device] += 1


def caps(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "partition.csv").read_text().splitlines()[1:]
    return {int(line.split(",")[0]): float(line.split(",")[1]) for line in lines}


def test_policy_freezes_when_the_loss_has_no_new_minimum(together: Path) -> None:
    ended = [stage for stage in stages_of(together) if stage["reason"] == "converged"]
    assert ended
    for stage in ended:
        losses = [r["train_loss"] for r in rounds_of(together) if r["stage"] == stage["stage"]]
        assert len(losses) == stage["rounds"]
        assert losses[-1] > min(losses)
        assert all(losses[i] < min(losses[:i]) for i in range(1, len(losses) - 1)), "it came too late"


def test_one_rank_is_two_ranks_killed_and_resumed(together: Path, project: Path) -> None:
    two = project / "runs" / "two"
    command = arguments(TOGETHER, f"--run-dir={two}", *SHORT_TOGETHER)
    process = start(command)
    assert wait_for_round(process, two, 6)
    kill_tree(process)
    assert summary(two)["status"] == "running"
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "resumed after round" in done.stdout
    assert summary(two)["world_size"] == 2
    assert sha256(two) == sha256(together)
    assert without_wall_time(metrics(two)) == without_wall_time(metrics(together))


def test_load_model_imports_the_own_network_again(together: Path) -> None:
    import fedfreeze

    network = fedfreeze.load_model(together)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    names = {type(module).__module__ for module in network.modules()}
    assert summary(together)["deployed_stage"] < 2 or "my_project.models" in names


def test_method_keeps_its_velocity_in_the_checkpoint(project: Path) -> None:
    run_written(METHOD, "--train.rounds=2", "--train.local_epochs=1")
    run_dir = project / "runs" / METHOD
    assert summary(run_dir)["method"] == "my_project.methods:ServerMomentum"
    states = [load_file(run_dir / "checkpoints" / f"round-00000{i}" / "weights.safetensors") for i in (1, 2)]
    first, second = (state["server.velocity"] for state in states)
    assert first.abs().max() > 0
    # the first convolution is the head of the flat buffer: its step is the velocity
    name = "network.conv1.weight"
    step = (states[1][name] - states[0][name]).reshape(-1)
    assert step.allclose(second[: step.numel()], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", [SELECTOR, PACE])
def test_each_alone(part: str, project: Path) -> None:
    run_written(part, "--train.rounds=3", "--model.width=8")
    assert len(rounds_of(project / "runs" / part)) == 3


@pytest.mark.slow
def test_plans() -> None:
    run_written("--cut")
    run_written("plan own.yaml")


@pytest.mark.slow
def test_data_set(project: Path) -> None:
    run_written("make_data.py")
    run_written("own-data", "--train.rounds=2", f"--data.cache_dir={project / 'cache'}")
    assert summary(project / "runs" / "own-data")["dataset"] == "my_data"
