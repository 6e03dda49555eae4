"""`fedfreeze compare`: the share of device-rounds by way to take a step, worked out by hand."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedfreeze.cli import main
from fedfreeze.compare.figures_of import Comparison, make_comparison
from fedfreeze.compare.page import report_page
from fedfreeze.compare.read import read_run
from fedfreeze.compare.table import WAYS_CAPTION, as_json, markdown_table, terminal_text
from fedfreeze.errors import DataError
from tests.support.checks import assert_one_line
from tests.support.run_folders import write_run

RECOMPUTE = {"train": {"fit": "auto"}}
PEAKS = [{0: 1.0, 1: 2.0}, {1: 2.0, 2: 3.0}, {2: 3.0}]
# of five device-rounds three are whole; device 3 failed, and is not counted
WAYS = [{0: "whole", 1: "recompute"}, {1: "recompute", 2: "whole", 3: "recompute"}, {2: "whole"}]


def compared(*folders: Path) -> Comparison:
    return make_comparison([read_run(folder) for folder in folders])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mixed", sections=RECOMPUTE, peaks_mib=PEAKS, ways=WAYS)


def test_shares_are_of_devices_that_completed(mixed: Path) -> None:
    (row,) = compared(mixed).rows
    assert {way: figure.mean for way, figure in row.ways.items()} == pytest.approx({"whole": 0.6, "recompute": 0.4})


def test_terminal_and_markdown_have_a_column_for_each_way(mixed: Path, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", peaks_mib=PEAKS, ways=[dict.fromkeys(each, "whole") for each in PEAKS])
    comparison = compared(mixed, whole)
    text = terminal_text(comparison, 100)
    rows = text.split(WAYS_CAPTION)[1].split("\n\n")[0].splitlines()
    # headings have two lines
    assert [line.split() for line in rows[1:3]] == [["whole", "recompute"], ["setting", "%", "%"]]
    assert [line.split()[-2:] for line in rows[3:]] == [["100", "0"], ["60", "40"]]
    assert max(map(len, text.split("target accuracy")[0].splitlines())) <= 100
    head, _, *lines = markdown_table(comparison).splitlines()
    assert head.endswith("| whole % | recompute % |")
    assert [line.split(" | ")[-2:] for line in lines] == [["100", "0 |"], ["60", "40 |"]]


def test_seeds_have_mean_and_spread_also_in_json(mixed: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "other",
        sections=RECOMPUTE,
        seed=1,
        peaks_mib=PEAKS,
        ways=[dict.fromkeys(each, "whole") for each in PEAKS],
    )
    comparison = compared(mixed, other)
    assert "80.0 ± 28.3" in markdown_table(comparison)
    (row,) = json.loads(as_json(comparison))["settings"]
    assert row["way_shares"]["whole"] == {
        "mean": pytest.approx(0.8),
        "spread": pytest.approx(0.2 * 2**0.5),
        "n": 2,
        "values": pytest.approx([0.6, 1.0]),
    }
    assert row["way_shares"]["recompute"]["values"] == pytest.approx([0.4, 0.0])


def test_one_way_alone_is_not_shown_but_in_json(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", peaks_mib=PEAKS, ways=[dict.fromkeys(each, "whole") for each in PEAKS])
    comparison = compared(folder)
    assert WAYS_CAPTION not in terminal_text(comparison, 100)
    assert "whole" not in markdown_table(comparison)
    assert "ways to take a step" not in report_page(comparison, [])
    assert json.loads(as_json(comparison))["settings"][0]["way_shares"]["whole"]["mean"] == 1.0


def test_a_run_of_an_older_version_has_a_dash_and_one_that_went_on_from_it_its_later_rounds(
    mixed: Path, tmp_path: Path
) -> None:
    older = write_run(tmp_path / "older", peaks_mib=PEAKS)
    assert [row.ways for row in compared(older).rows] == [{}]
    comparison = compared(mixed, older)
    assert [line.split(" | ")[-2:] for line in markdown_table(comparison).splitlines()[2:]] == [
        ["-", "- |"],
        ["60", "40 |"],
    ]
    later = write_run(tmp_path / "later", sections=RECOMPUTE, peaks_mib=PEAKS, ways=[None, *WAYS[1:]])
    (row,) = compared(later).rows
    assert row.ways["whole"].mean == pytest.approx(2 / 3)


class Text(HTMLParser):
    """All that a page says."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_has_a_table_of_them_and_says_what_they_mean(mixed: Path, tmp_path: Path) -> None:
    words = Text(report_page(compared(mixed), [])).words
    table = words[words.index(WAYS_CAPTION.capitalize()) :]
    assert [word for word in table if word in ("60", "40")] == ["60", "40"]
    assert "ways to take a step" in words


def test_a_way_that_is_no_text_is_an_error_of_one_line(mixed: Path) -> None:
    metrics = mixed / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"0": "whole"', '"0": 3'))
    with pytest.raises(DataError) as caught:
        read_run(mixed)
    assert_one_line(caught.value, "metrics.jsonl line 2", "way.0")
    assert main(["compare", str(mixed)]) == 65
