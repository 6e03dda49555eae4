"""Run folders as `fedfreeze sync` meets them, and what it has made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedfreeze.cli import main
from fedfreeze.config.file import dump_config
from fedfreeze.config.schema import Config, TrackConfig
from tests.support.wandb_runs import ROUNDS, STAGES

START = {"kind": "run_start", "name": "small", "round": 0, "hosts": ["n1"], "seed": 3, "wandb_id": None}
END = {"kind": "run_end", "status": "finished", "exit_code": 0, "rounds": 6, "final_accuracy": 0.6, "stages": 2}
WHOLE = [START, *ROUNDS[:3], STAGES[0], *ROUNDS[3:], STAGES[1], END]


def write_run(
    folder: Path, records: list[dict[str, Any]] = WHOLE, *, wandb_id: str | None = None, **options: Any
) -> Path:
    """Write the folder of a run that ended where `records` do."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(name="small", track=TrackConfig(**options))
    (folder / "config.yaml").write_text(dump_config(config))
    records = [record | ({"wandb_id": wandb_id} if record["kind"] == "run_start" else {}) for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finished = records[-1:] == [END]
    summary = {"status": "finished" if finished else "running", "exit_code": 0 if finished else None}
    (folder / "summary.json").write_text(json.dumps(summary | {"wandb_id": wandb_id}))
    return folder


def rebuilt(run: Path) -> Path:
    """The one offline run that a sync has left."""
    (folder,) = (run / "wandb" / "sync").glob("offline-run-*")
    return folder


def own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows less what wandb draws by the clock and by chance."""
    drawn = ("_timestamp", "_runtime", "artifact_path")
    return [{name: value for name, value in row.items() if not name.endswith(drawn)} for row in rows]


def sync_json(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["sync", *map(str, arguments), "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out)[0]  # type: ignore[no-any-return]
