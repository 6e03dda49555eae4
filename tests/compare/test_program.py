"""`fedfreeze compare`: every figure is held against one that was worked out by hand."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fedfreeze.cli import main
from fedfreeze.compare.curves import AXES, accuracy_band
from fedfreeze.compare.figures_of import Comparison, make_comparison
from fedfreeze.compare.pictures import by_cap, could_never, freezes
from fedfreeze.compare.read import read_run
from fedfreeze.compare.settings import make_settings
from fedfreeze.compare.table import as_json, heading_notes, markdown_table, terminal_text
from tests.support.launching import command, run, summary, write_config
from tests.support.run_folders import write_run

FEDAVG = {"method": {"name": "fedavg"}, "fleet": {"enforce": False}}
SELECTOR = {"select": {"name": "smartfreeze"}}


def compared(*folders: Path, target: float | None = None) -> Comparison:
    return make_comparison([read_run(folder) for folder in folders], target)


def labels(comparison: Comparison) -> list[str]:
    return [row.setting.label for row in comparison.rows]


def test_figures_of_one_run_worked_by_hand(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a",
        accuracies=[None, 0.5, 0.8, 0.7],
        emulated_s=[10.0, 20.0, 30.0, 40.0],
        peaks_mib=[{0: 1.0}, {0: 2.0, 3: 3.0}, {}, {3: 4.0}],
    )
    figures = {name: figure.mean for name, figure in compared(folder, target=0.75).rows[0].figures.items()}
    assert figures == pytest.approx(
        {
            "final_accuracy": 0.7,
            "best_accuracy": 0.8,
            "rounds": 4,
            "emulated_s": 100.0,
            "traffic_bytes": 4000,  # 600 up and 400 down in each of four rounds
            "flops": 1e13,  # 2.5e12 in each of four rounds
            "peak_memory_mib": 4.0,
            "mean_memory_mib": 2.5,  # (1 + 2 + 3 + 4) / 4 device-rounds
            "full_memory_mib": 5.0,
            "memory_cut_peak": 0.2,  # 1 - 4 / 5
            "participation": 0.5,  # devices 0 and 3 of four
            "inclusion": 0.75,
            "rounds_to_target": 3,
            "emulated_s_to_target": 60.0,  # 10 + 20 + 30
        }
    )


def test_seeds_of_one_setting_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", seed=0, accuracies=[0.5, 0.8]),
        write_run(tmp_path / "b", seed=1, accuracies=[0.5, 0.6, 0.7], emulated_s=[5.0, 5.0, 5.0]),
        write_run(tmp_path / "c", seed=7, accuracies=[0.5, 0.6]),
    ]
    comparison = compared(*folders, target=0.65)
    (row,) = comparison.rows
    assert (row.setting.label, row.setting.seeds) == ("smartfreeze", [0, 1, 7])
    final = row.figures["final_accuracy"]
    assert final.values == (0.8, 0.7, 0.6)
    assert final.mean == pytest.approx(0.7)
    assert final.spread == pytest.approx(0.1)  # of a sample: sqrt((0.01 + 0 + 0.01) / 2)
    rounds = row.figures["rounds_to_target"]
    assert rounds.values == (2, 3, None)
    assert rounds.mean == 2.5
    assert rounds.spread == pytest.approx(math.sqrt(0.5))
    assert row.figures["emulated_s_to_target"].values == (20.0, 15.0, None)
    assert "2.5 ± 0.7 (2/3)" in terminal_text(comparison, 100)
    assert "17.5 ± 3.5 (2/3)" in markdown_table(comparison)
    assert "(1/3): one of three seeds has this figure" in "\n".join(heading_notes(comparison))


def test_a_target_that_nobody_reached_is_a_dash(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a")
    cells = markdown_table(compared(one, target=0.9)).splitlines()[2].split(" | ")
    assert cells[4:6] == ["-", "-"]
    two = write_run(tmp_path / "b", seed=1)
    assert markdown_table(compared(one, two, target=0.9)).splitlines()[2].split(" | ")[4:6] == ["- (0/2)", "- (0/2)"]


def test_target_is_95_percent_of_the_lowest_best_accuracy(tmp_path: Path) -> None:
    comparison = compared(
        write_run(tmp_path / "a", accuracies=[0.5, 0.9]),
        write_run(tmp_path / "b", accuracies=[0.4, 0.6, 0.5], sections=FEDAVG),
    )
    assert comparison.target.accuracy == pytest.approx(0.57)
    assert "0.5700 (95% of the lowest best accuracy among the settings, that of fedavg" in comparison.target.text
    assert [row.figures["rounds_to_target"].mean for row in comparison.rows] == [2, 2]


def test_labels_say_only_what_differs(tmp_path: Path) -> None:
    base, ideal = write_run(tmp_path / "a"), write_run(tmp_path / "b", sections=FEDAVG)
    assert labels(compared(base)) == ["smartfreeze"]
    assert labels(compared(base, ideal)) == ["fedavg (no caps)", "smartfreeze"]
    chosen = write_run(tmp_path / "c", sections=SELECTOR)
    without = write_run(tmp_path / "d", sections={"select": {"name": "smartfreeze", "exploration": 0.0}})
    assert labels(compared(base, chosen, without)) == [
        "smartfreeze, select smartfreeze",
        "smartfreeze, select smartfreeze, exploration=0",
        "smartfreeze, select uniform",
    ]
    wide = write_run(tmp_path / "e", sections={"model": {"name": "vgg11"}, "train": {"batch_size": 64}})
    other = write_run(tmp_path / "f", sections={"eval": {"batch_size": 99}, "train": {"rounds": 7}})
    assert labels(compared(base, wide, other)) == [
        "smartfreeze",
        "smartfreeze, model vgg11, train.batch_size=64",
        "smartfreeze, rounds=7, eval.batch_size=99",
    ]


def test_long_values_that_differ_in_their_tails_have_labels_of_their_own(tmp_path: Path) -> None:
    splits = [["layer1." + "x" * 40, name] for name in ("a", "b", "c")]
    folders = [write_run(tmp_path / str(i), sections={"model": {"split": split}}) for i, split in enumerate(splits)]
    found = labels(compared(*folders))
    assert len(set(found)) == 3
    assert found[0].startswith('smartfreeze, split=["layer1.xxx')
    assert len(found[0]) < 60


def test_sections_that_may_differ_on_a_resume_make_no_setting(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", sections={"checkpoint": {"keep": 3}, "data": {"cache_dir": "/x"}})
    two = write_run(tmp_path / "b", seed=1, sections={"track": {"project": "p"}, "comm": {"timeout_s": 5.0}})
    assert len(compared(one, two).rows) == 1


def test_a_configuration_of_an_earlier_revision_has_the_defaults(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, emulated_s=[None] * 3)
    lines = (two / "config.yaml").read_text().splitlines(keepends=True)
    (two / "config.yaml").write_text("".join(line for line in lines if "deadline_s" not in line))
    comparison = compared(one, two)
    assert len(comparison.rows) == 1
    assert comparison.rows[0].figures["emulated_s"].values == (30.0, None)
    assert any(f"no emulated time in {two}" in notice for notice in comparison.notices)
    assert "30.0 (1/2)" in markdown_table(comparison)


def test_a_run_of_a_version_whose_blocks_started_anew_is_told_as_such(tmp_path: Path) -> None:
    now, before = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    lines = (before / "config.yaml").read_text().splitlines(keepends=True)
    (before / "config.yaml").write_text("".join(line for line in lines if "  start" not in line))
    assert labels(compared(now, before)) == ["smartfreeze", "smartfreeze, start=anew"]


def test_runs_of_a_version_that_did_not_count_operations_have_none(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    assert "computing (TFLOP)" in markdown_table(compared(one))
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("flops", None)
    (two / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compared(one, two).rows[0].figures["flops"].values == (2.5e12 * 3, None)
    assert compared(two).rows[0].figures["flops"].mean is None
    assert "computing" not in markdown_table(compared(two))


def test_notices_name_what_else_differs(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", sections={"train": {"batch_size": 16}})
    two = write_run(
        tmp_path / "b",
        seed=3,
        sections={"data": {"alpha": 1.0}, **SELECTOR},
        summary={"git_revision": "f00", "cap_enforcement": "cuda", "device": "A GPU", "small_batch_share": 0.1},
    )
    notices = "\n".join(compared(one, two).notices)
    assert (
        "the settings differ in more than the method, and so may what they reach: data.alpha, train.batch_size"
        in notices
    )
    assert "not the same seeds everywhere" in notices
    assert "different revisions of fedfreeze: 0123456789ab, f00" in notices
    assert "different hardware: A GPU, cpu (x86_64)" in notices
    assert "peaks are not counted alike in all runs (caps by cuda, tensor_bytes)" in notices
    assert f"in {two} devices with fewer samples than a batch trained" in notices
    assert compared(one).notices == ()


@pytest.mark.parametrize("status", ["running", "preempted", "failed"])
def test_runs_that_are_not_finished_are_compared_as_far_as_they_went(status: str, tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", status=status)
    with open(one / "metrics.jsonl", "a") as file:
        file.write('{"kind": "round", "rou')
    comparison = compared(one, write_run(tmp_path / "b", sections=FEDAVG))
    table = terminal_text(comparison, 100)
    assert f"smartfreeze [{status}]" in table
    assert f"{one} is not finished (status {status}): compared as far as it went, 3 rounds" in table
    assert "the last line is cut, as a kill leaves it; left out" in table
    seeds = compared(one, write_run(tmp_path / "c", seed=1))
    assert seeds.rows[0].setting.title == "smartfreeze [1 of 2 not finished]"


def test_a_run_that_was_never_evaluated_has_no_accuracy(tmp_path: Path) -> None:
    comparison = compared(write_run(tmp_path / "a", accuracies=[None, None], status="running"))
    assert comparison.target.accuracy is None
    assert "no run was evaluated yet" in terminal_text(comparison)
    assert comparison.rows[0].figures["best_accuracy"].mean is None


def test_a_run_without_partition_csv_is_compared(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "partition.csv").unlink()
    found = read_run(folder)
    assert [row.cap_mib for row in found.devices] == [None, 4.0, 6.0, None]
    assert "caps of devices that never were selected are not known" in found.notices[0]
    assert could_never(found) == set()


def test_order_of_the_runs_changes_nothing(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{name}{seed}", sections=sections, seed=seed, accuracies=[0.1, 0.5 + seed / 7, 0.6])
        for seed in range(3)
        for name, sections in {"a": {}, "b": FEDAVG, "c": SELECTOR, "d": {"select": {"name": "oort"}}}.items()
    ]
    first = as_json(compared(*folders))
    for seed in range(10):
        shuffled = list(folders)
        random.Random(seed).shuffle(shuffled)
        assert as_json(compared(*shuffled)) == first


def test_json_is_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["compare", "--json", str(folder), "--target=0.7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target_accuracy"] == 0.7
    (setting,) = found["settings"]
    assert setting["figures"]["rounds_to_target"] == {"mean": 2.0, "spread": None, "n": 1, "values": [2]}
    assert setting["reached_target"] == 1
    assert setting["runs"][0]["folder"] == str(folder)


def test_tables_fit_the_terminal(tmp_path: Path) -> None:
    sections = {"select": {"name": "smartfreeze", "exploration": 0.0, "loss_utility": False}}
    folders = [write_run(tmp_path / f"a{seed}", seed=seed, accuracies=[0.5, 0.6 + seed / 10]) for seed in range(3)]
    folders += [write_run(tmp_path / "b", sections=sections), write_run(tmp_path / "c", sections=FEDAVG)]
    comparison = compared(*folders)
    for width in (80, 100):
        tables = terminal_text(comparison, width).partition("target accuracy")[0]
        assert max(map(len, tables.splitlines())) <= width
        assert "0.700 ± 0.100" in tables
        assert "exploration=0" in tables
    lines = markdown_table(comparison).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count(" | ") for line in lines}) == 1


def test_units_follow_from_the_size(tmp_path: Path) -> None:
    seconds = write_run(tmp_path / "a")
    assert "emulated time (s)" in markdown_table(compared(seconds))
    hours = write_run(tmp_path / "b", emulated_s=[3600.0, 3600.0, 1800.0])
    table = markdown_table(compared(hours))
    assert "emulated time (h)" in table
    assert "| 2.50 |" in table
    assert "| 0.003 |" in table  # of 3000 bytes, in MB


def test_labels_with_signs_of_markdown_and_of_rich_are_told_as_they_are(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", sections={"model": {"split": ["a", "b"]}})
    comparison = compared(folder, write_run(tmp_path / "b"))
    assert 'split=["a", "b"]' in terminal_text(comparison, 120)
    assert 'split=\\["a", "b"\\]' in markdown_table(comparison)


def test_curves_are_averaged_where_all_seeds_have_one(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", seed=0, accuracies=[0.2, None, 0.4])
    two = write_run(tmp_path / "b", seed=1, accuracies=[0.4, 0.6, 0.6, 0.8])
    (setting,) = make_settings([read_run(one), read_run(two)])
    band = accuracy_band(setting, AXES[0])
    assert band is not None
    assert list(band.x) == [1, 2, 3]
    assert list(band.mean) == pytest.approx([0.3, 0.45, 0.5])  # 0.3 lies between 0.2 and 0.4
    assert band.spread is not None
    assert list(band.spread) == pytest.approx([math.sqrt(0.02), math.sqrt(0.045), math.sqrt(0.02)])
    ((tail_x, tail_y),) = band.tails
    assert (list(tail_x), list(tail_y)) == ([3, 4], pytest.approx([0.6, 0.8]))
    seconds, traffic = (accuracy_band(setting, axis) for axis in AXES[1:])
    assert seconds is not None
    assert list(seconds.x) == [10, 20, 30]
    assert traffic is not None
    assert list(traffic.x) == [1000, 2000, 3000]


def test_devices_that_never_could_are_those_with_the_smallest_caps(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "a", caps_mib=[8.0, 2.0, 6.0, 4.0]))
    assert by_cap(found) == [1, 3, 2, 0]
    assert could_never(found) == {1}  # three of four could
    capless = read_run(write_run(tmp_path / "b", caps_mib=[None] * 4, summary={"inclusion": 1.0}))
    assert could_never(capless) == set()


def test_a_freeze_is_a_block_that_converged_or_was_followed_by_another(tmp_path: Path) -> None:
    stages = [(1, "fixed"), (2, "converged"), (1, "round_limit")]
    frozen = read_run(write_run(tmp_path / "a", accuracies=[0.1] * 4, stages=stages))
    assert freezes(frozen) == [(1, 1), (2, 3)]
    whole = read_run(write_run(tmp_path / "b", accuracies=[0.1] * 4, stages=[(4, "fixed")]))
    assert freezes(whole) == []
    under_way = read_run(write_run(tmp_path / "c", accuracies=[0.1] * 4, stages=[(3, "fixed")], status="running"))
    assert freezes(under_way) == [(1, 3)]


def test_importing_is_light() -> None:
    code = "import sys, fedfreeze.compare.program; assert not {'torch', 'matplotlib', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_real_runs(tmp_path: Path) -> None:
    """What is read from metrics.jsonl is what the run itself says at its end."""
    config = write_config(tmp_path, train={"rounds": 3}, pace={"policy": "fixed"}, eval={"every_rounds": 1})
    folders = [tmp_path / "frozen", tmp_path / "whole"]
    for folder, options in zip(folders, ([], ["--method.name=fedavg", "--fleet.enforce=false"]), strict=True):
        done = run(command(config, folder, *options))
        assert done.returncode == 0, done.stderr
    done = run([sys.executable, "-m", "fedfreeze", "compare", *map(str, folders), "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    settings = json.loads(done.stdout)["settings"]
    assert [setting["label"] for setting in settings] == ["fedavg (no caps)", "smartfreeze"]
    for setting, folder in zip(settings, reversed(folders), strict=True):
        said, found = summary(folder), setting["figures"]
        for name in RUN_SAYS:
            assert found[name]["mean"] == pytest.approx(said[RUN_SAYS[name]]), name


RUN_SAYS = {
    "final_accuracy": "final_accuracy",
    "best_accuracy": "best_accuracy",
    "rounds": "rounds",
    "emulated_s": "emulated_s",
    "traffic_bytes": "bytes_total",
    "flops": "flops_total",
    "peak_memory_mib": "peak_memory_mib",
    "mean_memory_mib": "mean_memory_mib",
    "full_memory_mib": "full_memory_mib",
    "memory_cut_peak": "memory_cut_peak",
    "participation": "participation",
    "inclusion": "inclusion",
}
