"""Kill, stop and signal a run at random again and again; it must end as if nothing had happened.

    python benchmarks/kills.py [--events 50] [--seed 0] [--markdown FILE]

Every event starts the run anew under another launcher, waits for a random moment (start-up included) and does one of:
SIGKILL or SIGSTOP of a rank, SIGKILL of the whole tree, SIGUSR1, SIGUSR2, SIGTERM or SIGINT. Then every process must be
gone within a limit, no checkpoint may be torn, and no file left half-written. In the end the run goes through, and its
network must have the sha256 of an undisturbed run. srun takes part where SLURM_CONF names a cluster.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.launching import (
    ENVIRONMENT,
    command,
    is_gone,
    metrics,
    ranks_of,
    rounds_done,
    run,
    sha256,
    summary,
    write_config,
)

# Of the ranks: none may be left so long after the event. torchrun gives a stopped worker 30 s before it kills it.
LIMIT_S = 60.0

EVENTS = {
    "kill a rank": 4,
    "stop a rank": 1,
    "kill all": 2,
    "SIGUSR1": 2,
    "SIGUSR2": 1,
    "SIGTERM": 2,
    "SIGINT": 1,
}


@dataclass
class Event:
    """One disturbance and what came of it."""

    what: str
    by: str
    ranks: int
    rounds_before: int
    rounds_after: int = 0
    ended_s: float = 0.0
    """Seconds until the last process was gone."""
    status: str = ""
    faults: list[str] = field(default_factory=list)


def launchers() -> list[tuple[str, int, tuple[str, ...]]]:
    """Return what can start a run here: launcher, ranks, further overrides."""
    found: list[tuple[str, int, tuple[str, ...]]] = [("nproc", 1, ()), ("nproc", 3, ()), ("torchrun", 2, ())]
    if shutil.which("mpirun"):
        found += [("mpirun", 2, ()), ("mpirun", 3, ("--comm.transport=mpi",))]
    if "SLURM_CONF" in os.environ:
        found += [("srun 2", 2, ())]
    return found


def tree_of(process: subprocess.Popen[str], run_dir: Path) -> dict[int, int]:
    """Return rank -> process, of whatever launcher."""
    found = ranks_of(run_dir)
    if not found:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        kids = children.read_text().split() if children.exists() else []
        found = {number: int(kid) for number, kid in enumerate(kids)} or {0: process.pid}
    return found


def strike(what: str, process: subprocess.Popen[str], run_dir: Path, generator: random.Random) -> None:
    """Do what an event is about."""
    ranks = tree_of(process, run_dir)
    victim = ranks[generator.choice(sorted(ranks))]
    if what == "kill all":
        for each in [*ranks.values(), process.pid]:
            _send(each, signal.SIGKILL)
    elif what in ("kill a rank", "stop a rank"):
        _send(victim, signal.SIGKILL if what.startswith("kill") else signal.SIGSTOP)
    elif what == "SIGINT":
        for each in ranks.values():  # as a terminal does
            _send(each, signal.SIGINT)
    else:
        _send(victim, signal.Signals[what])


def _send(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def disturb(config: Path, run_dir: Path, generator: random.Random, events: list[Event]) -> Event:
    """Start the run, disturb it, and wait until everything has ended."""
    by, ranks, options = generator.choice(launchers())
    what = generator.choices(list(EVENTS), list(EVENTS.values()))[0]
    event = Event(what, f"{by}{' (mpi)' if options else ''}", ranks, rounds_done(run_dir))
    # a rank that is stopped while all come together is given up after join_s, later after heartbeat_s
    limits = ("--comm.heartbeat_s=2", "--comm.join_s=20")
    arguments = command(config, run_dir, *limits, *options, ranks=ranks, by=by)
    log = run_dir.with_suffix(".log").open("a")
    process = subprocess.Popen(
        arguments, stdout=log, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )
    wanted = event.rounds_before + generator.randrange(0, 4)
    until = time.monotonic() + (generator.random() * 6 if generator.random() < 0.25 else 60)
    starts = len([line for line in metrics(run_dir) if line["kind"] == "run_start"])
    while time.monotonic() < until and process.poll() is None:
        begun = len([line for line in metrics(run_dir) if line["kind"] == "run_start"]) > starts
        if begun and rounds_done(run_dir) > wanted:
            break
        time.sleep(0.02)
    time.sleep(generator.random() * 0.3)
    processes = {*tree_of(process, run_dir).values(), process.pid}
    struck = time.monotonic()
    if process.poll() is None:
        strike(what, process, run_dir, generator)
    while time.monotonic() - struck < LIMIT_S:
        process.poll()
        if all(is_gone(each) for each in processes):
            break
        time.sleep(0.02)
    else:
        event.faults.append(f"still there after {LIMIT_S:.0f} s: {[each for each in processes if not is_gone(each)]}")
        for each in processes:
            _send(each, signal.SIGKILL)
    event.ended_s = time.monotonic() - struck
    process.wait(30)
    orphans = [each for each in ranks_of(run_dir).values() if not is_gone(each)]
    if orphans:
        event.faults.append(f"orphans {orphans}")
        for each in orphans:
            _send(each, signal.SIGKILL)
    event.rounds_after = rounds_done(run_dir)
    if (run_dir / "summary.json").exists():
        event.status = f"{summary(run_dir)['status']} {summary(run_dir)['exit_code']}"
    if "is torn" in run_dir.with_suffix(".log").read_text().rpartition("===")[2]:
        event.faults.append("a torn checkpoint")
    log.write("\n===\n")
    return event


def torture(folder: Path, events: int, seed: int) -> tuple[list[Event], str, str]:
    """Return the events, the sha256 of the undisturbed run and that of the disturbed one."""
    config = write_config(folder, train={"rounds": 3 * events, "local_epochs": 1}, pace={"policy": "fixed"})
    undisturbed = run(command(config, folder / "undisturbed"), timeout_s=900)
    assert undisturbed.returncode == 0, undisturbed.stderr
    generator = random.Random(seed)
    found: list[Event] = []
    run_dir = folder / "disturbed"
    while len(found) < events:
        found.append(disturb(config, run_dir, generator, found))
        print(json.dumps(found[-1].__dict__), flush=True)
        if (run_dir / "summary.json").exists() and summary(run_dir)["status"] == "finished":
            break
    last = run(command(config, run_dir, ranks=2), timeout_s=900)
    assert last.returncode == 0, last.stderr
    return found, sha256(folder / "undisturbed"), sha256(run_dir)


def table(events: list[Event]) -> str:
    """Return how long each kind of event took to its last process, as a table."""
    rows = ["| event | launcher | times | seconds until all had ended: median | longest |", "|---|---|---|---|---|"]
    groups = collections.defaultdict(list)
    for event in events:
        groups[event.what, event.by].append(event.ended_s)
    for (what, by), seconds in sorted(groups.items()):
        rows.append(f"| {what} | {by} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return "\n".join(rows)


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedfreeze-kills-") as folder:
        events, ours, theirs = torture(Path(folder), options.events, options.seed)
    faults = [fault for event in events for fault in event.faults]
    text = (
        f"{len(events)} events, seed {options.seed}, {time.monotonic() - started:.0f} s; faults: {faults or 'none'}; "
        f"sha256 {'equal' if ours == theirs else 'DIFFERENT'} ({ours[:16]})\n\n{table(events)}\n"
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(f"# Kills\n\n`python {' '.join(sys.argv)}`\n\n{text}")
    return int(bool(faults) or ours != theirs)


if __name__ == "__main__":
    sys.exit(main())
