"""The configuration under any input: round trips, junk, and what a resume may change."""

import datetime
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfreeze.config.file import (
    config_difference,
    config_values,
    dump_config,
    load_config,
    make_config,
    resume_difference,
)
from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config
from fedfreeze.errors import ConfigError
from tests.support.checks import checked_line

# --- round trips

FINITE = {"allow_nan": False, "allow_infinity": False}
POSITIVE = st.floats(min_value=0, exclude_min=True, **FINITE)
CONFIG_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "seed": st.integers(0, 2**63),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "name": st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
                "path": st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
                "partition": st.sampled_from(["iid", "dirichlet", "shards"]),
                "alpha": POSITIVE,
            },
        ),
        "fleet": st.fixed_dictionaries(
            {},
            optional={
                "devices": st.integers(10, 10**6),
                "memory_cap_mib": st.floats(**FINITE)
                | st.lists(st.floats(**FINITE), max_size=4)
                | st.just("loguniform(1, 2)"),
                "enforce": st.booleans(),
            },
        ),
        "train": st.fixed_dictionaries({}, optional={"learning_rate": POSITIVE, "rounds": st.integers(1, 10**6)}),
        "pace": st.fixed_dictionaries({}, optional={"max_rounds": st.none() | st.integers(1, 10**6)}),
        "method": st.fixed_dictionaries({}, optional={"carry": st.booleans()}),
    },
)


@given(CONFIG_VALUES)
@settings(max_examples=60, deadline=None)
def test_values_of_a_configuration_make_it_again(values):
    config = make_config(values)
    assert make_config(config_values(config)) == config
    assert make_config(yaml.safe_load(dump_config(config))) == config


@given(CONFIG_VALUES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_configuration_written_to_a_file_loads_equal(tmp_path, values):
    config = make_config(values)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config


@pytest.mark.parametrize("name", ["1e3", "3e-2", "007", "true", "null", "2024-01-01", "1_000"])
def test_a_run_with_a_name_like_a_number_can_be_repeated_from_its_file(tmp_path, name):
    config = make_config({"name": name})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config


# --- junk

SECTIONS = [field.name for field in fields(Config)]
KEYS = [name for section in fields(Config) for name in getattr(section.type, "__pydantic_fields__", {})]
KEYS = sorted({*KEYS, "", "x", "a\nb"})
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.binary(max_size=3)
    | st.sampled_from(["iid", "resnet8", "uniform(1, 2)", 10**400, -1, 0, 1, datetime.datetime(2024, 1, 1)])
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(SECTIONS) | st.text(max_size=4),
        st.dictionaries(st.sampled_from(KEYS), NESTED, max_size=3) | NESTED,
        max_size=4,
    )
)
@settings(max_examples=300, deadline=None)
def test_junk_is_a_configuration_or_a_configuration_error(values):
    try:
        assert isinstance(make_config(values), Config)
    except ConfigError as error:
        checked_line(error)


TOKENS = ["train", "rounds", "fleet", "seed", "name", "1", "1e3", ".nan", "2024-01-01", "~", "'", '"', "#", "|", ">"]
TOKENS += ["-", "? ", "[", "]", "{", "}", ": ", ":", ", ", "\n", "\n  ", "\t", "%", "<<", "&x ", "*x"]
TOKENS += ["!!set ", "!!binary "]


@given(st.lists(st.sampled_from(TOKENS), max_size=14).map("".join) | st.text(max_size=20), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_text_in_a_file_or_override_is_a_configuration_error(tmp_path, text, in_file):
    file = Path(tmp_path, "junk.yaml")
    file.write_text(text if in_file else "", encoding="utf-8", errors="replace")
    try:
        load_config(str(file), [] if in_file else [f"--train.rounds={text}"])
    except ConfigError as error:
        checked_line(error)


# --- resume


def test_equal_configurations_do_not_differ():
    assert config_difference(config_values(Config()), config_values(Config())) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": {"rounds": 7}}, "train.rounds was 100 and is now 7"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"pace": {"max_rounds": 9}}, "pace.max_rounds was None and is now 9"),
        ({"data": {"path": "x"}}, "data.path was None and is now 'x'"),
    ],
)
def test_a_difference_names_key_and_both_values(change, says):
    assert config_difference(config_values(Config()), config_values(make_config(change))) == says


def test_what_a_resume_may_change_is_no_difference():
    changed = make_config(
        {
            "comm": {"timeout_s": 5},
            "checkpoint": {"every_rounds": 4, "keep": 3},
            "track": {"wandb": "offline", "group": "g"},
        }
    )
    assert set(RESUME_MAY_DIFFER) == {"comm", "checkpoint", "track"}
    assert config_difference(config_values(Config()), config_values(changed)) is None


def test_where_features_are_kept_is_no_difference_to_a_resume_and_whether_is():
    old = config_values(Config())
    moved = make_config({"cache": {"budget_mib": 1.0, "dir": "/b", "disk_mib": 2.0}})
    assert resume_difference(old, config_values(moved)) is None
    kept = config_values(make_config({"cache": {"features": True}}))
    assert resume_difference(old, kept) == "cache.features was False and is now True"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({}, {"cache_dir": "/b"}, None),
        ({"path": "/a"}, {"path": "/b", "cache_dir": "/c"}, None),
        ({"name": "some/set", "revision": "v1"}, {"path": "/b", "image_column": "scan"}, None),
        ({"path": "/a", "name": "digits"}, {"name": "some/set"}, None),
        ({"name": "some/set"}, {"name": "some/other"}, "data.name was 'some/set' and is now 'some/other'"),
        ({"name": "digits"}, {"name": "synthetic"}, "data.name was 'digits' and is now 'synthetic'"),
        ({"path": "/a"}, {"path": "/b", "image_size": 8}, "data.image_size was None and is now 8"),
        ({"path": "/a"}, {"path": "/b", "alpha": 2.0}, "data.alpha was 0.5 and is now 2.0"),
    ],
)
def test_where_data_lies_is_no_difference_to_a_resume_and_what_is_done_with_it_is(before, after, says):
    old, new = (config_values(make_config({"data": values})) for values in (before, after))
    assert resume_difference(old, new) == says
    assert config_difference(old, new) is not None  # ranks of one start must have the very same
    assert resume_difference({"seed": 0}, {"seed": 0}) is None


def test_a_key_that_only_one_side_has_is_a_difference():
    old = config_values(Config())
    del old["train"]["momentum"]
    assert config_difference(old, config_values(Config())) == "train.momentum was None and is now 0.9"
    del old["train"]
    assert config_difference(old, config_values(Config())).startswith("train was None")
