"""The user's own code has digests: a change between two lives of a run is told, and compare parts such runs."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedfreeze
from fedfreeze.plugins import code_digests
from tests.support.in_process import TINY, attempt, quiet_process
from tests.support.launching import sha256, summary
from tests.support.tiny_runs import go, write

SOURCES = {
    "proj/__init__.py": "",
    "proj/models.py": "import yaml, json\nfrom . import layers\nfrom proj.deep.more import thing\nimport helper\n",
    "proj/layers.py": "def later():\n    import lazily\n",
    "proj/deep/__init__.py": "",
    "proj/deep/more.py": "from .. import layers\nfrom ..extra import *\nthing = 1\n",
    "proj/extra.py": "from fedfreeze.seeds import numpy_generator\n",
    "proj/unused.py": "",
    "helper.py": "import importlib\nnames = importlib.import_module('named')\n",
    "lazily.py": "",
    "named.py": "",
    "selector.py": "import helper\n",
    "alone.py": "x = 1\n",
}
USED = {"proj", "proj.models", "proj.layers", "proj.deep", "proj.deep.more", "proj.extra", "helper", "lazily", "named"}


def digests(folder: Path, *names: str | None, sources: dict[str, str] = SOURCES) -> dict[str, str]:
    """Return the digests of code in a folder of its own, imported from there."""
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with quiet_process(folder, {}):
        sys.path.append(str(folder))
        for name in names:
            if name is not None and ":" in name:
                importlib.import_module(name.partition(":")[0])
        return code_digests(names)


def test_what_code_is_made_of(tmp_path: Path) -> None:
    assert set(digests(tmp_path, "proj.models:net")) == USED
    assert set(digests(tmp_path, None, "smartfreeze", "alone:x", "selector:S")) == {
        "alone",
        "selector",
        "helper",
        "named",
    }
    assert digests(tmp_path, None, "smartfreeze", "uniform") == {}


@pytest.mark.parametrize(
    ("changed", "tells"),
    [
        ("proj/models.py", "proj.models"),
        ("helper.py", "helper"),
        ("lazily.py", "lazily"),
        ("proj/deep/__init__.py", "proj.deep"),
        ("proj/unused.py", None),
        ("alone.py", None),
    ],
)
def test_copies_are_the_same_and_a_change_is_told_by_its_module(
    changed: str, tells: str | None, tmp_path: Path
) -> None:
    one = digests(tmp_path / "one", "proj.models:net")
    assert digests(tmp_path / "deep" / "two", "proj.models:net") == one
    other = digests(tmp_path / "three", "proj.models:net", sources=SOURCES | {changed: SOURCES[changed] + "# more\n"})
    assert [name for name in one if one[name] != other[name]] == ([] if tells is None else [tells])


def test_an_installed_package_that_is_named_counts_as_a_whole() -> None:
    import yaml

    found = code_digests(["yaml.nodes:Node"])
    modules = {f"yaml.{path.stem}" for path in Path(yaml.__file__).parent.glob("*.py")} - {"yaml.__init__"} | {"yaml"}
    assert set(found) == modules


@pytest.fixture
def two_lives(tmp_path: Path) -> Iterator[Path]:
    """A whole run, and one that was killed after round 5 of 6."""
    write(tmp_path)
    assert go(tmp_path, "whole").code == 0
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (killed / "model.safetensors").unlink()
    shutil.rmtree(killed / "checkpoints" / "round-000006")
    (killed / "summary.json").write_text(json.dumps(summary(killed) | {"status": "running", "exit_code": None}))
    return tmp_path


def test_a_network_that_changed_between_two_lives_is_told_and_compared_apart(two_lives: Path) -> None:
    before = summary(two_lives / "whole")
    assert list(before["own_code"]) == ["mine"]
    assert before["code_changes"] == []
    changed = (two_lives / "mine.py").read_text().replace("nn.ReLU()", "nn.Tanh( )")
    (two_lives / "mine.py").write_text(changed)
    outcome = go(two_lives)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("notice: your own code has changed since round 5 (mine): the run goes on with it") == 1
    after = summary(two_lives / "run")
    assert after["own_code"] != before["own_code"]
    assert after["code_changes"] == [{"round": 5, "modules": ["mine"], "before": before["own_code"]}]
    assert sha256(two_lives / "run") != sha256(two_lives / "whole")

    # the seed of a third run is of neither setting: it had the new code from the start
    assert go(two_lives, "third", "--seed=1").code == 0
    outcome = attempt(two_lives, "compare", "whole", "run", "third", "--json")
    assert outcome.code == 0
    settings = json.loads(outcome.out)["settings"]
    assert len({setting["values"]["own_code"] for setting in settings}) == 3
    assert [len(setting["runs"]) for setting in settings] == [1, 1, 1]
    assert "run: its own code changed after round 5 (mine)" in outcome.out

    with quiet_process(two_lives, {}):
        sys.path.insert(0, str(two_lives))
        with pytest.warns(UserWarning, match=r"has changed since .*whole was run"):
            fedfreeze.load_model(str(two_lives / "whole"))


def test_code_that_did_not_change_is_not_told(two_lives: Path) -> None:
    (two_lives / "beside.py").write_text("x = 1\n")
    outcome = go(two_lives)
    assert outcome.code == 0
    assert "your own code" not in outcome.out
    assert summary(two_lives / "run")["code_changes"] == []
    assert sha256(two_lives / "run") == sha256(two_lives / "whole")
    assert go(two_lives, "second", "--seed=1").code == 0
    settings = json.loads(attempt(two_lives, "compare", "whole", "second", "--json").out)["settings"]
    assert [len(setting["runs"]) for setting in settings] == [2]
    # a run of a version that did not note its code is not averaged with one that did
    unknown = {
        key: value for key, value in summary(two_lives / "second").items() if key not in ("own_code", "code_changes")
    }
    (two_lives / "second" / "summary.json").write_text(json.dumps(unknown))
    settings = json.loads(attempt(two_lives, "compare", "whole", "second", "--json").out)["settings"]
    assert sorted(len(setting["runs"]) for setting in settings) == [1, 1]
    assert TINY in (two_lives / "mine.py").read_text()
