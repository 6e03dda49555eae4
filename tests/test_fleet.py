"""Fleet: caps from a number, list, distribution or CSV file, and which devices hold a stage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.cap import MIB
from fedfreeze.config import FleetConfig
from fedfreeze.errors import ConfigError
from fedfreeze.fleet import Fleet, make_fleet


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
