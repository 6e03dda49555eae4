"""A tracked run that is killed twice, synced, read back and searched for planted secrets; where wandb writes."""

import os
import struct
import time
from pathlib import Path

import pytest

from fedfreeze.config.schema import Config, TrackConfig
from fedfreeze.track.live import Tracker
from tests.support import launching
from tests.support.launching import command, kill_tree, metrics, start, summary, wait_for_round, write_config
from tests.support.synced_runs import END, WHOLE, own, rebuilt, sync_json, write_run
from tests.support.wandb_runs import (
    KEY,
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
    services,
    table,
)

pytestmark = pytest.mark.usefixtures("surroundings")

SHORT = ["--train.rounds=9", "--pace.policy=fixed"]


def decoded(file: Path) -> str:
    """All that a .wandb file holds, as text: a log of records of Protocol Buffers, cut into blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, part, texts = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if kind == 0:
            break
        part = (b"" if kind in (1, 2) else part) + content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            texts.append(str(record))
    return "\n".join(texts)


@needs_wandb
def test_a_run_that_was_killed_twice_is_one_continuous_curve_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WANDB_API_KEY", KEY), ("SECRET_TOKEN", TOKEN), ("HOME", os.environ["HOME"])):
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(launching.ENVIRONMENT, name, value)
    run = tmp_path / "run"
    started = command(write_config(tmp_path), run, "--track.wandb=offline", "--checkpoint.every_rounds=4", *SHORT)
    ids = []
    for number in (2, 6):  # before the first checkpoint, and between two
        process = start(started)
        assert wait_for_round(process, run, number)
        kill_tree(process)
        ids.append(summary(run)["wandb_id"])
    between = sync_json(capfd, run, "--offline")
    assert (between["state"], between["id"]) == ("synced", ids[0])
    done = launching.run(started)
    assert (done.returncode, done.stderr) == (0, "")
    ids += [record["wandb_id"] for record in metrics(run) if record["kind"] == "run_start"]
    assert set(ids) == {between["id"]}

    told = sync_json(capfd, run, "--offline")
    rounds = [record for record in metrics(run) if record["kind"] == "round"]
    assert (told["state"], told["id"], told["rounds"]) == ("synced", ids[0], len(rounds))
    rows = history(rebuilt(run))
    assert [row["round"] for row in rows] == list(range(1, len(rounds) + 1))
    assert_rounds_are_whole(rows, rounds)
    assert_devices_are_whole(table(rebuilt(run), "devices"), rounds)
    pieces = list((run / "wandb").glob(f"offline-run-*-{ids[0]}"))
    assert len(pieces) == 3
    assert own(rows) == own(history(offline_folder(run)))
    assert sync_json(capfd, run, "--offline")["state"] == "nothing new"

    assert_in_no_file(run, KEY, TOKEN)
    assert "train_loss" in decoded(rebuilt(run) / f"run-{ids[0]}.wandb")
    for piece in (*pieces, rebuilt(run)):
        held = decoded(piece / f"run-{ids[0]}.wandb")
        assert KEY not in held
        assert TOKEN not in held


@needs_wandb
def test_all_of_wandb_is_in_the_folder_that_track_dir_names_and_the_network_is_an_artifact(tmp_path: Path) -> None:
    run, disk, notices = write_run(tmp_path / "run", []), tmp_path / "node" / "disk", []
    (run / "model.safetensors").write_bytes(b"weights")
    tracker = Tracker(
        Config(name="small", track=TrackConfig(wandb="offline", dir=str(disk), artifact=True)),
        run,
        "offline",
        notices.append,
    )
    tracker.start({}, 0)
    log(tracker, run, WHOLE[1:-1])
    tracker.finish(END, STAGES)
    assert notices == []
    assert not (run / "wandb").exists()
    assert_rounds_are_whole(history(offline_folder(disk)), ROUNDS)
    assert list(disk.glob("wandb/data/artifacts/staging/*"))
    held = inspect(offline_folder(disk))
    assert f"model-{tracker.wandb_id}" in held
    assert str(run / "model.safetensors") in held  # it is uploaded from where it lies

    (run / "model.safetensors").unlink()
    time.sleep(1.1)  # wandb names its folders by the second
    tracker = Tracker(tracker.config, run, "offline", notices.append)
    tracker.start({}, 0)
    tracker.finish(END, STAGES)
    assert notices == [f"{run / 'model.safetensors'} is missing: no artifact is logged"]


@needs_wandb
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_track_dir_that_cannot_be_written_ends_the_tracking_alone(
    tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deep", Path("/proc/none")):
        notices: list[str] = []
        config = Config(track=TrackConfig(wandb="offline", dir=str(place)))
        run = write_run(tmp_path / "run", [])
        tracker = Tracker(config, run, mode, notices.append)
        tracker.start({}, 0)
        log(tracker, run, WHOLE[1:3])
        tracker.finish(END, [])
        assert len(notices) == 1
        assert notices[0].startswith("tracking by wandb has ended (")
        assert str(place) in notices[0]
        assert services() == []
    assert capfd.readouterr() == ("", "")
