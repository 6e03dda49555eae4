"""What Weights & Biases gets, read back with its own tool; and that whatever befalls it never reaches training."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedfreeze.config.schema import Config, TrackConfig
from fedfreeze.errors import ExitCode, UnavailableError
from fedfreeze.track import live
from fedfreeze.track.live import Tracker, bounded, make_tracker, track_mode, wandb_names
from tests.support.checks import ROOT, assert_one_line
from tests.support.wandb_runs import (
    KEY,
    ROUNDS,
    STAGES,
    SUMMARY,
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
    runs,
    services,
    table,
    tracker,
)

pytestmark = pytest.mark.usefixtures("surroundings")


@needs_wandb
def test_an_offline_run_holds_what_the_records_hold_and_nothing_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir, notices = tmp_path / "run", []
    before = dict(os.environ)
    tracked = tracker(run_dir, notices, project="p", group="g", tags=["a", "b"])
    tracked.start({"hosts": ["n1"], "git_revision": None}, 0)
    log(tracked, run_dir, [*ROUNDS[:3], STAGES[0], *ROUNDS[3:], STAGES[1]])
    tracked.finish(SUMMARY, STAGES)
    assert notices == []
    assert capfd.readouterr() == ("", "")
    assert services() == []
    assert dict(os.environ) == before

    folder = offline_folder(run_dir)
    rows = history(folder)
    assert_rounds_are_whole(rows, ROUNDS)
    assert_devices_are_whole(table(folder, "devices"), ROUNDS)
    assert table(folder, "stages") == [{k: v for k, v in stage.items() if k != "kind"} for stage in STAGES]
    assert [row.get("stage_end/reason") for row in rows] == [None, None, "frozen", None, None, "frozen"]
    assert rows[5]["stage_end/accuracy"] == 0.6
    assert "stage_end/accuracy" not in rows[2]
    assert rows[5]["wall_hours"] == pytest.approx(0.25 * 21 / 3600)
    assert rows[5]["traffic_gb"] == pytest.approx(18 + 21e-9)
    assert "emulated_hours" not in rows[5]
    last = ROUNDS[3]  # the last with caps
    peaks = list(last["peak_memory_mib"].values())
    assert rows[3]["memory/peak_mib_max"] == max(peaks)
    assert rows[3]["memory/peak_mib_mean"] == pytest.approx(sum(peaks) / len(peaks))
    assert rows[3]["memory/cap_share_max"] == pytest.approx(max(peaks) / 0.9)
    assert "memory/cap_share_max" not in rows[5]
    assert [row["participants/completed"] for row in rows] == [5 - len(record["failed"]) for record in ROUNDS]

    whole = json.loads(inspect(folder, "--summary"))
    assert whole["config"]["train"]["rounds"] == 100
    assert whole["config"]["facts"]["hosts"] == ["n1"]
    expected = {name: value for name, value in SUMMARY.items() if name != "stages"} | {"num_stages": 2}
    assert {name: whole["summary"].get(name) for name in expected} == expected
    run = next(json.loads(line)["run"] for line in inspect(folder).splitlines() if '"type":"run"' in line)
    assert (run["project"], run["run_group"], run["tags"], run["display_name"]) == ("p", "g", ["a", "b"], "small")
    assert "host" not in run

    assert_in_no_file(tmp_path, KEY, TOKEN)
    assert sorted(path.name for path in (folder / "files").rglob("*.*") if path.is_file()) == sorted(
        path.name for path in (folder / "files" / "media" / "table").iterdir()
    )
    assert list((tmp_path / "here").iterdir()) == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_RUN_GROUP": "sweep",
    "WANDB_TAGS": "a, b c",
}


@pytest.mark.parametrize("silent", [{}, dict.fromkeys(VARIABLES, ""), {"WANDB_PROJECT_NAME": "x"}])
def test_what_a_run_is_called_is_said_by_the_configuration_else_the_variable_else_us(silent):
    ours = {"project": "fedfreeze", "entity": None, "group": None, "tags": []}
    theirs = {"project": "theirs", "entity": "team", "group": "sweep", "tags": ["a", "b c"]}
    assert wandb_names(TrackConfig(), silent) == ours
    assert wandb_names(TrackConfig(), VARIABLES | silent) == (ours if "WANDB_TAGS" in silent else theirs)
    said = {"project": "fedfreeze", "entity": "me", "group": "g", "tags": ["t"]}
    assert wandb_names(TrackConfig(**said), VARIABLES) == said
    for key, value in said.items():
        assert wandb_names(TrackConfig(**{key: value}), VARIABLES) == theirs | {key: value}


@pytest.mark.parametrize("name", ["WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"])
def test_a_variable_that_does_not_count_is_told_where_it_would(tmp_path, monkeypatch, name):
    monkeypatch.setattr(live, "wandb_installed", lambda: True)
    monkeypatch.setenv(name, "x")
    for mode, number in (("offline", 1), ("off", 0)):
        notices = []
        make_tracker(Config(track=TrackConfig(wandb=mode)), tmp_path, notices.append)
        assert len(notices) == number
        assert all(notice.startswith(f"{name} is set and does not count: ") for notice in notices)


@needs_wandb
def test_many_devices_are_rows_of_a_table_in_parts_not_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "TABLE_ROWS", 16)
    for name, value in VARIABLES.items():  # and what the configuration does not say is theirs
        monkeypatch.setenv(name, value)
    run_dir, notices = tmp_path / "run", []
    tracked = tracker(run_dir, notices)
    tracked.start({}, 0)
    records = [round_record(1, devices=40), round_record(2, devices=3), round_record(3, devices=5)]
    log(tracked, run_dir, records)
    tracked.failed(ExitCode.RANK_LOST)
    assert notices == []
    folder = offline_folder(run_dir)
    assert_devices_are_whole(table(folder, "devices"), records)
    rows = history(folder)
    assert_rounds_are_whole(rows, records)
    assert len(rows[0]) < 60
    assert '"exit_code":76' in inspect(folder)
    run = next(json.loads(line)["run"] for line in inspect(folder).splitlines() if '"type":"run"' in line)
    named = [run["project"], run["entity"], run["run_group"], run["tags"], run["display_name"]]
    assert named == ["theirs", "team", "sweep", ["a", "b c"], "small"]


@needs_wandb
def test_a_resumed_run_keeps_its_id_and_its_newest_folder_is_whole(tmp_path):
    run_dir, notices = tmp_path / "run", []
    first = tracker(run_dir, notices)
    first.start({}, 0)
    log(first, run_dir, ROUNDS[:2])
    state = json.loads(json.dumps(first.state_dict()))
    checkpointed = (run_dir / "metrics.jsonl").stat().st_size
    log(first, run_dir, [ROUNDS[2], STAGES[0]])
    first.failed(ExitCode.INTERRUPTED)
    time.sleep(1.1)  # wandb names its folders by the second
    os.truncate(run_dir / "metrics.jsonl", checkpointed)

    second = tracker(run_dir, notices)
    second.load_state_dict(state)
    second.start({}, 2)
    log(second, run_dir, [ROUNDS[2], STAGES[0], *ROUNDS[3:], STAGES[1]])
    second.finish(SUMMARY, STAGES)
    assert notices == []
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{state['wandb_id']}"))) == 2
    folder = offline_folder(run_dir)
    rows = history(folder)
    assert_rounds_are_whole(rows, ROUNDS)
    assert_devices_are_whole(table(folder, "devices"), ROUNDS)
    assert rows[5]["traffic_gb"] == pytest.approx(18 + 21e-9)
    assert rows[5]["wall_hours"] == pytest.approx(0.25 * 21 / 3600)


@needs_wandb
@pytest.mark.parametrize("key", [None, KEY])
def test_online_without_key_or_network_ends_offline_soon_and_asks_nobody(tmp_path, monkeypatch, capfd, key):
    monkeypatch.setattr(live, "INIT_TIMEOUT_S", 3.0)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    terminal = SimpleNamespace(isatty=lambda: True, readline=lambda: pytest.fail("asked"), fileno=lambda: 0)
    monkeypatch.setattr(sys, "stdin", terminal)
    run_dir, notices = tmp_path / "run", []
    tracked = tracker(run_dir, notices, "online")
    started = time.monotonic()
    tracked.start({}, 0)
    log(tracked, run_dir, ROUNDS)
    tracked.finish(SUMMARY, [])
    assert time.monotonic() - started < 20
    assert len(notices) == 1
    assert f"upload later: wandb sync {offline_folder(run_dir)}" in notices[0]
    assert sys.stdin is terminal
    assert_rounds_are_whole(history(offline_folder(run_dir)), ROUNDS)
    assert_in_no_file(tmp_path, KEY, TOKEN)
    assert capfd.readouterr() == ("", "")
    assert services() == []


@needs_wandb
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_is_told_of_once_and_left_behind(tmp_path, monkeypatch, capfd, number):
    run_dir, notices = tmp_path / "run", []
    tracked = tracker(run_dir, notices)
    tracked.start({}, 0)
    log(tracked, run_dir, ROUNDS[:2])
    (service,) = services()
    os.kill(service, number)
    monkeypatch.setattr(live, "FINISH_TIMEOUT_S", 1.0)
    monkeypatch.setattr(live, "CALL_TIMEOUT_S", 1.0)
    started = time.monotonic()
    time.sleep(0.2)
    log(tracked, run_dir, [*ROUNDS[2:], STAGES[0]])
    tracked.finish(SUMMARY, STAGES)
    assert time.monotonic() - started < 10
    assert len(notices) == 1
    assert_one_line(Exception(notices[0]), "training goes on")
    assert not runs(service)


SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from fedfreeze.comm.local_ranks import run_local_ranks
    from tests.support.wandb_runs import ROUNDS, STAGES, SUMMARY, log, services, tracker

    def rank(launch):
        run_dir, notices = Path(sys.argv[1]), []
        tracked = tracker(run_dir, notices)
        tracked.start({}, 0)
        log(tracked, run_dir, ROUNDS)
        if sys.argv[2] == "wait":
            print(os.getpid(), *services(), flush=True)
            time.sleep(60)
        tracked.finish(SUMMARY, STAGES)
        print(notices, services())
        return 0

    assert "wandb" not in sys.modules
    sys.exit(run_local_ranks(1, rank))
"""


def start_script(run_dir: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run_dir), what],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_wandb
def test_a_forked_rank_leaves_everything_written_and_no_process(tmp_path):
    out, err = start_script(tmp_path / "run", "finish").communicate(timeout=60)
    assert (out, err) == ("[] []\n", "")
    assert_rounds_are_whole(history(offline_folder(tmp_path / "run")), ROUNDS)


@needs_wandb
def test_the_service_of_a_killed_rank_ends_by_itself_and_had_written_all_but_the_last_moment(tmp_path):
    process = start_script(tmp_path / "run", "wait")
    rank, service = map(int, process.stdout.readline().split())  # type: ignore[union-attr]
    time.sleep(1.5)
    os.kill(rank, signal.SIGKILL)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while runs(service) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(service)
    # the row of the last round was still open
    assert [row["round"] for row in history(offline_folder(tmp_path / "run"))] == [1, 2, 3, 4, 5]


class FakeWandb:
    """A wandb of which one call fails, and whose server may hold some steps of the run already."""

    class Settings:
        silent: bool
        _disable_stats: bool

        def __init__(self, **values: Any):
            self.values = values

    def __init__(self, failing: str = "nothing", step: int = 0):
        self.failing = failing
        self.step = step
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.options: dict[str, Any] = {}
        self.summary = SimpleNamespace(update=lambda figures: self._call("summary"))
        self.Table = lambda columns, data: self._call("Table")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise SystemExit("over")

    def init(self, **options: Any) -> "FakeWandb":
        self._call("init")
        self.options = options
        return self

    def define_metric(self, *names: str, **options: Any) -> None:
        self._call("define_metric")

    def log(self, values: dict[str, Any], step: int, commit: bool | None = None) -> None:
        self._call("log")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self._call("finish")

    def teardown(self) -> None:
        self._call("teardown")


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "Table", "summary", "finish", "teardown"])
def test_whatever_fails_is_told_once_and_goes_no_further(tmp_path, monkeypatch, failing):
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    before, notices = dict(os.environ), []
    tracked = Tracker(Config(), tmp_path, "offline", notices.append)
    tracked.start({}, 0)
    log(tracked, tmp_path, [*ROUNDS, *STAGES])
    tracked.finish(SUMMARY, STAGES)
    tracked.failed(70)
    assert len(notices) == (0 if failing == "teardown" else 1)
    assert [call for call in fake.calls[fake.calls.index(failing) + 1 :] if call != "teardown"] == []
    assert dict(os.environ) == before


def test_a_metrics_file_that_cannot_be_read_ends_tracking_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    notices: list[str] = []
    tracked = Tracker(Config(), tmp_path, "offline", notices.append)
    tracked.start({}, 2)
    log(tracked, tmp_path, ROUNDS)
    tracked.finish(SUMMARY, STAGES)
    assert len(notices) == 1


def test_rounds_that_the_server_has_are_not_sent_again(tmp_path, monkeypatch):
    fake = FakeWandb(step=5)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    notices: list[str] = []
    tracked = Tracker(Config(), tmp_path, "online", notices.append)
    tracked.load_state_dict({"wandb_id": "abc"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ROUNDS[:3]))
    tracked.start({}, 3)
    log(tracked, tmp_path, ROUNDS[3:])
    tracked.finish(SUMMARY, STAGES)
    assert notices == []
    assert (fake.options["id"], fake.options["resume"], fake.options["mode"]) == ("abc", "allow", "online")
    assert set(fake.steps) == {5, 6}
    assert tracked.traffic_bytes == 18 * 10**9 + 21


def test_settings_that_a_version_lacks_are_left_out_or_spelled_its_way():
    assert live.quiet_settings(FakeWandb).values == {"silent": True, "_disable_stats": True}


def test_off_never_imports_wandb_and_keeps_the_id(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fedfreeze.config.schema import Config;"
        "from fedfreeze.track.live import *;"
        "t = make_tracker(Config(), Path('x'), print); t.load_state_dict({'wandb_id': 'abc'}); t.start({}, 0);"
        "t.log_round({}); t.log_stage({}); t.finish({}, []); t.failed(1);"
        "assert t.state_dict() == {'wandb_id': 'abc'}; assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "said", "mode"),
    [
        ("off", "online", "off"),
        ("offline", "online", "offline"),
        ("offline", None, "offline"),
        ("offline", "disabled", "off"),
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "DISABLED", "off"),
        ("online", "shared", "online"),
    ],
)
def test_the_environment_can_only_make_it_quieter(wanted, said, mode):
    assert track_mode(wanted, {} if said is None else {"WANDB_MODE": said}) == mode


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None)])
def test_wandb_that_is_asked_for_and_missing_is_an_error_at_once(tmp_path, monkeypatch, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)  # a folder called wandb is no package
    with pytest.raises(UnavailableError) as raised:
        tracker(tmp_path / "run", [])
    assert_one_line(raised.value, "track.wandb is offline", "pip install 'wandb>=0.20'")
    assert raised.value.exit_code == ExitCode.UNAVAILABLE
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracker(tmp_path / "run", []).mode == "off"


def test_a_bounded_call_returns_raises_or_is_given_up():
    assert bounded(lambda: 3, 5.0) == 3
    with pytest.raises(KeyError):
        bounded(lambda: {}["x"], 5.0)
    with pytest.raises(RuntimeError, match="SystemExit"):
        bounded(sys.exit, 5.0)
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        bounded(lambda: time.sleep(1), 0.01)
