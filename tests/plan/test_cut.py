"""`plan --cut`: what is proposed, and a run that takes in whom the usual cut leaves out."""

import json
from pathlib import Path

import pytest
import yaml

from fedfreeze.cli import main
from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import Fleet, make_fleet
from fedfreeze.plan.cut import cheapest, proposal_of, propose, wanted_devices
from fedfreeze.plan.cut_search import Cut
from tests.support.checks import assert_one_line
from tests.support.in_process import TINY
from tests.support.launching import command, metrics, run

SHAPE, CLASSES = (3, 12, 12), 4
# Synthetic images large enough for activations to decide; stage 1 of the usual cut needs 2.22 MiB.
CAP_MIB = 2.1
CUTTABLE = {
    "name": "cuttable",
    "data": {"name": "synthetic", "synthetic_shape": [3, 16, 16], "synthetic_samples": 800, "partition": "iid"},
    "model": {"name": "resnet8", "width": 4},
    "fleet": {"devices": 8, "memory_cap_mib": [CAP_MIB, 9, 9, 9]},
    "train": {"rounds": 3, "participants": 8, "batch_size": 64},
    "pace": {"policy": "fixed"},
}


def small(**sections: dict[str, object]) -> Config:
    values: dict[str, object] = {
        "model": {"name": "resnet8", "width": 4},
        "train": {"batch_size": 16, "participants": 2},
        "fleet": {"devices": 10, "memory_cap_mib": [0.001]},
    }
    return make_config(values | sections)


def proposals(share: float, **sections: dict[str, object]) -> tuple[list[Cut], Cut]:
    """Return what is yielded, and the proposal."""
    config = small(**sections)
    fleet = make_fleet(config.fleet, 0)
    found = list(propose(config, SHAPE, CLASSES, fleet, share))
    return found, cheapest(found, wanted_devices(share, fleet))


def test_the_cheapest_cut_of_each_number_of_blocks_that_the_share_can_join() -> None:
    fleet: dict[str, object] = {"devices": 10, "memory_cap_mib": [0.4, 0.32, 0.001]}  # 4, 3 and 3 devices
    found, chosen = proposals(0.7, fleet=fleet, train={"batch_size": 16, "participants": 2, "fit": "auto"})
    assert [cut.blocks for cut in found] == sorted({cut.blocks for cut in found})
    assert len(found) > 1
    assert all(cut.eligible == 7 for cut in found)
    assert chosen.step_flops == min(cut.step_flops for cut in found)
    assert any(takers[1] for cut in found for takers in cut.takers), "nobody recomputes"
    config = small(fleet=fleet, train={"batch_size": 16, "participants": 2, "fit": "auto"})
    measured = proposal_of(config, chosen.split, SHAPE, CLASSES, make_fleet(config.fleet, 0))
    assert measured.cut == chosen
    # of a stage the mean over those whose cap holds it, each by its way; of the stages the mean
    caps = [cap for cap in make_fleet(config.fleet, 0).memory_cap_bytes if cap is not None]
    means = []
    for cost in measured.costs.stages:
        flops = [cost.ways[cost.way_for(cap)].step_flops for cap in caps if cap >= cost.least_bytes]
        means.append(sum(flops) / len(flops))
    assert chosen.step_flops == pytest.approx(sum(means) / len(means), rel=1e-12)


def test_where_the_share_cannot_join_each_has_a_smaller_peak_than_the_one_before() -> None:
    found, chosen = proposals(1.0)
    peaks = [cut.peak_bytes for cut in found]
    assert len(peaks) > 1
    assert peaks == sorted(set(peaks), reverse=True)
    assert chosen is found[-1]
    assert chosen.eligible == 0


def test_without_caps_every_device_takes_the_first_way_of_the_cheapest_cut() -> None:
    train = {"batch_size": 16, "participants": 2, "fit": "auto"}
    fleet: dict[str, object] = {"devices": 10, "memory_cap_mib": [0.001], "enforce": False}
    found, chosen = proposals(1.0, fleet=fleet, train=train)
    assert found[0].blocks == 1
    assert chosen.step_flops == min(cut.step_flops for cut in found)
    assert all(takers == (10, 0, 0, 0) for cut in found for takers in cut.takers)
    _, whole = proposals(1.0, fleet=fleet)
    assert (whole.split, whole.step_flops) == (chosen.split, chosen.step_flops)


@pytest.mark.parametrize(
    ("share", "devices", "wanted"), [(0.55, 20, 11), (0.7, 10, 7), (0.71, 10, 8), (0.001, 10, 1), (1.0, 3, 3)]
)
def test_a_share_is_so_many_devices_at_least(share: float, devices: int, wanted: int) -> None:
    assert wanted_devices(share, Fleet((1,) * devices)) == wanted


def test_a_method_without_blocks_is_refused() -> None:
    config = small(method={"name": "fedavg"})
    with pytest.raises(ConfigError) as caught:
        list(propose(config, SHAPE, CLASSES, make_fleet(config.fleet, 0), 1.0))
    assert_one_line(caught.value, "--cut", "fedavg", "smartfreeze")


def test_a_window_wider_than_any_cut_is_refused() -> None:
    config = small(method={"window": 5})
    with pytest.raises(ConfigError) as caught:
        list(propose(config, SHAPE, CLASSES, make_fleet(config.fleet, 0), 1.0))
    assert_one_line(caught.value, "method.window: 5", "4 places")


@pytest.fixture(scope="module")
def proposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, its cut for all devices (cut.yaml) and what was printed (cut.json)."""
    folder = tmp_path_factory.mktemp("cut")
    values = CUTTABLE | {"data": {**CUTTABLE["data"], "cache_dir": str(folder / "cache")}}  # type: ignore[dict-item]
    (folder / "cuttable.yaml").write_text(yaml.safe_dump(values))
    program = command(Path(), Path())[:3]
    options = ["--cut", "--share=1", "--json", f"--write={folder / 'cut.yaml'}"]
    done = run([*program, "plan", str(folder / "cuttable.yaml"), *options])
    assert done.returncode == 0, done.stderr
    (folder / "cut.json").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_a_quarter_that_cannot_hold_stage_1_can_join_with_the_proposed_cut(proposed: Path) -> None:
    told = json.loads((proposed / "cut.json").read_text())
    assert told["usual"]["stages"][0]["eligible"] == 6
    assert told["usual"]["peak_mib"] > CAP_MIB
    chosen = told["proposal"]
    assert chosen["eligible"] == 8
    assert chosen["peak_mib"] <= CAP_MIB
    assert chosen["split"] == yaml.safe_load((proposed / "cut.yaml").read_text())["model"]["split"]


@pytest.mark.slow
def test_a_run_with_the_proposed_cut_takes_them_in(proposed: Path) -> None:
    done = run(command(proposed / "cut.yaml", proposed / "run"))
    assert done.returncode == 0, done.stderr
    for record in metrics(proposed / "run"):
        if record["kind"] == "round":
            assert record["selected"] == list(range(8))
            assert record["failed"] == {}
            assert max(record["peak_memory_mib"][device] for device in ("0", "4")) <= CAP_MIB


# A network that is soon searched through.
TWO_PLACES = ["--model.factory=network_of_two_places:tiny"]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--cut", "--share=1.2"], 64, "'1.2' is not a share"),
        (["--cut", "--share=0"], 64, "'0' is not a share"),
        (["--cut", "--method.name=fedavg"], 64, "cuts are sought for the stages of smartfreeze"),
        (["--cut", "--fleet.memory_cap_mib=0.01", *TWO_PLACES], 64, "no cut lets 90% of the devices join every stage"),
        (["--cut", "--fleet.memory_cap_mib=9", "--write=cut.json"], 64, "end in .yaml"),
        (["--cut", "--fleet.memory_cap_mib=9", "--write=/dev/null/cut.yaml"], 74, "cannot write /dev/null/cut.yaml"),
        (["--partition-picture=p.txt"], 64, "must end in .png"),
        (["--partition-picture=/dev/null/p.png"], 74, "cannot write /dev/null/p.png"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_is_one_line(
    options: list[str],
    code: int,
    says: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "network_of_two_places.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "digits", "--model.width=4", f"--data.cache_dir={tmp_path}", *options]
    try:
        returned = main(arguments)
    except SystemExit as error:
        returned = int(error.code or 0)
    lines = capfd.readouterr().err.splitlines()
    assert (returned, len(lines)) == (code, 1), lines
    assert says in lines[0]
