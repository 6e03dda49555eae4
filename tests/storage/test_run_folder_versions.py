"""The run folder of another version of fedfreeze: keys that it lacks, keys that it alone knows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedfreeze
from fedfreeze.config.file import config_values, load_config, writer_of
from fedfreeze.config.schema import BEFORE
from fedfreeze.errors import ConfigError
from fedfreeze.storage.run_folder import RunFolder
from tests.support.checks import assert_one_line
from tests.support.locked import config


def without(path: Path, *keys: str, **more: Any) -> None:
    """Make config.yaml that of another version: without some keys, with others, and a summary.json beside it."""
    values = yaml.safe_load((path / "config.yaml").read_text())
    for key in keys:
        section, _, name = key.partition(".")
        del (values[section] if name else values)[name or section]
    for section, change in more.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    summary = {"versions": {"fedfreeze": "0.0.7"}, "git_revision": "abc123"}
    (path / "summary.json").write_text(json.dumps(summary))


def test_config_yaml_says_which_version_wrote_it(begun):
    assert writer_of(begun / "config.yaml") == fedfreeze.__version__
    assert writer_of(begun / "none.yaml") is None


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        (["train.momentum"], "taken for them: train.momentum=0.9"),
        (["train.momentum", "pace.window"], "taken for them: train.momentum=0.9, pace.window="),
        (["select"], "taken for them: select.name="),
        (["seed"], "taken for them: seed=0"),
    ],
)
def test_a_key_that_an_older_config_yaml_lacks_has_its_default_with_a_notice(begun, lacks, told):
    without(begun, *lacks)
    folder = RunFolder(begun)
    (notice,) = folder.open(config(train={"momentum": 0.9}))
    assert "by fedfreeze 0.0.7 (revision abc123), lacks keys that are known now" in notice
    assert told in notice
    folder.claim(config())
    folder.close()
    assert RunFolder(begun).open(config()) == []  # said once: now it has them


def test_the_default_of_a_key_that_is_lacking_is_held_against_what_is_asked_now(begun):
    without(begun, "train.momentum")
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun).open(config(train={"momentum": 0.5}))
    assert_one_line(
        caught.value,
        "train.momentum was 0.9 and is now 0.5 (",
        "lacks it, so it was 0.9; go on with --train.momentum=0.9",
    )


def test_keys_of_what_may_differ_are_not_missed(begun):
    without(begun, "comm.join_s", "checkpoint", "track.tags")
    assert RunFolder(begun).open(config()) == []


@pytest.mark.parametrize(
    "more", [{"train": {"warp": 3}}, {"warp": 3}, {"engine": {"warp": 3}}, {"select": {"warp": 3}}]
)
def test_a_key_of_a_newer_version_is_named_with_that_version(begun, more):
    without(begun, **more)
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun).open(config())
    known = f"which fedfreeze {fedfreeze.__version__} does not know; fedfreeze 0.0.7 (revision abc123) wrote it"
    assert_one_line(caught.value, "warp", "3", known, "--run-dir")
    assert not (begun / "lock").exists()


def test_a_key_of_a_newer_version_that_may_differ_is_left_out_with_a_notice(begun):
    without(begun, comm={"warp": 3})
    (notice,) = RunFolder(begun).open(config())
    assert "comm.warp=3" in notice
    assert "left out" in notice


def test_a_configuration_of_a_newer_version_says_so_wherever_it_is_read(begun):
    path = begun / "config.yaml"
    path.write_text("# written by fedfreeze 9.8.7\ntrain: {warp: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown key train\.warp.*was written by fedfreeze 9\.8\.7, this is "):
        load_config(str(path))
    path.write_text("# my own\ntrain: {warp: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown key train\.warp") as caught:
        load_config(str(path))
    assert "written by" not in str(caught.value)


def test_a_key_whose_default_is_not_what_older_versions_did_must_be_given(begun):
    """Blocks started anew before there was a choice; a run that goes on must not change its method on the way."""
    assert config().method.start == "surrogate"
    without(begun, "method.start", "method.start_kept", "method.window")
    with pytest.raises(ConfigError) as caught:
        RunFolder(begun).open(config())
    told = ("method.start was 'anew' and is now 'surrogate'", 'go on with --method.start="anew"')
    assert_one_line(caught.value, *told)
    (notice,) = RunFolder(begun).open(config(method={"start": "anew"}))
    assert "taken for them: method.start='anew', method.start_kept=0.3, method.window=1" in notice


def test_what_older_versions_did_is_known_of_keys_that_there_are():
    values = config_values(config())
    for key, value in BEFORE.items():
        section, _, name = key.partition(".")
        assert values[section][name] != value
