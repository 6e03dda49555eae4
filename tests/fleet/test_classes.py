"""Device classes: figures that follow from what is stated, profiles dealt in exact shares, and the documented table."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.schema import FleetConfig
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.classes import (
    DEVICE_CLASSES,
    NETWORK_SPREAD,
    PRESETS,
    TRAINING_MEMORY_SHARE,
    TRAINING_SPEED_SHARE,
    class_shares,
    counts_of,
    deal_classes,
)
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.seeds import numpy_generator
from fedfreeze.units import MIB
from tests.support.checks import ROOT


def fleet_of(profile, devices: int = 12, seed: int = 0, **keys) -> Fleet:
    return make_fleet(FleetConfig(devices=devices, profile=profile, **keys), seed)


def refused(profile) -> str:
    with pytest.raises(ConfigError) as caught:
        make_fleet(FleetConfig(devices=3, profile=profile), 0)
    message = str(caught.value)
    assert message.startswith("fleet.profile: ")
    assert len(message.splitlines()) == 1
    return message


# cores x GHz x operations a cycle, by hand
@pytest.mark.parametrize(
    ("name", "memory_mib", "peak_gflops"),
    [
        ("galaxy_a13", 4096, 8 * 2.0 * 8),
        ("galaxy_a54", 8192, 4 * 2.4 * 16 + 4 * 2.0 * 8),
        ("galaxy_s21_ultra", 12288, 2.9 * 32 + 3 * 2.8 * 16 + 4 * 2.2 * 8),
        ("raspberry_pi_3b_plus", 1024, 4 * 1.4 * 4),
        ("raspberry_pi_4b", 4096, 4 * 1.5 * 8),
        ("raspberry_pi_5", 8192, 4 * 2.4 * 16),
        ("jetson_nano", 4096, 128 * 0.922 * 2),
        ("jetson_xavier_nx", 8192, 384 * 1.1 * 2),
        ("jetson_orin_nano", 8192, 1024 * 0.625 * 2),
    ],
)
def test_a_peak_follows_from_cores_clock_and_width(name, memory_mib, peak_gflops):
    device = DEVICE_CLASSES[name]
    assert device.memory_mib == memory_mib
    assert device.peak_gflops == pytest.approx(peak_gflops)
    assert device.training_gflops == pytest.approx(peak_gflops * TRAINING_SPEED_SHARE)
    assert device.training_memory_mib == memory_mib * TRAINING_MEMORY_SHARE


def test_every_class_has_a_source_for_each_figure_and_figures_in_range():
    assert len(DEVICE_CLASSES) == 9
    for name, device in DEVICE_CLASSES.items():
        assert device.name == name
        assert len(device.memory_source) > 10
        assert len(device.network_source) > 10
        assert all(len(cores.source) > 10 for cores in device.cores)
        assert 0 < device.availability <= 1
        assert device.down_mbit_s >= device.up_mbit_s > 0


def test_presets_name_classes_and_mixed_has_them_all():
    assert set(PRESETS) == {"phones", "raspberry_pi", "jetson", "mixed"}
    assert set(PRESETS["mixed"]) == set(DEVICE_CLASSES)
    for preset in PRESETS.values():
        assert set(preset) <= set(DEVICE_CLASSES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_a_fleet(preset):
    fleet = fleet_of(preset, devices=30)
    caps = {int(device.training_memory_mib * MIB) for device in DEVICE_CLASSES.values()}
    assert set(fleet.memory_cap_bytes) <= caps
    assert len(set(fleet.memory_cap_bytes)) > 1
    assert len(set(fleet.up_bytes_s)) == 30  # each device has a network of its own


def test_a_mixture_is_dealt_in_exact_shares():
    fleet = fleet_of({"raspberry_pi_4b": 0.5, "jetson_orin_nano": 0.5}, devices=10)
    speeds = sorted(fleet.speed_flops / 1e9)
    assert speeds == pytest.approx([7.2] * 5 + [192.0] * 5)


def test_shares_need_not_sum_to_one_and_zero_is_none():
    assert class_shares({"jetson_nano": 3, "galaxy_a13": 1}) == {"jetson_nano": 0.75, "galaxy_a13": 0.25}
    assert class_shares({"jetson_nano": 1e308, "galaxy_a13": 1e308}) == {"jetson_nano": 0.5, "galaxy_a13": 0.5}
    fleet = fleet_of({"jetson_nano": 0, "galaxy_a13": 2})
    assert set(fleet.memory_cap_bytes) == {1024 * MIB}


def test_who_is_what_follows_the_seed_and_nothing_else():
    assert fleet_of("mixed").memory_cap_bytes == fleet_of("mixed", speed_gflops=3.0).memory_cap_bytes
    orders = {fleet_of("mixed", seed=seed).memory_cap_bytes for seed in range(10)}
    assert len(orders) > 5
    assert len({tuple(sorted(order)) for order in map(list, fleet_orders())}) == 1


def fleet_orders():
    return [fleet_of({"jetson_nano": 1, "raspberry_pi_5": 2}, seed=seed).memory_cap_bytes for seed in range(5)]


def test_a_device_has_all_figures_of_one_class():
    fleet = fleet_of("mixed", devices=90)
    known = {(d.training_memory_mib, round(d.training_gflops, 6), d.availability) for d in DEVICE_CLASSES.values()}
    caps = [cap / MIB for cap in fleet.memory_cap_bytes if cap is not None]
    seen = set(zip(caps, (fleet.speed_flops / 1e9).round(6).tolist(), fleet.availability.tolist(), strict=True))
    assert seen == known


def test_a_network_varies_alike_in_both_directions():
    fleet = fleet_of({"raspberry_pi_5": 1}, devices=4000)
    up, down = fleet.up_bytes_s * 8e-6 / 45.74, fleet.down_bytes_s * 8e-6 / 85.73
    assert up == pytest.approx(down)
    assert np.median(up) == pytest.approx(1, rel=0.05)
    assert np.log(up).std() == pytest.approx(NETWORK_SPREAD, rel=0.05)


def test_a_key_that_is_set_wins_and_the_scale_is_of_memory_alone():
    plain = fleet_of("phones")
    fleet = fleet_of("phones", speed_gflops=3.0, availability=1.0, memory_scale=0.01)
    assert fleet.speed_flops.tolist() == [3e9] * 12
    assert fleet.availability.tolist() == [1.0] * 12
    assert fleet.memory_cap_bytes == tuple(int(cap * 0.01) for cap in plain.memory_cap_bytes)
    assert np.array_equal(fleet.up_bytes_s, plain.up_bytes_s)
    assert fleet_of("phones", memory_cap_mib=2.0, memory_scale=0.01).memory_cap_bytes == (2 * MIB,) * 12
    assert fleet_of("phones", enforce=False).memory_cap_bytes == (None,) * 12


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=9).filter(lambda shares: sum(shares) > 0),
    st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_counts_sum_up_and_lie_within_one_of_their_share(shares, total):
    whole = sum(shares)
    parts = [share / whole for share in shares]
    counts = counts_of(parts, total)
    assert sum(counts) == total
    for part, count in zip(parts, counts, strict=True):
        assert abs(count - part * total) < 1 + 1e-6


def test_ties_of_remainders_go_to_the_first():
    assert counts_of([0.5, 0.5], 3) == [2, 1]
    assert counts_of([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]
    assert counts_of([0.1, 0.2, 0.7], 10) == [1, 2, 7]


def test_dealing_is_a_permutation():
    dealt = deal_classes({"jetson_nano": 0.5, "galaxy_a13": 0.5}, 7, numpy_generator(0, "test"))
    assert sorted(device.name for device in dealt) == ["galaxy_a13"] * 3 + ["jetson_nano"] * 4


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("phone", "'phone' is no profile; did you mean phones?; allowed: phones, raspberry_pi, jetson, mixed"),
        ("qqq", "'qqq' is no profile; allowed: phones"),
        ("", "'' is no profile; allowed"),
        ("fleet.txt", "or a .csv file"),
        ("raspberry_pi_5", "it is a device class: write {raspberry_pi_5: 1}"),
        (
            {"raspberry_pi_4": 1},
            "'raspberry_pi_4' is no device class; did you mean raspberry_pi_4b?; allowed: galaxy_a13",
        ),
        ({"toaster": 1}, "'toaster' is no device class"),
        ({}, "no class with a share over 0; give at least one"),
        ({"jetson_nano": 0, "galaxy_a13": 0}, "no class with a share over 0"),
    ],
)
def test_a_profile_that_is_none_is_refused(profile, says):
    assert says in refused(profile)


@pytest.mark.parametrize("share", [-1.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share):
    """The schema refuses it before, in a configuration."""
    with pytest.raises(ConfigError, match=r"fleet\.profile: the share of jetson_nano is .*must be 0 or more"):
        class_shares({"jetson_nano": share})


def test_the_documented_table_is_the_one_in_the_code():
    text = (ROOT / "docs" / "fleet.md").read_text()
    rows = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in table_rows(text)}
    for name, device in DEVICE_CLASSES.items():
        assert rows[name] == [
            device.model,
            str(device.memory_mib),
            f"{device.peak_gflops:.1f}",
            f"{device.training_memory_mib:.0f}",
            f"{device.training_gflops:.2f}",
            f"{device.up_mbit_s:.2f}",
            f"{device.down_mbit_s:.2f}",
            f"{device.availability:.2f}",
        ]
    for preset, shares in PRESETS.items():
        whole = sum(shares.values())
        listed = ", ".join(f"{name} {share / whole:.2f}" for name, share in shares.items())
        assert rows[preset] == ["all classes alike" if preset == "mixed" else listed]
    assert f"{TRAINING_MEMORY_SHARE:.0%}" in text.replace(" %", "%")
    assert f"{TRAINING_SPEED_SHARE:.0%}" in text.replace(" %", "%")


def table_rows(text: str):
    return [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| `", line)]
