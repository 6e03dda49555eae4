"""Configuration: what is accepted, what every mistake is told as, and that a written configuration reads back equal."""

from dataclasses import asdict, fields

import pytest

from fedfreeze.config.file import (
    load_config,
    make_config,
    shipped_experiments,
)
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from tests.support.checks import checked_line


def refused(values: dict) -> str:
    """Return the one line with which values are refused."""
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    return checked_line(caught.value)


@pytest.fixture
def read(tmp_path):
    """Return a function that loads YAML text as a file, with overrides."""

    def load(text: str, *overrides: str) -> Config:
        file = tmp_path / "written.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(str(file), overrides)

    return load


@pytest.fixture
def read_refused(read):
    """Return a function that gives the one line with which YAML text is refused."""

    def refuse(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(text, *overrides)
        return checked_line(caught.value)

    return refuse


# --- what is accepted


def test_nothing_given_means_all_defaults(read):
    assert make_config({}) == Config()
    assert read("") == make_config({"name": "written"})
    assert asdict(Config())["train"]["rounds"] == 100


def test_a_section_with_nothing_under_it_means_its_defaults(read):
    assert read("train:\n").train == Config().train


def test_an_override_into_a_section_with_nothing_under_it(read):
    assert read("train:\n", "--train.rounds=3").train.rounds == 3


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "1.0e-3", "0.001"])
def test_every_way_to_write_a_float_is_a_float(read, text):
    rate = read(f"train: {{learning_rate: {text}}}").train.learning_rate
    assert isinstance(rate, float)
    assert rate == pytest.approx(0.001, rel=1e-15)


def test_1e_minus_3_in_an_override_is_a_float(read):
    assert read("", "--pace.slope_limit=1e-3").pace.slope_limit == 0.001


def test_quoted_1e_minus_3_stays_text(read_refused):
    assert "train.learning_rate: '1e-3'" in read_refused("train: {learning_rate: '1e-3'}")


def test_a_whole_number_is_taken_for_a_float():
    config = make_config({"train": {"learning_rate": 1}, "fleet": {"memory_cap_mib": [4, 8.5]}})
    assert config.train.learning_rate == 1.0
    assert config.fleet.memory_cap_mib == [4.0, 8.5]
    assert isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize("cap", [300, 2.5, [1, 2.5], "uniform(1, 2)", "caps.csv"])
def test_every_form_of_a_cap_is_accepted(cap):
    assert make_config({"fleet": {"memory_cap_mib": cap}}).fleet.memory_cap_mib == cap


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_every_shipped_experiment_loads_under_its_own_name(name):
    config = load_config(name)
    assert config.name == name
    assert config.train.participants <= config.fleet.devices


def test_the_shipped_experiments_that_scripts_rely_on():
    assert {"digits", "cifar10"} <= set(shipped_experiments())
    assert load_config("digits").fleet.devices == 20
    assert load_config("cifar10").fleet.devices == 100


def test_name_defaults_to_the_file_and_yields_to_what_the_file_says(read):
    assert read("seed: 1").name == "written"
    assert read("name: other").name == "other"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(read):
    config = read("seed: 1\ntrain: {rounds: 5, batch_size: 7}", "--train.rounds=6", "train.rounds=8", "--seed=9")
    assert (config.train.rounds, config.train.batch_size, config.seed) == (8, 7, 9)


def test_override_values_are_read_as_yaml(read):
    config = read(
        "",
        "--fleet.memory_cap_mib=[1, 2.5]",
        "--method.carry=false",
        "--pace.max_rounds=null",
        "--data.path=a=b/c",
    )
    assert config.fleet.memory_cap_mib == [1.0, 2.5]
    assert config.method.carry is False
    assert config.pace.max_rounds is None
    assert config.data.path == "a=b/c"


@pytest.mark.parametrize("name", ["007", "1e3", "true", "2024-01-01", "1.5"])
def test_a_name_override_is_text_however_it_looks(read, name):
    assert read("", f"--name={name}").name == name


def test_max_rounds_may_equal_min_rounds_and_all_devices_may_take_part():
    config = make_config({"pace": {"min_rounds": 4, "max_rounds": 4}, "fleet": {"devices": 10}})
    assert (config.pace.max_rounds, config.train.participants, config.fleet.devices) == (4, 10, 10)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().seed = 1


def test_every_key_has_a_description():
    for section in fields(Config):
        described = Config.__pydantic_fields__[section.name]
        assert described.description
        for name, inner in getattr(section.type, "__pydantic_fields__", {}).items():
            assert inner.description, f"{section.name}.{name}"


# --- what is refused, and how it is said


def test_unknown_key_names_the_nearest_and_all_allowed():
    message = refused({"train": {"round": 3}})
    assert "unknown key train.round;" in message
    assert "did you mean train.rounds?" in message
    assert "train.batch_size" in message


def test_unknown_section_names_the_nearest_and_all_allowed():
    message = refused({"trian": {"rounds": 3}})
    assert "unknown key trian;" in message
    assert "did you mean train?" in message
    assert "checkpoint" in message


def test_an_unknown_key_like_no_other_gets_no_guess():
    message = refused({"zzzzzz": 1})
    assert "did you mean" not in message
    assert "allowed: name, seed" in message


def test_first_of_two_unknown_keys_is_named():
    assert "unknown key a;" in refused({"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "rounds", True, "valid integer"),
        ("train", "rounds", "12", "valid integer"),
        ("train", "rounds", 1.0, "valid integer"),
        ("train", "rounds", None, "valid integer"),
        ("train", "rounds", [3], "valid integer"),
        ("train", "rounds", {"a": 1}, "valid integer"),
        ("train", "learning_rate", True, "valid number"),
        ("train", "learning_rate", "0.1", "valid number"),
        ("method", "carry", 1, "valid boolean"),
        ("method", "carry", "true", "valid boolean"),
        ("data", "name", 7, "valid string"),
        ("data", "path", 7, "valid string"),
        ("pace", "max_rounds", "x", "valid integer"),
        ("fleet", "memory_cap_mib", True, "valid number"),
        ("fleet", "memory_cap_mib", [1, "a"], "valid number"),
        ("fleet", "memory_cap_mib", [1, True], "valid number"),
        ("fleet", "memory_cap_mib", {"a": 1}, "valid number"),
    ],
)
def test_wrong_type_names_key_value_and_what_is_wanted(section, key, value, says):
    message = refused({section: {key: value}})
    assert message.startswith(f"{section}.{key}: {value!r}")
    assert says in message


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "rounds", 0, "greater than or equal to 1"),
        ("train", "participants", -1, "greater than or equal to 1"),
        ("train", "learning_rate", 0, "greater than 0"),
        ("train", "learning_rate", -0.1, "greater than 0"),
        ("train", "momentum", 1, "less than 1"),
        ("train", "momentum", -0.1, "greater than or equal to 0"),
        ("train", "weight_decay", -1e-9, "greater than or equal to 0"),
        ("train", "threads_per_rank", 0, "greater than or equal to 1"),
        ("data", "alpha", 0, "greater than 0"),
        ("data", "shards_per_device", 0, "greater than or equal to 1"),
        ("model", "width", 0, "greater than or equal to 1"),
        ("fleet", "devices", 0, "greater than or equal to 1"),
        ("pace", "window", 1, "greater than or equal to 2"),
        ("pace", "slope_window", 1, "greater than or equal to 2"),
        ("pace", "slope_limit", 0, "greater than 0"),
        ("pace", "checks", 0, "greater than or equal to 1"),
        ("pace", "relative_level", 1.1, "less than or equal to 1"),
        ("pace", "max_rounds", 0, "greater than or equal to 1"),
        ("comm", "timeout_s", 0, "greater than 0"),
        ("eval", "every_rounds", 0, "greater than or equal to 1"),
        ("checkpoint", "keep", 1, "greater than or equal to 2"),
    ],
)
def test_out_of_range_names_key_value_and_bound(section, key, value, says):
    message = refused({section: {key: value}})
    assert message.startswith(f"{section}.{key}: {value!r}")
    assert says in message


def test_views_need_an_augmentation_and_stored_features_an_end_of_views():
    assert refused({"data": {"views": 4}}).startswith("data.views: 4 views need an augmentation")
    stored = {"data": {"augment": "crop_flip"}, "train": {"prefix": "stored"}}
    assert refused(stored).startswith("train.prefix: a device cannot store the features of data.augment=crop_flip")
    make_config({**stored, "data": {"augment": "crop_flip", "views": 4}})
    make_config({"data": {"augment": "flip"}, "train": {"prefix": "stored"}})


def test_a_negative_seed_is_refused():
    assert refused({"seed": -1}).startswith("seed: -1")


@pytest.mark.parametrize(
    ("section", "key", "value", "nearest", "allowed"),
    [
        ("model", "name", "resnet9", "resnet8", "resnet8, resnet10, resnet18, resnet34"),
        ("data", "partition", "dirichelt", "dirichlet", "iid, dirichlet, shards"),
        ("data", "augment", "flipp", "flip", "none, flip, crop_flip"),
        ("method", "name", "fedavgg", "fedavg", "smartfreeze, fedavg"),
        ("method", "output_module", "conv_nrom", "conv_norm", "conv_norm, conv, block, pool"),
        ("pace", "policy", "perturbations", "perturbation", "perturbation, fixed, proportional, plateau"),
        ("train", "device", "cudas", "cuda", "auto, cpu, cuda"),
    ],
)
def test_not_in_the_list_names_key_value_nearest_and_all_allowed(section, key, value, nearest, allowed):
    message = refused({section: {key: value}})
    assert message.startswith(f"{section}.{key}: {value!r} is not allowed")
    assert f"did you mean {nearest}?" in message
    assert f"allowed: {allowed}" in message


def test_a_number_where_a_choice_is_wanted_lists_the_choices():
    message = refused({"model": {"name": 18}})
    assert message.startswith("model.name: 18 is not allowed")
    assert "resnet34" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("section", "key"),
    [("train", "learning_rate"), ("train", "rounds"), ("data", "alpha"), ("fleet", "memory_cap_mib")],
)
def test_nan_and_infinity_are_refused(section, key, value):
    assert refused({section: {key: value}}).startswith(f"{section}.{key}: {value!r}")


def test_nan_and_infinity_inside_a_list_of_caps_are_refused(read_refused):
    assert "fleet.memory_cap_mib" in read_refused("fleet: {memory_cap_mib: [1, .nan]}")
    assert "fleet.memory_cap_mib" in read_refused("fleet: {memory_cap_mib: [.inf]}")


def test_several_mistakes_name_the_first_and_count_the_rest():
    message = refused({"train": {"rounds": 0, "batch_size": "x", "momentum": 2}})
    assert message.startswith("train.rounds: 0")
    assert "(and 2 more)" in message


def test_one_value_that_fits_no_form_counts_as_one_mistake():
    assert "more)" not in refused({"fleet": {"memory_cap_mib": {"a": 1}}})


@pytest.mark.parametrize("value", [5, "x", [1], True, 0, ""])
def test_a_section_that_is_no_mapping_is_refused(value):
    message = refused({"train": value})
    assert message.startswith("train: must be a section with keys")
    assert repr(value) in message


def test_more_participants_than_devices_names_both():
    message = refused({"train": {"participants": 10}, "fleet": {"devices": 9}})
    assert "train.participants: 10" in message
    assert "fleet.devices (9)" in message


def test_max_rounds_below_min_rounds_names_both():
    message = refused({"pace": {"min_rounds": 5, "max_rounds": 4}})
    assert "pace.max_rounds: 4" in message
    assert "pace.min_rounds (5)" in message


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "-x", "a b", "a\n", "a\nb", "ä"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    message = refused({"name": name})
    assert message.startswith(f"name: {name!r}")


@pytest.mark.parametrize(
    "text",
    [
        "train: {rounds: 1",
        "train: rounds: 1",
        "\ttrain: 1",
        "train: @x",
        "a: \x01",
        "--- {}\n--- {}",
        "data: {path: !!python/object:os.system x}",
        "seed: *unknown",
        "name: 2024-13-45",
    ],
)
def test_what_is_not_yaml_is_said_to_be_not_yaml(read_refused, text):
    message = read_refused(text)
    assert "written.yaml is not YAML" in message


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "bytes.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"bytes\.yaml is not YAML"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("text", "key"),
    [("seed: 1\nseed: 2", "seed"), ("train: {rounds: 1, rounds: 1}", "rounds"), ("train: {}\ntrain: {}", "train")],
)
def test_a_key_given_twice_is_refused(read_refused, text, key):
    assert f"key '{key}' is given twice" in read_refused(text)


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("5", "int"), ("just text", "str"), ("true", "bool")])
def test_a_top_level_that_is_no_mapping_is_refused(read_refused, text, kind):
    message = read_refused(text)
    assert "must hold sections (key: value)" in message
    assert message.endswith(f"not {kind}")


@pytest.mark.parametrize("text", ["1: 2", "train: {1: 2}", "train: {null: 2}", "true: 1"])
def test_a_key_that_is_no_text_is_refused(read_refused, text):
    read_refused(text)


# Legal YAML of a shape that no configuration has: each once got past the checks or may.
@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: 1\n",
        "train:\n  ? [a]\n  : 1\n",
        "train:\n  ? {a: 1}\n  : 1\n",
        "fleet: {memory_cap_mib: &x [*x]}",
        "fleet: &x {devices: *x}",
        "fleet: {memory_cap_mib: {2024-01-01: 3}}",
        "train: {rounds: 0x" + "f" * 6000 + "}",
        "train: {rounds: " + "[" * 1500 + "]" * 1500 + "}",
        'data: {name: "\\uD800"}',
    ],
    ids=[
        "list as key",
        "list as key of a section",
        "mapping as key",
        "list in itself",
        "section in itself",
        "date as key",
        "number of thousands of digits",
        "1,500 lists deep",
        "half a character",
    ],
)
def test_odd_yaml_is_a_configuration_error(read_refused, text):
    read_refused(text)


def test_half_a_character_is_refused_by_its_key(read_refused):
    assert "data.name" in read_refused('data: {name: "\\uD800"}')


@pytest.mark.parametrize(
    "values",
    [{"a\nb": 1}, {"train": {"a\nb": 1}}, {"train": {"rounds\n": 1}}, {"train": "a\nb"}, {"model": {"name": "a\nb"}}],
)
def test_a_line_break_in_a_key_or_value_does_not_break_the_message(values):
    refused(values)


@pytest.mark.parametrize("override", ["train.rounds", "--train.rounds", "", "--", "=3", "--=3"])
def test_an_override_without_key_or_value_shows_how_to_write_one(read_refused, override):
    message = read_refused("", override)
    assert repr(override) in message
    assert "--section.field=value" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--trian.rounds=3", "unknown section trian; did you mean train?"),
        ("--train.round=3", "unknown key train.round; did you mean train.rounds?"),
        ("--sede=3", "unknown key sede; did you mean seed?"),
        ("--train=3", "train is a section; write --train.field=value"),
        ("--train.=3", "unknown key train."),
        ("--train.rounds.more=3", "unknown key train.rounds.more"),
        ("--.rounds=3", "unknown section"),
        ("--train.rounds=", "train.rounds: ''"),
        ("--train.rounds=many", "train.rounds: 'many'"),
        ("--train.rounds='3'", "train.rounds: '3'"),
        ("--train.rounds=true", "train.rounds: True"),
        ("--train.rounds=1e1", "train.rounds: 10.0"),
        ("--train.rounds={1: ", "train.rounds: '{1: '"),
        ("--train.rounds=2024-13-45", "train.rounds: '2024-13-45'"),
        ("--fleet.devices=3", "train.participants: 10 is more than fleet.devices (3)"),
    ],
)
def test_a_bad_override_is_refused_like_a_bad_file(read_refused, override, says):
    assert says in read_refused("", override)


@pytest.mark.parametrize("override", ["--train.rounds={[1]: 2}", "--train.rounds=&x [*x]"])
def test_an_override_of_odd_yaml_is_a_configuration_error(read_refused, override):
    assert "train.rounds" in read_refused("", override)


def test_an_override_into_a_section_that_is_no_section(read_refused):
    assert "train: must be a section with keys, not 5" in read_refused("train: 5", "--train.rounds=3")


def test_a_file_that_is_missing_is_named(tmp_path):
    for source in (str(tmp_path / "none.yaml"), "none.yml", "some/where", str(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            load_config(source)
        assert checked_line(caught.value) == f"configuration file {source} does not exist"


def test_a_file_name_that_no_disk_holds_is_a_configuration_error():
    with pytest.raises(ConfigError):
        load_config("a" * 300 + ".yaml")


def test_an_unknown_shipped_name_gets_nearest_and_all_names():
    with pytest.raises(ConfigError) as caught:
        load_config("digit")
    message = checked_line(caught.value)
    assert "'digit'" in message
    assert "did you mean digits?" in message
    assert "shipped: cifar10, digits" in message
