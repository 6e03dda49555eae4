"""Fleet: figures from a number, list, distribution, CSV file or profile; who holds a stage, who can be selected."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import FleetConfig
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.seeds import numpy_generator
from fedfreeze.units import MIB
from tests.support.checks import ROOT


def caps_mib(spec, devices: int = 5, seed: int = 0) -> np.ndarray:
    fleet = make_fleet(FleetConfig(devices=devices, memory_cap_mib=spec), seed)
    return np.array(fleet.memory_cap_bytes) / MIB


def refused(spec, devices: int = 5) -> str:
    with pytest.raises(ConfigError) as caught:
        make_fleet(FleetConfig(devices=devices, memory_cap_mib=spec), 0)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("fleet.memory_cap_mib")
    return message


def test_a_number_is_every_devices_cap_in_bytes():
    fleet = make_fleet(FleetConfig(devices=3, memory_cap_mib=2.5), 0)
    assert fleet.memory_cap_bytes == (2_621_440,) * 3
    assert len(fleet) == 3


def test_a_list_is_cycled_over_the_devices():
    assert caps_mib([1.0, 2.0, 4.0]).tolist() == [1, 2, 4, 1, 2]
    assert caps_mib([1.0, 2.0, 4.0], devices=2).tolist() == [1, 2]


def test_uniform_caps_fill_their_range():
    caps = caps_mib("uniform(100, 900)", devices=4000)
    assert caps.min() >= 100 - 1 / MIB  # whole bytes, rounded down
    assert caps.max() <= 900
    assert caps.mean() == pytest.approx(500, abs=15)
    assert caps.std() == pytest.approx(800 / math.sqrt(12), rel=0.05)


def test_loguniform_caps_are_uniform_in_the_logarithm():
    caps = caps_mib("loguniform(1, 1024)", devices=4000)
    assert caps.min() >= 1 - 1 / MIB
    assert caps.max() <= 1024
    assert np.log2(caps).mean() == pytest.approx(5, abs=0.2)
    assert np.median(caps) == pytest.approx(32, rel=0.15)


def test_normal_caps_are_cut_off_at_a_tenth_of_the_mean():
    caps = caps_mib("normal(100, 10)", devices=4000)
    assert caps.mean() == pytest.approx(100, abs=1)
    assert caps.std() == pytest.approx(10, rel=0.05)
    wide = caps_mib("normal(100, 200)", devices=400)
    assert wide.min() == pytest.approx(10, abs=1 / MIB)
    assert wide.max() > 200


def test_a_distribution_may_have_no_spread():
    assert caps_mib("uniform(8, 8)").tolist() == [8] * 5
    assert caps_mib("normal(8, 0)").tolist() == [8] * 5


@pytest.mark.parametrize("spec", ["uniform(100,900)", " uniform ( 100 , 900 ) ", "uniform(1e2, 9e2)"])
def test_spaces_and_forms_of_numbers_do_not_matter(spec):
    assert caps_mib(spec).tolist() == caps_mib("uniform(100, 900)").tolist()


def test_the_seed_decides_the_caps():
    spec = "uniform(100, 900)"
    assert caps_mib(spec, seed=1).tolist() == caps_mib(spec, seed=1).tolist()
    assert caps_mib(spec, seed=1).tolist() != caps_mib(spec, seed=2).tolist()
    assert len(set(caps_mib(spec))) == 5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "is not a cap"),
        ("100", "is not a cap"),
        ("uniform", "is not a cap"),
        ("gauss(1, 2)", "is not a cap"),
        ("uniform(1, 2", "is not a cap"),
        ("uniform(1, 2))", "is not a cap"),
        ("uniform((1, 2))", "is not a cap"),
        ("uniform()", "needs two numbers"),
        ("uniform(1)", "needs two numbers"),
        ("uniform(1, 2, 3)", "needs two numbers"),
        ("normal(a, b)", "needs two numbers"),
        ("uniform(2, 1)", "low <= high"),
        ("uniform(0, 1)", "0 < first"),
        ("uniform(-1, 1)", "0 < first"),
        ("uniform(nan, 1)", "0 < first"),
        ("uniform(1, nan)", "low <= high"),
        ("uniform(1, inf)", "low <= high"),
        ("normal(1, -1)", "0 < first"),
        ("normal(0, 1)", "0 < first"),
        ([], "the list is empty"),
        ([1.0, 0.0], "device 1 has 0.0 MiB"),
        ([1.0, -2.0], "device 1 has -2.0 MiB"),
        (0.0, "device 0 has 0.0 MiB"),
        (-1.0, "device 0 has -1.0 MiB"),
    ],
)
def test_a_cap_that_is_none_is_refused(spec, says):
    assert says in refused(spec)


def test_a_word_that_is_no_distribution_lists_all_forms():
    message = refused("gauss(1, 2)")
    for form in ("a number", "a list", "uniform(low, high)", "loguniform(low, high)", "normal(mean, sd)", ".csv"):
        assert form in message


@pytest.mark.parametrize("spec", [1e308, [1e308], "uniform(1e307, 1e308)"])
def test_a_cap_too_large_to_count_in_bytes_is_refused(spec):
    refused(spec)


def test_without_enforcement_no_device_has_a_cap_but_the_caps_must_still_be_caps():
    fleet = make_fleet(FleetConfig(devices=3, memory_cap_mib=1.0, enforce=False), 0)
    assert fleet.memory_cap_bytes == (None, None, None)
    assert fleet.eligible(10**15) == [0, 1, 2]
    with pytest.raises(ConfigError):
        make_fleet(FleetConfig(devices=3, memory_cap_mib=-1.0, enforce=False), 0)


def test_a_cap_of_exactly_the_need_holds_it():
    fleet = Fleet((99, 100, 101, None))
    assert fleet.eligible(100) == [1, 2, 3]
    assert fleet.eligible(102) == [3]
    assert fleet.eligible(0) == [0, 1, 2, 3]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_who_holds_more_holds_less(caps, need, other):
    fleet = Fleet(tuple(caps))
    low, high = sorted((need, other))
    assert set(fleet.eligible(high)) <= set(fleet.eligible(low))
    assert len(fleet.eligible(low)) == sum(cap >= low for cap in caps)


def test_the_caps_are_the_same_draw_as_ever():
    """Results that are shipped depend on it: purpose, order, rounding."""
    for spec, low, high in ((None, 100, 900), ("uniform(2.5, 6.0)", 2.5, 6.0)):
        draws = numpy_generator(3, "memory caps").uniform(low, high, 50)
        fleet = make_fleet(FleetConfig(devices=50, memory_cap_mib=spec), 3)
        assert fleet.memory_cap_bytes == tuple(int(draw * MIB) for draw in draws)
        assert all(type(cap) is int for cap in fleet.memory_cap_bytes)


def test_a_csv_file_is_read_by_device_number(tmp_path):
    file = tmp_path / "caps.csv"
    file.write_text("device,memory_cap_mib\n2,30\n0,10.5\n1,20\n")
    assert caps_mib(str(file), devices=3).tolist() == [10.5, 20, 30]
    file.write_text("place,memory_cap_mib,device\nhome,7,0\n")
    assert caps_mib(str(file), devices=1).tolist() == [7]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "device 0 is missing"),
        ("device,memory_cap_mib\n0,1\n", "device 1 is missing"),
        ("device,memory_cap_mib\n0,1\n1,1\n2,1\n", "it lists 3 devices"),
        ("device,memory_cap_mib\n0,1\n2,1\n", "device 1 is missing"),
        ("device,memory_cap_mib\n0,1\n0,2\n", "line 3 gives device 0 a second time"),
        ("device,memory_cap_mib\n0,1\nx,2\n", "line 3 is not a device number"),
        ("device,memory_cap_mib\n0,1\n1,lots\n", "line 3 is not a device number"),
        ("device,memory_cap_mib\n0,1\n1.5,2\n", "line 3 is not a device number"),
        ("device,memory_cap_mib\n0,1\n1\n", "line 3 has no memory_cap_mib"),
        ("0,1\n1,1\n", "line 2 has no device"),
        ("device,cap\n0,1\n", "line 2 has no memory_cap_mib"),
        ("device,memory_cap_mib\n0,1\n1,nan\n", "device 1 has nan MiB"),
        ("device,memory_cap_mib\n0,1\n1,inf\n", "device 1 has inf MiB"),
        ("device,memory_cap_mib\n0,1\n1,0\n", "device 1 has 0.0 MiB"),
    ],
)
def test_a_csv_file_with_a_mistake_names_the_place(tmp_path, text, says):
    file = tmp_path / "caps.csv"
    file.write_text(text)
    assert says in refused(str(file), devices=2)


def test_a_csv_file_that_cannot_be_read_is_named(tmp_path):
    assert "none.csv cannot be read" in refused(str(tmp_path / "none.csv"))
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "binary.csv cannot be read" in refused(str(binary))


# --- the other figures

FIGURES = {
    "speed_gflops": ("speed_flops", 1e9, "a speed", "GFLOP/s"),
    "up_mbit_s": ("up_bytes_s", 125_000, "an upload", "Mbit/s"),
    "down_mbit_s": ("down_bytes_s", 125_000, "a download", "Mbit/s"),
    "availability": ("availability", 1, "an availability", ""),
}


def fleet_of(devices: int = 4, seed: int = 0, **keys) -> Fleet:
    return make_fleet(FleetConfig(devices=devices, **keys), seed)


def fleet_refused(devices: int = 4, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        fleet_of(devices, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(tmp_path, text: str | bytes) -> str:
    file = tmp_path / "fleet.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def test_without_keys_the_figures_are_the_documented_defaults():
    fleet = fleet_of(4000)
    for values, low, high in (
        (fleet.speed_flops, 2e9, 20e9),
        (fleet.up_bytes_s, 2e6 / 8, 20e6 / 8),
        (fleet.down_bytes_s, 10e6 / 8, 100e6 / 8),
    ):
        assert low <= values.min() < values.max() <= high
        assert np.median(values) == pytest.approx(math.sqrt(low * high), rel=0.1)
    assert fleet.availability.tolist() == [1.0] * 4000
    assert fleet.period_s == 86_400
    assert 0 <= fleet.phase.min() < 0.01
    assert 0.99 < fleet.phase.max() < 1


@pytest.mark.parametrize("key", FIGURES)
def test_each_figure_takes_number_list_distribution_and_csv(key, tmp_path):
    field, factor, _, _ = FIGURES[key]

    def values(spec, **others):
        return (getattr(fleet_of(**{key: spec}, **others), field) / factor).tolist()

    assert values(0.5) == pytest.approx([0.5] * 4)
    assert values(1) == pytest.approx([1] * 4)
    assert values([0.25, 0.5, 1.0]) == pytest.approx([0.25, 0.5, 1, 0.25])
    assert values("uniform(0.5, 0.5)") == pytest.approx([0.5] * 4)
    assert all(0.5 <= value <= 1 for value in values("loguniform(0.5, 1)"))
    assert values(write(tmp_path, f"device,{key}\n1,0.2\n0,0.1\n3,0.4\n2,0.3\n")) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("key", FIGURES)
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fast", "'fast' is not {noun}; allowed: a number, a list of numbers, uniform(low, high)"),
        ("uniform(1)", "needs two numbers"),
        ("uniform(1, 0.5)", "low <= high"),
        ([], "the list is empty; give at least one"),
        (0.0, "device 0 has 0.0"),
        ([1.0, -1.0], "device 1 has -1.0"),
        ("none.csv", "none.csv cannot be read: No such file"),
    ],
)
def test_each_figure_is_refused_as_a_cap_is(key, spec, says):
    message = fleet_refused(**{key: spec})
    assert message.startswith(f"fleet.{key}: ")
    assert says.format(noun=FIGURES[key][2]) in message


@pytest.mark.parametrize("key", FIGURES)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_csv_figure_out_of_range_names_device_value_unit_and_limit(key, value, tmp_path):
    _, _, noun, unit = FIGURES[key]
    message = fleet_refused(2, **{key: write(tmp_path, f"device,{key}\n0,1\n1,{value}\n")})
    assert (
        f"fleet.{key}: device 1 has {float(value)}{f' {unit}' if unit else ''}; {noun} must be more than 0" in message
    )


def test_a_speed_too_large_to_count_is_refused():
    assert "a speed must be more than 0 and finite" in fleet_refused(speed_gflops=1e305)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (1.5, "device 0 has 1.5; an availability must be more than 0 and at most 1"),
        ([0.5, 1.01], "device 1 has 1.01"),
        ("uniform(0.5, 1.5)", "'uniform(0.5, 1.5)' goes beyond 1"),
        ("normal(2, 0.1)", "goes beyond 1"),
    ],
)
def test_an_availability_is_a_share(spec, says):
    assert says in fleet_refused(availability=spec)


def test_a_normal_availability_is_cut_off_at_one():
    shares = fleet_of(500, availability="normal(0.9, 0.3)").availability
    assert shares.max() == 1
    assert shares.min() >= 0.09


def test_every_draw_is_its_own_and_follows_the_seed():
    same = "loguniform(0.1, 1)"
    keys = {"memory_cap_mib": same, **dict.fromkeys(FIGURES, same)}
    fleet, other = fleet_of(50, **keys), fleet_of(50, seed=1, **keys)
    draws = [np.array(fleet.memory_cap_bytes) / MIB, fleet.phase]
    for key, (field, factor, _, _) in FIGURES.items():
        draws.append(getattr(fleet, field) / factor)
        assert not np.array_equal(getattr(fleet, field), getattr(other, field))
        alone = fleet_of(50, **{key: same})  # whatever else is drawn
        assert np.array_equal(getattr(alone, field), getattr(fleet, field))
    for i, draw in enumerate(draws):
        for another in draws[:i]:
            assert abs(np.corrcoef(draw, another)[0, 1]) < 0.5
    assert np.array_equal(fleet.phase, fleet_of(50).phase)
    assert not np.array_equal(fleet.phase, other.phase)


# --- availability


def test_a_device_is_available_from_the_start_of_its_period_for_its_share_of_it():
    fleet = Fleet((None,) * 3, availability=[0.5, 0.25, 1.0], phase=[0.0, 0.5, 0.9], period_s=100.0)
    assert fleet.available(0).tolist() == [True, False, True]
    assert fleet.available(49.9).tolist() == [True, False, True]
    assert fleet.available(50).tolist() == [False, True, True]  # device 1: 50 s on, its period begins
    assert fleet.available(75).tolist() == [False, False, True]
    assert fleet.available(100).tolist() == fleet.available(0).tolist()


def test_a_wait_is_as_long_as_the_first_device_needs():
    fleet = Fleet((None,) * 2, availability=[0.5, 0.25], phase=[0.0, 0.5], period_s=100.0)
    assert fleet.wait_s(10, [0, 1]) == 0
    assert fleet.wait_s(10, [1]) == pytest.approx(40, abs=0.01)
    assert fleet.wait_s(80, [0, 1]) == pytest.approx(20, abs=0.01)
    assert fleet.available(80 + fleet.wait_s(80, [0, 1]))[0]


@given(st.floats(0, 1e7), st.lists(st.floats(1e-7, 1), min_size=1, max_size=8), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_after_the_wait_somebody_can_be_selected(now_s, shares, seed):
    fleet = fleet_of(len(shares), seed, availability=list(shares), availability_period_s=1000.0)
    devices = list(range(len(shares)))
    wait_s = fleet.wait_s(now_s, devices)
    assert 0 <= wait_s <= 1001
    assert fleet.available(now_s + wait_s).any()


def test_the_period_is_the_configured_one():
    assert fleet_of(availability_period_s=60.0).period_s == 60


# --- a profile in a CSV file

FIVE = "device,memory_cap_mib,speed_gflops,up_mbit_s,down_mbit_s,availability\n"


def test_the_example_of_the_documents_is_a_profile():
    path = ROOT / "docs" / "fleet_example.csv"
    devices = len(path.read_text().split()) - 1
    fleet = fleet_of(devices, profile=str(path))
    assert len(fleet) == devices
    assert path.read_text() in (ROOT / "docs" / "fleet.md").read_text().replace("\n    ", "\n")


def test_a_profile_file_gives_all_five_figures(tmp_path):
    path = write(tmp_path, f"{FIVE}1,2.5,4,8,16,0.5\n0,1,2,3,4,1\n")
    fleet = fleet_of(2, profile=path)
    assert fleet.memory_cap_bytes == (MIB, MIB * 5 // 2)
    assert fleet.speed_flops.tolist() == [2e9, 4e9]
    assert fleet.up_bytes_s.tolist() == [375_000, 1e6]
    assert fleet.down_bytes_s.tolist() == [500_000, 2e6]
    assert fleet.availability.tolist() == [1, 0.5]


def test_columns_that_a_profile_file_lacks_fall_to_the_defaults(tmp_path):
    fleet, plain = fleet_of(2, profile=write(tmp_path, "device,memory_cap_mib\n0,1\n1,2\n")), fleet_of(2)
    assert fleet.memory_cap_bytes == (MIB, 2 * MIB)
    for name in ("speed_flops", "up_bytes_s", "down_bytes_s", "availability", "phase"):
        assert np.array_equal(getattr(fleet, name), getattr(plain, name))


def test_a_key_that_is_set_wins_over_a_profile_file(tmp_path):
    path = write(tmp_path, f"{FIVE}0,1,2,3,4,1\n1,2,4,8,16,0.5\n")
    fleet = fleet_of(2, profile=path, memory_cap_mib=7.0, speed_gflops=[1.0, 5.0])
    assert fleet.memory_cap_bytes == (7 * MIB, 7 * MIB)
    assert fleet.speed_flops.tolist() == [1e9, 5e9]
    assert fleet.up_bytes_s.tolist() == [375_000, 1e6]
    without = write(tmp_path, "device,speed_gflops\n0,3\n1,4\n")
    assert fleet_of(2, profile=without, memory_cap_mib=7.0).speed_flops.tolist() == [3e9, 4e9]


def test_the_scale_is_of_the_profiles_memory_alone(tmp_path):
    path = write(tmp_path, f"{FIVE}0,1,2,3,4,1\n")
    scaled, plain = fleet_of(1, profile=path, memory_scale=0.5), fleet_of(1, profile=path)
    assert scaled.memory_cap_bytes == (MIB // 2,)
    assert scaled.speed_flops.tolist() == plain.speed_flops.tolist()
    assert fleet_of(1, profile=path, memory_scale=0.5, memory_cap_mib=8.0).memory_cap_bytes == (8 * MIB,)
    assert fleet_of(1, memory_scale=0.5).memory_cap_bytes == fleet_of(1).memory_cap_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty, so device 0 is missing; fleet.devices is 2"),
        ("\n\n", "the file is empty"),
        ("device,speed_gflops\n0,1\n1,1\n", "line 2 has no memory_cap_mib; the first line must name the columns"),
        ("memory_cap_mib\n1\n1\n", "line 2 has no device; the first line must name the columns"),
        ("device,memory_cap_mb\n0,1\n1,1\n", "'memory_cap_mb', and line 2 has no memory_cap_mib; did you mean memory_"),
        (
            "device,memory_cap_mib,speed_gflop\n0,1,1\n1,1,1\n",
            "unknown column 'speed_gflop'; did you mean speed_gflops?",
        ),
        (
            "device,memory_cap_mib,x\n0,1,1\n1,1,1\n",
            "unknown column 'x'; the first line must name the columns; allowed",
        ),
        ("0,1\n1,1\n", "unknown column '0', and line 2 has no device"),
        ("device;memory_cap_mib\n0;1\n1;1\n", "unknown column 'device;memory_cap_mib'"),
        ("device,device,memory_cap_mib\n0,0,1\n", "a column is named twice"),
        ("device,memory_cap_mib\n0,1\n", "device 1 is missing; fleet.devices is 2, numbered 0 to 1"),
        ("device,memory_cap_mib\n0,1\n1,1\n2,1\n", "it lists 3 devices; fleet.devices is 2"),
        ("device,memory_cap_mib\n0,1\n5,1\n", "device 1 is missing"),
        ("device,memory_cap_mib\n0,1\n\n0,2\n", "line 4 gives device 0 a second time"),
        ("device,memory_cap_mib\n0,1\n-1,2\n", "line 3 is not a device number and a cap in MiB: '-1'"),
        ("device,memory_cap_mib\n0,1\none,2\n", "line 3 is not a device number"),
        ("device,memory_cap_mib\n0,1\n1\n", "line 3 has no memory_cap_mib; give each line a value"),
        ("device,memory_cap_mib\n0,1\n1,\n", "line 3 has no memory_cap_mib"),
        ("device,memory_cap_mib\n0,1\n1,1,1\n", "line 3 has 3 values for 2 columns"),
        ("device,memory_cap_mib\n0,1\n1,1_0\n", "memory_cap_mib is '1_0'"),
        (
            f"{FIVE}0,1,1,1,1,1\n1,1,quick,1,1,1\n",
            "line 3 is not a device number and a speed in GFLOP/s: speed_gflops is",
        ),
        (f"{FIVE}0,1,1,1,1,1\n1,0,1,1,1,1\n", "memory_cap_mib: device 1 has 0.0 MiB; a cap must be more than 0"),
        (f"{FIVE}0,1,1,1,1,1\n1,1,-2,1,1,1\n", "speed_gflops: device 1 has -2.0 GFLOP/s; a speed must be more than 0"),
        (f"{FIVE}0,1,1,1,1,1\n1,1,1,0,1,1\n", "up_mbit_s: device 1 has 0.0 Mbit/s"),
        (f"{FIVE}0,1,1,1,1,1\n1,1,1,1,nan,1\n", "down_mbit_s: device 1 has nan Mbit/s"),
        (f"{FIVE}0,1,1,inf,1,1\n1,1,1,1,1,1\n", "up_mbit_s: device 0 has inf Mbit/s"),
        (
            f"{FIVE}0,1,1,1,1,1\n1,1,1,1,1,1.5\n",
            "availability: device 1 has 1.5; an availability must be more than 0 and at m",
        ),
        (f"{FIVE}0,1,1,1,1,0\n1,1,1,1,1,1\n", "availability: device 0 has 0.0"),
        (b"\xff\xfe\xfa", "cannot be read: 'utf-8' codec can't decode"),
        (bytes(range(128)), "unknown column"),
        (b"\x00" * 300_000, "cannot be read"),
    ],
)
def test_a_profile_file_with_a_mistake_names_the_place(tmp_path, text, says):
    path = write(tmp_path, text)
    message = fleet_refused(2, profile=path)
    assert message.startswith(f"fleet.profile: {path}")
    assert says in message
    assert len(message) - len(path) < 300


def test_a_profile_file_that_cannot_be_read_is_named(tmp_path):
    assert "none.csv cannot be read: No such file or directory" in fleet_refused(profile=str(tmp_path / "none.csv"))
    (tmp_path / "is.csv").mkdir()
    assert "is.csv cannot be read: Is a directory" in fleet_refused(profile=str(tmp_path / "is.csv"))


def test_a_file_of_one_figure_may_have_other_columns(tmp_path):
    """So that partition.csv of a run can be given as caps, or one file as several figures."""
    path = write(tmp_path, "device,memory_cap_mib,samples,speed_gflops\n0,1.5,100,3\n")
    fleet = fleet_of(1, memory_cap_mib=path, speed_gflops=path)
    assert fleet.memory_cap_bytes == (MIB * 3 // 2,)
    assert fleet.speed_flops.tolist() == [3e9]


def test_the_schema_refuses_shares_that_are_negative():
    with pytest.raises(ConfigError, match=r"fleet\.profile: .*greater than or equal to 0"):
        make_config({"fleet": {"profile": {"jetson_nano": -1}}})
