"""Runs many small experiments in one process that has imported torch once; started by tests as a program.

    python -m tests.support.many_runs TASKS.json

A task: {"config": NAME or PATH, "overrides": [...], "run_dir": DIR, "ranks": N, "kill_in_round": K or null}. With
`kill_in_round` rank 0 is killed in that round, after its line in metrics.jsonl and before its checkpoint, and the run
is started again. Prints one JSON object a task: {"codes": [...]}.
"""

import json
import os
import signal
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedfreeze.comm.launcher import Launch
from fedfreeze.comm.local_ranks import run_local_ranks
from fedfreeze.config.file import load_config
from fedfreeze.config.schema import Config
from fedfreeze.data.store import open_store, prepare
from fedfreeze.device.cost import Costs, fit_method, measure_costs
from fedfreeze.fleet.devices import make_fleet
from fedfreeze.run import experiment
from fedfreeze.run.experiment import Experiment
from fedfreeze.run.session import run_rank

record_round = Experiment._record


@cache
def predicted(config_name: str, overrides: tuple[str, ...]) -> tuple[dict[str, Any], Costs]:
    """Return what a method makes of the fleet, and what its stages cost."""
    config = load_config(config_name, overrides)
    data, fleet = open_store(prepare(config.data)), make_fleet(config.fleet, config.seed)
    fitted = fit_method(config, data.image_shape, data.num_classes, fleet.memory_cap_bytes)
    return fitted, measure_costs(config, data.image_shape, data.num_classes, fitted)


def run_task(task: dict[str, Any]) -> list[int]:
    """Return the exit codes of a task's lives."""
    config = load_config(task["config"], task["overrides"])
    # found once for each method, and not again by every life of each of its runs; the selector changes nothing in it
    overrides = [override for override in task["overrides"] if not override.startswith("--select.")]
    fitted, costs = predicted(task["config"], tuple(overrides))
    experiment.fit_method = lambda *_: fitted
    experiment.measure_costs = lambda *_: costs
    run_dir = Path(task["run_dir"])
    codes = []
    if task["kill_in_round"] is not None:
        codes.append(run_local_ranks(task["ranks"], partial(run_and_die, config, run_dir, task["kill_in_round"])))
    codes.append(run_local_ranks(task["ranks"], lambda launch: run_rank(config, run_dir, launch)))
    return codes


def run_and_die(config: Config, run_dir: Path, last_round: int, launch: Launch) -> int:
    """Run until rank 0 has written the line of a round, and die there as by SIGKILL."""

    def record_and_die(self: Experiment, result: Any, *facts: Any) -> dict[str, Any]:
        told = record_round(self, result, *facts)
        if result.plan.round >= last_round:
            os.kill(os.getpid(), signal.SIGKILL)
        return told

    Experiment._record = record_and_die  # type: ignore[method-assign]
    return run_rank(config, run_dir, launch)


def main() -> int:
    tasks = json.loads(Path(sys.argv[1]).read_text())
    answers = sys.stdout
    sys.stdout = sys.stderr  # what runs say must not come between the answers
    for task in tasks:
        print(json.dumps({"codes": run_task(task)}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
