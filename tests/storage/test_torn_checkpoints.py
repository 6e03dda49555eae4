"""Checkpoints and deployed networks that are torn, foreign or pickled: the one before, or one line; never executed."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfreeze
from fedfreeze.errors import DataError
from tests.support.in_process import TINY, Outcome, assert_refused, note, tree
from tests.support.launching import sha256, summary
from tests.support.tiny_runs import assert_no_leftovers, assert_same, go

# --- checkpoints


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def unfinished(here: Path, whole: Path) -> Path:
    """The undisturbed run as if it had been killed before its end, to be spoilt."""
    shutil.copytree(whole, here / "run")
    (here / "run" / "model.safetensors").unlink()
    status = summary(here / "run") | {"status": "running", "exit_code": None}
    (here / "run" / "summary.json").write_text(json.dumps(status))
    return here / "run"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints, the newest first."""
    found = sorted((run_dir / "checkpoints").glob("round-*"), reverse=True)
    assert len(found) == 2
    return found


def tear(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state of a checkpoint, with the right digest."""
    outer = json.loads((folder / "state.json").read_text())
    content = json.loads(outer["content"])
    change(content)
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps({"content": text, "digest": digest}))


def pickled(folder: Path, *, archive: bool) -> None:
    """Put a pickle in place of the weights, with the right digest."""
    weights, trap = folder / "weights.safetensors", Trap(folder.parent.parent.parent / "sprung")
    torch.save({"w": trap}, weights) if archive else weights.write_bytes(pickle.dumps(trap))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(weights_digest=digest))


def pickled_update(folder: Path) -> None:
    rewrite(folder, lambda content: content.update(updates=[[1, "0" * 64]]))
    place = folder.parent / "updates" / "round-000001.safetensors"
    place.write_bytes(pickle.dumps(Trap(folder.parent.parent.parent / "sprung")))
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(updates=[[1, digest]]))


def as_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


SPOILT: dict[str, Callable[[Path], object]] = {
    "torn weights": tear,
    "no weights": lambda folder: (folder / "weights.safetensors").unlink(),
    "a pickle for weights": lambda folder: pickled(folder, archive=False),
    "a torch archive for weights": lambda folder: pickled(folder, archive=True),
    "a pickle for an update": pickled_update,
    "state.json garbage": lambda folder: (folder / "state.json").write_bytes(bytes(range(256))),
    "state.json of another kind": lambda folder: (folder / "state.json").write_text('["state"]'),
    "state.json empty": lambda folder: (folder / "state.json").write_text(""),
    "state.json without its state": lambda folder: rewrite(folder, lambda content: content.pop("state")),
    "state.json deep": lambda folder: (folder / "state.json").write_text("[" * 10**6),
    "a file for a checkpoint": as_folder,
}

STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a state without the coordinator": lambda content: content["state"].pop("coordinator"),
    "a state without inputs": lambda content: content["state"].pop("inputs"),
    "a coordinator without its round": lambda content: content["state"]["coordinator"].pop("round"),
    "a length that is text": lambda content: content["state"].update(metrics_bytes="all"),
    "a state that is a list": lambda content: content.update(state=[1]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_newest_checkpoint_falls_back(name: str, unfinished: Path, whole: Path) -> None:
    newest = checkpoints(unfinished)[0]
    SPOILT[name](newest)
    outcome = go(unfinished.parent)
    note(f"newest checkpoint: {name}", "run again", outcome.code, outcome.out.splitlines()[0] if outcome.out else "")
    assert not (unfinished.parent / "sprung").exists()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count(f"notice: checkpoint {newest.name} is torn") == 1
    assert "notice: resumed after round 5" in outcome.out
    assert_same(unfinished, whole)


@pytest.mark.parametrize("name", [f"both: {name}" for name in SPOILT])
def test_two_spoilt_checkpoints_are_an_error(name: str, unfinished: Path) -> None:
    for folder in checkpoints(unfinished):
        SPOILT[name.removeprefix("both: ")](folder)
    before = tree(unfinished / "checkpoints")
    outcome = go(unfinished.parent)
    note(f"both checkpoints: {name.removeprefix('both: ')}", "run again", outcome.code, outcome.err)
    assert not (unfinished.parent / "sprung").exists()
    says = ("none of the 2 checkpoints in run/checkpoints can be read", "delete the run folder")
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 65, *says)
    assert tree(unfinished / "checkpoints") == before
    assert_no_leftovers(unfinished)


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_program_is_no_traceback(name: str, unfinished: Path, whole: Path) -> None:
    """The digest is right, so that the file is as it was written, but not by this fedfreeze."""
    rewrite(checkpoints(unfinished)[0], STATES[name])
    outcome = go(unfinished.parent)
    note(f"checkpoint: {name}", "run again", outcome.code, outcome.err or outcome.out.splitlines()[0])
    assert "Traceback" not in outcome.out + outcome.err
    if outcome.code == 0:
        assert_same(unfinished, whole)
    else:
        assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 65, "checkpoint")


def test_a_checkpoint_of_a_future_version(unfinished: Path) -> None:
    newest = checkpoints(unfinished)[0]
    rewrite(newest, lambda content: content.update(version=99))
    before = tree(unfinished / "checkpoints")
    outcome = go(unfinished.parent)
    note("checkpoint of a future version", "run again", outcome.code, outcome.err)
    says = (newest.name, "has format 99, this fedfreeze reads", "use the version that wrote it")
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 65, *says)
    assert tree(unfinished / "checkpoints") == before


def test_a_checkpoint_of_an_older_version_says_what_it_lacks_and_who_wrote_it(unfinished: Path) -> None:
    for folder in checkpoints(unfinished):
        rewrite(folder, lambda content: content.update(fedfreeze="0.0.7"))
        rewrite(folder, lambda content: content["state"]["coordinator"].pop("peak_bytes"))
    outcome = go(unfinished.parent)
    says = (
        "none of the 2 checkpoints",
        f"lacks 'peak_bytes', which fedfreeze {fedfreeze.__version__} needs; fedfreeze 0.0.7",
    )
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 65, *says)


def test_a_checkpoint_that_lacks_what_has_a_default_goes_on_to_the_same_bits(unfinished: Path, whole: Path) -> None:
    for folder in checkpoints(unfinished):
        rewrite(folder, lambda content: content.pop("fedfreeze"))
        rewrite(folder, lambda content: content["state"].pop("round_s"))
        rewrite(folder, lambda content: content["state"]["coordinator"].pop("small_batch_rounds"))
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for name in ("late", "level", "probed", "probe_s", "emulated_s", "tensor_peak_mib", "participation"):
            record.pop(name, None)
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    outcome = go(unfinished.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert sha256(unfinished) == sha256(whole)


def test_checkpoints_of_another_network(unfinished: Path) -> None:
    config = unfinished / "config.yaml"
    config.write_text(config.read_text().replace("mine:tiny", "other:tiny"))
    (unfinished.parent / "other.py").write_text(TINY.replace("4", "5"))
    outcome = go(unfinished.parent, "run", "--model.factory=other:tiny")
    note("checkpoints of another network", "run again", outcome.code, outcome.err)
    says = ("the checkpoints in run are of another network", "use another --run-dir")
    assert_refused(Outcome(outcome.code, outcome.out, outcome.err, []), 65, *says)


@pytest.mark.parametrize("content", ["pickle", "torn", "none"])
def test_a_deployed_network_that_is_none(content: str, here: Path, whole: Path, monkeypatch: Any) -> None:
    """`load_model` tells it as an error of its own."""
    shutil.copytree(whole, here / "run")
    model = here / "run" / "model.safetensors"
    if content == "none":
        model.unlink()
    else:
        torn = model.read_bytes()[:-5]
        model.write_bytes(pickle.dumps(Trap(here / "sprung")) if content == "pickle" else torn)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    try:
        with pytest.raises(DataError, match=r"model\.safetensors"):
            fedfreeze.load_model("run")
    finally:
        sys.modules.pop("mine", None)


def test_a_pickle_for_the_deployed_network_is_not_executed(here: Path, whole: Path, monkeypatch: Any) -> None:
    shutil.copytree(whole, here / "run")
    (here / "run" / "model.safetensors").write_bytes(pickle.dumps(Trap(here / "sprung")))
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(Exception, match="header"):
        fedfreeze.load_model("run")
    sys.modules.pop("mine", None)
    assert not (here / "sprung").exists()


def test_the_trap_would_spring(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()
