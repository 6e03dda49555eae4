"""`fedfreeze sync`: whatever became of a run, W&B gets each round once, in order, as metrics.jsonl has it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.cli import main
from fedfreeze.config.schema import Config, TrackConfig
from fedfreeze.errors import DataError, ExitCode
from fedfreeze.track import live
from fedfreeze.track import metrics as metrics_module
from fedfreeze.track.live import Tracker, public_facts
from fedfreeze.track.metrics import read_metrics, read_source
from tests.support.synced_runs import END, START, WHOLE, own, rebuilt, sync_json, write_run
from tests.support.wandb_runs import (
    KEY,
    NOWHERE,
    ROUNDS,
    STAGES,
    TOKEN,
    assert_devices_are_whole,
    assert_in_no_file,
    assert_rounds_are_whole,
    history,
    inspect,
    log,
    needs_wandb,
    offline_folder,
    round_record,
    services,
    table,
)
from tests.support.wandb_server import WandbServer, wandb_server

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


@needs_wandb
def test_an_offline_sync_equals_the_live_run_and_the_second_does_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", wandb_id="abc", project="p", group="g", tags=["a"])
    (run / "metrics.jsonl").rename(run / "all")
    notices: list[str] = []
    config = Config(name="small", track=TrackConfig(wandb="offline", project="p", group="g", tags=["a"]))
    live = Tracker(config, run, "offline", notices.append)
    live.load_state_dict({"wandb_id": "abc"})
    live.start(public_facts(START), 0)
    log(live, run, WHOLE[1:-1])
    live.finish(END, STAGES)
    (run / "all").rename(run / "metrics.jsonl")
    live_folder = offline_folder(run)

    assert main(["sync", "--offline", str(run)]) == 0
    out, err = capfd.readouterr()
    folder = rebuilt(run)
    assert (out, err) == (f"{run}: offline run written, id abc, 6 rounds; upload: wandb sync {folder}\n", "")
    assert services() == []
    assert_rounds_are_whole(history(folder), ROUNDS)
    assert own(history(folder)) == own(history(live_folder))
    assert_devices_are_whole(table(folder, "devices"), ROUNDS)
    assert table(folder, "stages") == table(live_folder, "stages")
    ours, theirs = (json.loads(inspect(place, "--summary")) for place in (folder, live_folder))
    assert ours["config"] == theirs["config"] | {"track": ours["config"]["track"]}
    assert ours["config"]["facts"] == {"seed": 3}
    assert {k: v for k, v in ours["summary"].items() if k[0] != "_" and not isinstance(v, dict)} == {
        k: v for k, v in theirs["summary"].items() if k[0] != "_" and not isinstance(v, dict)
    }
    assert live_folder.is_dir()

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["sync", "--offline", str(run)]) == 0
    assert capfd.readouterr().out == f"{run}: nothing new, id abc, 6 rounds; upload: wandb sync {folder}\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path != run / "wandb"} == {
        path: when for path, when in before.items() if path != run / "wandb"
    }


@needs_wandb
def test_offline_again_where_there_is_more_or_it_is_forced_or_the_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", WHOLE[:3])
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    first = sync_json(capfd, run, "--offline")
    assert (first["state"], first["rounds"]) == ("synced", 2)
    noted = json.loads((run / "wandb" / "synced.json").read_text())
    assert (noted["project"], noted["entity"]) == ("theirs", "team")
    assert '"exit_code":75' in inspect(rebuilt(run))
    write_run(tmp_path / "run")
    (run / "wandb" / "sync" / "staged-left-by-a-kill").mkdir()
    more = sync_json(capfd, "--offline", run)
    assert (more["state"], more["rounds"], more["id"]) == ("synced", 6, first["id"])
    assert_rounds_are_whole(history(rebuilt(run)), ROUNDS)
    assert len(list((run / "wandb" / "sync").glob("staged-*"))) == 1
    assert not [path for path in run.rglob("*") if path.is_symlink() and not path.exists()]
    assert sync_json(capfd, run, "--offline")["state"] == "nothing new"
    assert sync_json(capfd, run, "--offline", "--force")["state"] == "synced"
    assert sync_json(capfd, run, "--offline", "--project=other")["state"] == "synced"
    assert '"project":"other"' in inspect(rebuilt(run)).replace(" ", "")
    shutil.rmtree(rebuilt(run))
    assert sync_json(capfd, run, "--offline", "--project=other")["state"] == "synced"
    (run / "wandb" / "synced.json").write_text("[torn")
    assert sync_json(capfd, run, "--offline", "--project=other")["state"] == "synced"


@needs_wandb
def test_online_goes_on_with_the_same_run_and_sends_no_row_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], server: WandbServer
) -> None:
    run = write_run(tmp_path / "run", WHOLE[:3])
    first = sync_json(capfd, run)
    wandb_id = first["id"]
    assert [row["round"] for row in server.history(wandb_id)] == [1, 2]
    assert server.exit_codes == [75]
    sent = dict(server.rows[wandb_id])
    # it failed before another round was done: that must not take the next round's place
    (run / "summary.json").write_text(json.dumps({"status": "failed", "exit_code": 76}))
    assert sync_json(capfd, run)["state"] == "synced"
    assert server.exit_codes == [75, 76]
    assert server.rows[wandb_id] == sent
    write_run(run)
    assert sync_json(capfd, run)["id"] == wandb_id
    rows = server.history(wandb_id)
    assert_rounds_are_whole(rows, ROUNDS)
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {number: server.rows[wandb_id][number] for number in sent} == sent
    assert server.exit_codes == [75, 76, 0]
    assert server.summaries[wandb_id]["final_accuracy"] == 0.6
    received = len(server.received)
    assert sync_json(capfd, run)["state"] == "nothing new"
    assert len(server.received) == received
    assert not any(KEY.encode() in content or TOKEN.encode() in content for content in server.received)
    assert list((run / "wandb").glob("**/*run-*")) == []
    assert_in_no_file(tmp_path, KEY, TOKEN)


@needs_wandb
def test_wandb_sync_uploads_the_rebuilt_run_with_tables_and_network(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], server: WandbServer
) -> None:
    run = write_run(tmp_path / "run", artifact=True)
    (run / "model.safetensors").write_bytes(b"weights")
    for options in ([], ["--force"]):  # once more: the rows take the places that they had
        wandb_id = sync_json(capfd, run, "--offline", *options)["id"]
        command = [str(Path(sys.executable).with_name("wandb")), "sync", str(rebuilt(run))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert_rounds_are_whole(server.history(wandb_id), ROUNDS)
    assert f"model-{wandb_id}" in server.artifacts
    assert b"weights" in server.uploads.values()
    assert sum(path.startswith("/file/media/table/") for path in server.uploads) == 2
    assert len([path for path in server.uploads if path.endswith("/devices.table.json")]) == 1


@needs_wandb
def test_online_without_a_key_or_a_server_is_one_error_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "INIT_TIMEOUT_S", 3.0)
    run = write_run(tmp_path / "run")
    started = time.monotonic()
    for key in (None, KEY):
        if key is not None:
            monkeypatch.setenv("WANDB_API_KEY", key)
            monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
        assert main(["sync", str(run)]) == ExitCode.UNAVAILABLE
        assert_one_error(capfd, f"{run}: wandb failed: ", "`wandb login`", "--offline")
        assert services() == []
    assert time.monotonic() - started < 20
    assert not (run / "wandb" / "synced.json").exists()
    assert list((run / "wandb" / "sync").iterdir()) == []


@needs_wandb
def test_an_upload_that_does_not_get_through_is_told_and_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: WandbServer
) -> None:
    monkeypatch.setattr(live, "PATIENT_FINISH_TIMEOUT_S", 2.0)
    run = write_run(tmp_path / "run", wandb_id="abc")
    server.refusing = True
    assert main(["sync", str(run)]) == ExitCode.UNAVAILABLE
    assert_one_error(capfd, "wandb gave no answer in 2 s", "try again")
    assert not (run / "wandb" / "synced.json").exists()
    assert services() == []
    server.refusing = False
    assert sync_json(capfd, run)["state"] == "synced"
    assert_rounds_are_whole(server.history("abc"), ROUNDS)


def assert_one_error(capfd: pytest.CaptureFixture[str], *parts: str) -> None:
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("fedfreeze: error: ")
    for part in parts:
        assert part in err, err


def text(content: str | bytes) -> Callable[[Path], None]:
    """Put a text in the place of metrics.jsonl."""
    return lambda run: (run / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())  # type: ignore[return-value]


def second_round(**changes: Any) -> Callable[[Path], None]:
    """Change the second round; ... as a key's value takes it away."""
    record = {key: value for key, value in (ROUNDS[1] | changes).items() if value is not ...}
    return text("".join(json.dumps(line) + "\n" for line in (START, ROUNDS[0], record, *ROUNDS[2:])))


LINES = [json.dumps(record) + "\n" for record in WHOLE]
BAD: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "no folder": (shutil.rmtree, 64, "is not a run folder (does not exist)"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), 64, "(it holds no config.yaml)"),
    "a foreign configuration": (
        lambda run: (run / "config.yaml").write_text("lr: 3\n"),
        64,
        "config.yaml: unknown key lr",
    ),
    "no YAML": (lambda run: (run / "config.yaml").write_bytes(b"a: ["), 64, "config.yaml is not YAML"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), 65, "metrics.jsonl is missing"),
    "a folder for metrics": (
        lambda run: (run / "metrics.jsonl").unlink() or (run / "metrics.jsonl").mkdir(),
        65,
        "metrics.jsonl cannot be read: Is a directory",
    ),
    "empty metrics": (text(""), 65, "metrics.jsonl holds no whole line"),
    "no round": (text(LINES[0]), 64, "holds no finished round; there is nothing to sync yet"),
    "torn in the middle": (text("".join([*LINES[:2], LINES[2][:40] + "\n", *LINES[3:]])), 65, "line 3 is not JSON"),
    "two lines in one": (text("".join([*LINES[:2], LINES[2][:40], *LINES[3:]])), 65, "line 3 is not JSON"),
    "no text": (text(b"\x89PNG\n\xff\xfe"), 65, "metrics.jsonl is not text (byte 0"),
    "NULs": (text(b"\0" * 4096 + b"\n"), 65, "line 1 is not JSON"),
    "another program's": (text('{"step": 1, "loss": 2.0}\n'), 65, "line 1: its kind is 'None'"),
    "no objects": (text("[1, 2]\n"), 65, "line 1 is not a JSON object"),
    "no kind": (text(LINES[0] + "{}\n"), 65, "line 2: lacks 'kind'"),
    "nested without end": (text(LINES[0] + "[" * 100_000 + "\n"), 65, "line 2 is not JSON"),
    "NaN": (second_round(train_loss=float("nan")), 65, "line 3 is not JSON: NaN is not a number"),
    "a round lost": (second_round(round=3), 65, "line 3: round 3 where round 2 should be"),
    "a key missing": (second_round(cap_mib=...), 65, "line 3: lacks 'cap_mib'"),
    "text for bytes": (second_round(bytes_up="many"), 65, "line 3: bytes_up is 'many'"),
    "a peak of nobody": (second_round(peak_memory_mib={"39": 1.0}), 65, "line 3: device 39 has a peak"),
    "the end lost": (text("".join(LINES[:-1])), 65, "summary.json says finished: lines are missing"),
    "an id that is none": (
        text("".join([json.dumps(START | {"wandb_id": "a/../b"}) + "\n", *LINES[1:]])),
        65,
        "wandb_id is 'a/../b'",
    ),
    "wandb is a file": (lambda run: (run / "wandb").write_text(""), 74, "wandb"),
}


@needs_wandb
@pytest.mark.parametrize("case", BAD)
def test_bad_run_folders_are_one_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, code, says = BAD[case]
    run = write_run(tmp_path / "run")
    damage(run)
    assert main(["sync", "--offline", str(run)]) == code
    assert_one_error(capfd, str(run), says)
    assert not (run / "wandb" / "sync").exists()


@needs_wandb
def test_of_several_runs_the_good_ones_are_synced_and_the_first_bad_one_gives_the_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, torn = write_run(tmp_path / "good"), write_run(tmp_path / "torn")
    text("nothing\n")(torn)
    none = tmp_path / "none"
    assert main(["sync", str(torn), str(good), "--offline", str(none), "--json"]) == ExitCode.BAD_DATA
    out, err = capfd.readouterr()
    assert [line.startswith("fedfreeze: error: ") for line in err.splitlines()] == [True, True]
    told = json.loads(out)
    assert [(run["run"], run["state"], run["exit_code"]) for run in told] == [
        (str(torn), "failed", 65),
        (str(good), "synced", 0),
        (str(none), "failed", 64),
    ]
    assert told[1]["folder"] == str(rebuilt(good))
    assert told[0]["error"] in err


@needs_wandb
def test_a_run_that_is_being_written_is_read_as_far_as_its_lines_are_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", WHOLE[:6])
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-30])
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid()}))
    told = sync_json(capfd, run, "--offline")
    assert told["rounds"] == 3
    assert "is in use by pid" in told["notices"][0]
    assert "the last line is not whole (it is being written); left out" in told["notices"][1]
    assert_rounds_are_whole(history(rebuilt(run)), ROUNDS[:3])
    (run / "metrics.jsonl").write_bytes(whole[:-1])  # only the end of the line is missing: the record is whole
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1}))
    told = sync_json(capfd, run, "--offline")
    assert (told["rounds"], told["notices"]) == (4, [])
    finished = write_run(tmp_path / "finished")
    whole = (finished / "metrics.jsonl").read_bytes()
    (finished / "metrics.jsonl").write_bytes(whole[:-5])
    told = sync_json(capfd, finished, "--offline")
    assert told["rounds"] == 6
    assert "as a kill leaves it" in told["notices"][0]


def test_the_id_is_the_runs_own_or_stands_for_what_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    derived = read_source(run, print).wandb_id
    write_run(run, WHOLE[:4], project="another", artifact=True)  # a resumed run may differ in that
    assert read_source(run, print).wandb_id == derived
    twin = write_run(tmp_path / "twin", [START, ROUNDS[0] | {"wall_s": 0.26}, *WHOLE[2:]])
    assert read_source(twin, print).wandb_id != derived
    write_run(run, wandb_id="abc")
    assert read_source(run, print).wandb_id == "abc"
    (run / "summary.json").unlink()
    assert read_source(run, print).wandb_id == "abc"
    write_run(run)
    (run / "summary.json").write_text(json.dumps({"status": "finished", "wandb_id": "def"}))
    assert read_source(run, print).wandb_id == "def"


def test_a_run_that_starts_anew_keeps_the_id_that_the_folder_knows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", WHOLE[:4], wandb_id="abc")
    tracker = Tracker(Config(), run, "offline", print)
    tracker.load_state_dict({"wandb_id": None})
    assert tracker.choose_id() == "abc"
    assert tracker.state_dict() == {"wandb_id": "abc"}
    (run / "summary.json").write_text("{torn")
    assert Tracker(Config(), run, "off", print).choose_id() is None
    (run / "wandb").mkdir()
    (run / "wandb" / "synced.json").write_text('{"id": "def"}')
    assert Tracker(Config(), run, "off", print).choose_id() == "def"
    (run / "wandb" / "synced.json").write_text('{"id": "../d"}')
    assert len(Tracker(Config(), run, "offline", print).choose_id() or "") == 10


def test_metrics_that_grow_are_noted_by_their_whole_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", WHOLE[:4])
    before = read_metrics(run / "metrics.jsonl")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(round_record(4))[:50])
    after = read_metrics(run / "metrics.jsonl")
    assert (before.size, before.sha256, before.torn) == (after.size, after.sha256, False)
    assert after.torn


def test_rounds_that_a_sync_has_checked_are_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sync of 100,000 rounds must not take as long as reading them does; what it tells is the same."""
    checked: list[int] = []
    check = metrics_module._check_round
    monkeypatch.setattr(metrics_module, "_check_round", lambda *a: (checked.append(a[1]), check(*a)))
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    first = read_metrics(path)
    note = {"bytes": first.size, "sha256": first.sha256}
    assert checked == [1, 2, 3, 4, 5, 6]
    checked.clear()
    assert read_metrics(path, note) == first
    assert checked == [1]
    checked.clear()
    for other in ({}, note | {"sha256": "0"}, note | {"bytes": first.size - 1}):
        assert read_metrics(path, other) == first
    assert len(checked) == 3 * 6
    path.write_text(path.read_text().replace('"round": 6', '"round": 7'))  # as many bytes
    with pytest.raises(DataError, match="round 7 where round 6 should be"):
        read_metrics(path, note)


def test_records_are_read_again_as_far_as_they_were(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", WHOLE[:4]) / "metrics.jsonl"
    metrics = read_metrics(path)
    with open(path, "a") as file:
        file.write(json.dumps(round_record(4)) + "\n")
    assert [record["kind"] for record in metrics.records()] == [record["kind"] for record in WHOLE[:4]]
    path.write_bytes(path.read_bytes()[: metrics.size - 20])  # a run that goes on cuts what came after its checkpoint
    with pytest.raises(DataError, match="line 4 is not JSON"):
        list(metrics.records())


@needs_wandb
def test_another_sync_of_the_same_run_is_waited_for_by_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from fedfreeze.storage import lock

    run = write_run(tmp_path / "run")
    (run / "wandb").mkdir()
    descriptor = lock.take(run / "wandb" / "sync.lock", wait=False)
    assert descriptor is not None
    assert main(["sync", "--offline", str(run)]) == ExitCode.BAD_CONFIG
    assert_one_error(capfd, "is being synced by another process; wait for it")
    lock.give_back(descriptor, run / "wandb" / "sync.lock")
    assert main(["sync", "--offline", str(run)]) == 0


@pytest.mark.parametrize(
    ("mode", "arguments", "says"),
    [
        ("offline", [], "WANDB_MODE is offline, which forbids to sync online; unset it, or use --offline"),
        ("disabled", ["--offline"], "WANDB_MODE is disabled, which forbids to sync offline; unset it"),
        (None, ["--train.rounds=3"], "sync has no option --train.rounds=3; it takes run folders, --offline"),
    ],
)
@needs_wandb
def test_what_is_not_allowed(
    mode: str | None,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert main(["sync", str(write_run(tmp_path / "run")), *arguments]) == ExitCode.BAD_CONFIG
    assert_one_error(capfd, says)


def test_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fedfreeze.track.sync.wandb_installed", lambda: False)
    assert main(["sync", str(write_run(tmp_path / "run")), "--offline"]) == ExitCode.UNAVAILABLE
    assert_one_error(capfd, "sync needs wandb, which is not installed; pip install 'wandb>=0.20'")
