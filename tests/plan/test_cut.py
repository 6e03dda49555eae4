"""`plan --cut`: the smallest peak for each number of blocks, and a run that takes in whom the usual cut leaves out."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from fedfreeze.cli import main
from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config
from fedfreeze.device.cost import Costs, fake_tensors, measure_costs
from fedfreeze.errors import ConfigError
from fedfreeze.fleet.devices import make_fleet
from fedfreeze.network.blocks import build_outline
from fedfreeze.plan import cut
from fedfreeze.plan.cut import _Search, proposal_of, propose, with_split
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


@functools.cache
def costs_of(split: tuple[str, ...], window: int = 1) -> Costs:
    return measure_costs(with_split(small(method={"window": window}), split), SHAPE, CLASSES)


@functools.cache
def estimate_of(begin: int, end: int, measure: Callable[[_Search, int, int], int] = _Search._estimate) -> int:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_tensors(mode):
        outline = build_outline(small().model, SHAPE, CLASSES, 0)
    return measure(_Search(small(), outline, SHAPE, CLASSES, make_fleet(small().fleet, 0), mode), begin, end)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cut of the network of `small` is measured once, whichever test needs it: the fleet changes nothing in it."""
    monkeypatch.setattr(
        cut, "measure_costs", lambda config, *_: costs_of(tuple(config.model.split), config.method.window)
    )
    monkeypatch.setattr(_Search, "_estimate", lambda self, begin, end: estimate_of(begin, end))


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("window", [1, 2, 3])
def test_each_proposal_has_the_smallest_peak_of_all_cuts_into_as_many_blocks(window: int) -> None:
    config = small(method={"window": window})
    fleet = make_fleet(config.fleet, 0)
    found = {len(p.split): p for p in propose(config, SHAPE, CLASSES, fleet, 1.0)}
    places = ("conv1", "layer1", "layer2", "layer3")
    lowest = None
    for blocks in range(window, len(places) + 1):
        cuts = [("conv1", *rest) for rest in itertools.combinations(places[1:], blocks - 1)]
        peak = min(proposal_of(config, split, SHAPE, CLASSES, fleet).peak_bytes for split in cuts)
        if lowest is None or peak < lowest:
            assert found[blocks].peak_bytes == peak
            assert found[blocks].blocks == blocks == len(found[blocks].costs.stages) + window - 1
            lowest = peak
        else:
            assert blocks not in found


@pytest.mark.usefixtures("measured_once")
def test_it_ends_at_the_fewest_blocks_that_do() -> None:
    costs = [p.peak_bytes for p in propose(small(), SHAPE, CLASSES, make_fleet(small().fleet, 0), 1.0)]
    assert len(costs) > 1
    enough = costs[1] / 2**20 + 0.001  # two blocks do for this cap
    config = small(fleet={"devices": 10, "memory_cap_mib": [enough, 0.001]})
    fleet = make_fleet(config.fleet, 0)
    half = list(propose(config, SHAPE, CLASSES, fleet, 0.5))
    assert [len(p.split) for p in half] == [1, 2]
    assert [p.eligible for p in half] == [0, 5]
    assert len(list(propose(config, SHAPE, CLASSES, fleet, 0.51))) == len(costs)


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
    chosen = told["proposals"][-1]
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
