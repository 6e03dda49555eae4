"""`fedfreeze compare` on what it cannot compare: one line, the right exit code, nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfreeze.cli import main
from fedfreeze.errors import ExitCode
from tests.support.run_folders import write_run


def cut(folder: Path) -> None:
    """Cut the last line of a file, as a full disk would."""
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])


def lose_lines(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def line_two(text: str) -> Callable[[Path], None]:
    """Put a text in the place of the record of the first round."""

    def put(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines()
        lines[1] = text
        path.write_text("\n".join(lines) + "\n")

    return put


def in_round(**changes: object) -> Callable[[Path], None]:
    """Change values of the record of the first round; None as a key's value takes it away."""

    def put(folder: Path) -> None:
        record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
        for key, value in changes.items():
            record[key] = value
            if value is REMOVED:
                del record[key]
        line_two(json.dumps(record))(folder)

    return put


REMOVED = object()


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[return-value]


def away(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "no metrics": (away("metrics.jsonl"), 65, "metrics.jsonl is missing; the run folder is not whole"),
    "no summary": (away("summary.json"), 65, "summary.json is missing"),
    "no configuration": (away("config.yaml"), 64, "is not a run folder (it holds no config.yaml)"),
    "last line cut": (cut, 65, "metrics.jsonl line 5 is not JSON"),
    "lines lost": (lose_lines, 65, "metrics.jsonl ends after round 1, line 2, without the end of the run"),
    "no JSON": (line_two("round 1 went well"), 65, "metrics.jsonl line 2 is not JSON"),
    "an empty line": (line_two(""), 65, "metrics.jsonl line 2 is not JSON"),
    "no object": (line_two("[1, 2]"), 65, "metrics.jsonl line 2 is not a JSON object"),
    "nested without end": (line_two("[" * 100_000), 65, "metrics.jsonl line 2 is not JSON"),
    "no kind": (line_two("{}"), 65, "metrics.jsonl line 2: lacks 'kind'"),
    "a key missing": (in_round(bytes_up=REMOVED), 65, "metrics.jsonl line 2: lacks 'bytes_up'"),
    "NaN": (in_round(accuracy=float("nan")), 65, "line 2 is not JSON: NaN is not a number"),
    "infinity": (in_round(emulated_s=float("inf")), 65, "line 2 is not JSON: Infinity is not a number"),
    "a number beyond all": (line_two('{"kind": "round", "round": 1e999}'), 65, "line 2: "),
    "text for a number": (in_round(bytes_up="many"), 65, "line 2: bytes_up is 'many'"),
    "an accuracy over 1": (in_round(accuracy=51.0), 65, "line 2: accuracy is '51.0'"),
    "fewer than no bytes": (in_round(bytes_down=-1), 65, "line 2: bytes_down is '-1'"),
    "a round twice": (in_round(round=2), 65, "line 2: round 2 where round 1 should be"),
    "an unknown device": (in_round(peak_memory_mib={"99": 1.0}), 65, "round 1 names device 99; there are 4"),
    "a device that is none": (in_round(peak_memory_mib={"x": 1.0}), 65, "line 2: peak_memory_mib.x"),
    "binary metrics": (put("metrics.jsonl", b"\x89PNG\r\n\x1a\n\x00\xff"), 65, "metrics.jsonl is not text"),
    "NULs": (put("metrics.jsonl", b"\x00" * 4096), 65, "metrics.jsonl line 1 is not JSON"),
    "empty metrics": (put("metrics.jsonl", b""), 65, "ends after round 0"),
    "binary summary": (put("summary.json", b"\xff\xfe\x00"), 65, "summary.json is not text"),
    "torn summary": (put("summary.json", b'{"status": "fin'), 65, "summary.json is not JSON"),
    "summary without status": (put("summary.json", b"{}"), 65, "summary.json: lacks 'status'"),
    "an unknown status": (put("summary.json", b'{"status": "lost"}'), 65, "summary.json: status is 'lost'"),
    "binary configuration": (put("config.yaml", b"\xff\xfe\x00"), 65, "config.yaml is not text"),
    "no YAML": (put("config.yaml", b"a: [1"), 65, "config.yaml is not YAML"),
    "an empty configuration": (put("config.yaml", b""), 65, "config.yaml: seed is None"),
    "a seed that is none": (put("config.yaml", b"seed: yes"), 65, "config.yaml: seed is True"),
    "a value within itself": (
        put("config.yaml", b"seed: 0\na: &a [*a]"),
        65,
        "config.yaml holds a value that no run has",
    ),
    "keys of two kinds": (
        put("config.yaml", b"seed: 0\na: {1: 2, b: 3}"),
        65,
        "config.yaml holds a value that no run has",
    ),
    "binary partition": (put("partition.csv", b"\xff\xfe"), 65, "partition.csv is not text"),
    "no partition": (
        put("partition.csv", b"device,cap\n0,1\n"),
        65,
        "partition.csv line 2 is not a line of a partition",
    ),
    "another fleet's": (put("partition.csv", b"device,memory_cap_mib\n0,1\n"), 65, "partition.csv holds 1 devices"),
    "a cap that is none": (put("partition.csv", b"device,memory_cap_mib\n0,nan\n"), 65, "a cap of nan MiB"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_runs(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, code, says = DAMAGE[case]
    folder, good = write_run(tmp_path / "run"), write_run(tmp_path / "good", sections={"train": {"rounds": 9}})
    damage(folder)
    out = tmp_path / "out"
    assert main(["compare", str(good), str(folder), "--out", str(out)]) == code
    assert_one_line(capfd.readouterr(), says)
    assert not out.exists()


def assert_one_line(output: tuple[str, str], says: str) -> None:
    assert output[0] == ""
    lines = [line for line in output[1].splitlines() if line]
    assert len(lines) == 1, output[1]
    assert lines[0].startswith("fedfreeze: error: ")
    assert says in lines[0]
    assert len(lines[0]) < 700


OTHER_DATA = {
    "another folder": ({"path": "/elsewhere"}, {}, "data.path is none and /elsewhere"),
    "another data set": ({"name": "mnist"}, {}, "data.name is digits and mnist"),
    "other pixels": ({"image_size": 16}, {}, "data.image_size is none and 16"),
    "another subset": ({"subset": "small"}, {}, "data.subset is none and small"),
    "more classes": ({}, {"num_classes": 11}, "the number of classes is 10 and 11"),
    "other images": ({}, {"image_shape": [3, 8, 8]}, "the shape of the images is [1, 8, 8] and [3, 8, 8]"),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_runs_on_different_data(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, summary, says = OTHER_DATA[case]
    one = write_run(tmp_path / "a")
    two = write_run(tmp_path / "b", seed=1, sections={"data": data}, summary=summary)
    assert main(["compare", str(one), str(two)]) == ExitCode.BAD_CONFIG
    err = capfd.readouterr()
    # either may be named first
    assert_one_line(err, "cannot be compared, they are on different data")
    assert says in err.err or says.partition(" is ")[0] in err.err
    assert str(one) in err.err
    assert str(two) in err.err


def test_what_else_cannot_be_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    again = write_run(tmp_path / "again")
    begun = write_run(tmp_path / "begun", accuracies=[], status="running")
    link = tmp_path / "link"
    link.symlink_to(run)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments, says in {
        (str(tmp_path / "none"),): "none is not a run folder (does not exist)",
        (str(tmp_path),): "is not a run folder (it holds no config.yaml)",
        (str(run / "config.yaml"),): "is not a run folder (",
        ("x" * 5000,): "is not a run folder (File name too long)",
        (str(loop),): "is not a run folder (",
        ("",): "is not a run folder",
        (str(begun),): "metrics.jsonl holds no finished round; there is nothing to compare yet",
        (str(run), str(run)): "is the same run folder as",
        (str(run), f"{run}/../run/"): "is the same run folder as",
        (str(run), str(link)): "is the same run folder as",
        (str(run), str(again)): "are the same run, of one configuration and seed 0",
        (str(run), "--train.rounds=3"): "compare has no option --train.rounds=3",
        (str(run), "--target", "0.5", "-x"): "compare has no option -x",
        (str(run), "--json", str(run)): "is the same run folder as",
    }.items():
        assert main(["compare", *arguments]) == ExitCode.BAD_CONFIG, arguments
        assert_one_line(capfd.readouterr(), says)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--json"],
        ["RUN", "--target=0"],
        ["RUN", "--target=1"],
        ["RUN", "--target=-0.5"],
        ["RUN", "--target=nan"],
        ["RUN", "--target=high"],
        ["RUN", "--target"],
        ["RUN", "--json", "--markdown"],
        ["RUN", "--out"],
    ],
)
def test_usage_mistakes(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "run"))
    with pytest.raises(SystemExit) as caught:
        main(["compare", *(run if argument == "RUN" else argument for argument in arguments)])
    assert caught.value.code == ExitCode.BAD_CONFIG
    assert_one_line(capfd.readouterr(), "fedfreeze compare --help")


def test_a_folder_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    file = tmp_path / "file"
    file.write_text("in the way")
    places = [file, file / "deep", Path("/proc/none/out"), tmp_path / ("x" * 300)]
    for place in places:
        assert main(["compare", str(run), "--out", str(place)]) == ExitCode.STORAGE, place
        assert_one_line(capfd.readouterr(), f"cannot make the folder {place}")
    taken = tmp_path / "out" / "table.md"
    taken.mkdir(parents=True)
    assert main(["compare", str(run), "--out", str(taken.parent)]) == ExitCode.STORAGE
    assert_one_line(capfd.readouterr(), "cannot write")
    assert not [path for path in taken.parent.iterdir() if path.name.startswith(".")]


def test_a_run_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert main(["compare", str(run)]) == ExitCode.BAD_DATA
    assert_one_line(capfd.readouterr(), "metrics.jsonl cannot be read: Is a directory")
    if os.geteuid() != 0:
        (run / "summary.json").chmod(0)
        assert main(["compare", str(run)]) == ExitCode.BAD_DATA
        assert_one_line(capfd.readouterr(), "summary.json cannot be read: Permission denied")


def test_a_torn_line_of_a_run_that_goes_on_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", status="running")
    whole = (run / "metrics.jsonl").read_bytes()
    for length in range(len(whole) - 60, len(whole)):
        (run / "metrics.jsonl").write_bytes(whole[:length])
        assert main(["compare", str(run)]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        # the last character is the end of the line: without it the record is whole
        assert ("the last line is cut" in out) == (length < len(whole) - 1)
