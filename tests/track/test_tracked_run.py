"""A tracked run from the command line: killed, resumed, read back with wandb's tool, searched for planted secrets."""

import json
from pathlib import Path

import pytest

from tests.support import launching
from tests.support.launching import (
    command,
    kill_tree,
    metrics,
    run,
    sha256,
    start,
    summary,
    wait_for_round,
    write_config,
)
from tests.support.wandb_runs import (
    KEY,
    TOKEN,
    assert_devices_are_whole,
    assert_in_no_file,
    assert_rounds_are_whole,
    history,
    inspect,
    needs_wandb,
    offline_folder,
    table,
)

pytestmark = needs_wandb


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that was killed and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    config = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WANDB_API_KEY", KEY), ("MY_SECRET_TOKEN", TOKEN), ("HOME", str(folder / "home"))):
            patch.setitem(launching.ENVIRONMENT, name, value)
        patch.setitem(launching.ENVIRONMENT, "XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "home").mkdir()
        options = ["--track.wandb=offline", "--track.project=p", "--track.group=g", "--track.tags=[a, b]"]
        process = start(command(config, folder / "run", *options, ranks=2))
        assert wait_for_round(process, folder / "run", 5)
        kill_tree(process)
        done = run(command(config, folder / "run", *options, ranks=2))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    return folder


def test_tracking_changes_no_bit(tracked: Path, small_run: tuple[Path, Path]) -> None:
    _, untracked = small_run
    assert sha256(tracked / "run") == sha256(untracked)
    assert not (untracked / "wandb").exists()


def test_the_file_holds_what_metrics_jsonl_holds(tracked: Path) -> None:
    folder = offline_folder(tracked / "run")
    rounds = [record for record in metrics(tracked / "run") if record["kind"] == "round"]
    stages = [record for record in metrics(tracked / "run") if record["kind"] == "stage"]
    rows = history(folder)
    assert_rounds_are_whole(rows, rounds)
    assert_devices_are_whole(table(folder, "devices"), rounds)
    closing = table(folder, "stages")
    assert [{k: v for k, v in stage.items() if k != "kind"} for stage in stages] == closing
    assert rows[-1]["traffic_gb"] == pytest.approx(sum(r["bytes_up"] + r["bytes_down"] for r in rounds) / 1e9)
    ends = [row["round"] for row in rows if "stage_end/reason" in row]
    assert len(ends) == len(stages)


def test_summary_and_configuration_are_there(tracked: Path) -> None:
    text = inspect(offline_folder(tracked / "run"))
    told = summary(tracked / "run")
    assert json.dumps(told["final_accuracy"]) in text
    assert '"wandb"' in text
    assert '"offline"' in text


def test_the_two_lives_share_one_id(tracked: Path) -> None:
    folders = list((tracked / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1


def test_no_secret_of_the_environment_is_in_any_file(tracked: Path) -> None:
    assert_in_no_file(tracked / "run", KEY, TOKEN)
    if any((tracked / "home").rglob("*")):
        assert_in_no_file(tracked / "home", KEY, TOKEN)
