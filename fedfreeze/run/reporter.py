"""What the user sees: a bar at a terminal, one line a round in a log, stage changes, failures, a closing table."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedfreeze.comm.ranks import Ranks
from fedfreeze.config.schema import Config
from fedfreeze.errors import FedfreezeError, one_line
from fedfreeze.server.coordinator import Coordinator
from fedfreeze.units import duration


class LastingConsole(Console):
    """A console whose reader may leave, or whose disk may fill up: training goes on, unheard."""

    def on_broken_pipe(self) -> None:
        """Go quiet; rich would end the program here."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, or go quiet where that cannot be."""
        try:
            super().print(*objects, **options)
        except UnicodeEncodeError:
            return  # a character that this terminal does not have: the line is lost, the run is not
        except OSError:
            self.on_broken_pipe()


class Reporter:
    """Rank 0's voice; on other ranks it is quiet, but for crashes."""

    def __init__(self, quiet: bool = False, launcher: str = "none"):
        self.quiet = quiet
        # mpirun gives every rank a terminal of its own, also where its output goes to a file
        self.console = LastingConsole(highlight=False, force_terminal=False if launcher == "mpirun" else None)
        self.progress: Progress | None = None
        self.max_rounds = 0
        self.num_stages = 0
        self.timeout_s = math.inf
        self.participants = 0
        self.tells_of_sparse = False

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one; never wrapped, so that logs can be searched."""
        if not self.quiet:
            console = self.progress.console if self.progress else self.console
            console.print(text, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        """Print something that was decided or found."""
        self.say(f"notice: {text}")

    def error(self, error: FedfreezeError) -> None:
        """Print a user's error: one line, once."""
        if not self.quiet:
            self.close()
            print(f"fedfreeze: error: {one_line(error)}", file=sys.stderr, flush=True)

    def crash(self, text: str) -> None:
        """Print what ended this rank and was not expected; also of a rank that is quiet otherwise."""
        self.close()
        print(f"fedfreeze: {text}", file=sys.stderr, flush=True)

    def start(self, config: Config, coordinator: Coordinator, ranks: Ranks, history: Any, *, resumed: bool) -> None:
        """Say what runs, where, and who enforces the caps."""
        self.max_rounds = config.train.rounds
        self.num_stages = len(coordinator.costs.stages)
        self.participants = config.train.participants
        self.tells_of_sparse = coordinator.policy not in ("fixed", "proportional")  # which look at no evidence
        self.timeout_s = config.comm.timeout_s if ranks.world_size > 1 else math.inf
        facts = history.facts
        self.say(f"{config.name}: {config.method.name}, {config.model.label} on {facts['dataset']}, seed {config.seed}")
        self.say(
            f"{len(coordinator.fleet)} devices on {ranks.world_size} rank{'s' * (ranks.world_size > 1)} "
            f"({facts['device']}, backend {ranks.backend}), {config.train.participants} a round; "
            f"caps enforced by: {facts['cap_enforcement']}"
        )
        least = min(coordinator.costs.least_samples)
        too_few = sum(samples < least for samples in coordinator.samples)
        if too_few:
            few = "no sample or one, too few to train with batch normalisation" if least > 1 else "no sample"
            self.notice(
                f"{too_few} of {len(coordinator.fleet)} devices have {few}, and are not selected; lower fleet.devices "
                "or raise data.alpha"
            )
        here, cores = ranks.rank_hosts.count(ranks.rank_hosts[0]), len(os.sched_getaffinity(0))
        if facts["launcher"] in ("mpirun", "srun"):  # which may bind each rank to a core of its own
            cores = max(cores, os.cpu_count() or 1)
        if ranks.device.type == "cpu" and here * config.train.threads_per_rank > cores:
            self.notice(
                f"{here} rank(s) of {config.train.threads_per_rank} thread(s) on the {cores} cores of this host: "
                "slow; lower train.threads_per_rank or the number of ranks"
            )
        if resumed:
            self.notice(f"resumed after round {coordinator.round}")
        for stage, (eligible, able) in enumerate(zip(coordinator.eligible, coordinator.able, strict=True)):
            if len(eligible) < config.train.participants:
                self.notice(
                    f"stage {stage + 1}: only {len(eligible)} devices can hold it, fewer than train.participants"
                )
            elif len(able) < config.train.participants:
                self.notice(
                    f"stage {stage + 1}: only {len(able)} of the {len(eligible)} devices that can hold it have samples "
                    "enough to train, fewer than train.participants"
                )
        if self.console.is_terminal and not self.quiet:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rounds"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=self.max_rounds, completed=coordinator.round)
            self.progress.start()

    def round_end(self, record: dict[str, Any]) -> None:
        """Say how a round went."""
        if record["wall_s"] > self.timeout_s / 2:
            self.notice(
                f"a round took {record['wall_s']:.0f} s: ranks that wait longer than {self.timeout_s:g} s for another "
                "give up; raise comm.timeout_s"
            )
            self.timeout_s = math.inf  # said once
        if record["sparse"] and self.tells_of_sparse:
            self.tells_of_sparse = False
            completed = len(record["peak_memory_mib"])
            self.notice(
                f"round {record['round']}: {completed} device{'s' * (completed != 1)} completed, train.participants is "
                f"{self.participants}: so sparse a round is no evidence of convergence (pace.min_share); said once"
            )
        by_reason: dict[str, list[str]] = {}
        late = {str(device) for device in record["late"]}  # their number stands in the line of the round
        for device, reason in record["failed"].items():
            if device in late:
                continue
            by_reason.setdefault(reason, []).append(device)
        for reason, devices in by_reason.items():
            named = f"device{'s' * (len(devices) > 1)} {', '.join(devices)}"
            self.say(f"round {record['round']}: {named} left out: {reason}")
        if self.progress is None:
            self.say(round_line(record, self.num_stages))
            return
        parts = [f"stage {record['stage'] + 1}/{self.num_stages}"]
        if record["accuracy"] is not None:
            parts.append(f"accuracy {record['accuracy']:.3f}")
        elif record.get("accuracy_sampled") is not None:
            parts.append(f"accuracy ~{record['accuracy_sampled']:.3f}")
        self.progress.update(self.task, completed=record["round"], description=" ".join(parts))

    def stage_end(self, record: dict[str, Any]) -> None:
        """Say that a block was frozen, or that its stage ran out of rounds."""
        self.say(
            f"stage {record['stage'] + 1}/{self.num_stages} ({record['blocks']}) ended after "
            f"{record['rounds']} rounds: {record['reason']}; accuracy {_number(record['accuracy'], '.4f')}"
        )

    def finish(self, summary: dict[str, Any], stages: Sequence[dict[str, Any]], folder: Path) -> None:
        """Print the closing table."""
        self.close()
        if self.quiet:
            return
        self.console.print(closing_table(stages))
        limited = [str(record["stage"] + 1) for record in stages if record["reason"] == "round_limit"]
        if limited or len(stages) < summary["stages"]:
            self.notice(
                f"a round limit, not the criterion, ended stage {', '.join(limited) or len(stages)}; the network of "
                f"stage {summary['deployed_stage'] + 1} of {summary['stages']} is deployed"
            )
        untrained = [str(record["stage"] + 1) for record in stages if record.get("device_rounds") == 0]
        if untrained:
            self.notice(f"no device completed a round of stage {', '.join(untrained)}: its block is as it began")
        self.say(
            f"accuracy {_number(summary['final_accuracy'], '.4f')} after {summary['rounds']} rounds, "
            f"{summary['wall_s']:.1f} s"
        )
        if summary["memory_cut_mean"] is not None:
            self.say(
                f"memory: peak {summary['peak_memory_mib']:.2f} MiB, mean {summary['mean_memory_mib']:.2f} MiB, "
                f"full model {summary['full_memory_mib']:.2f} MiB (cut {_percent(summary['memory_cut_peak'])} and "
                f"{_percent(summary['memory_cut_mean'])})"
            )
        if summary["small_batch_share"] > 0:
            self.notice(
                f"{summary['small_batch_share']:.0%} of the measured peaks are of devices with fewer samples than a "
                "batch, which need less; the full model's is predicted for a whole batch: the cuts are overstated"
            )
        self.say(
            f"emulated: {duration(summary['emulated_s'])} on the devices' clock, {summary['bytes_total'] / 1e6:.1f} MB "
            "sent up and down"
        )
        short = f" by their memory, {summary['trainable']:.0%} with samples enough"
        short = short if summary["trainable"] < summary["inclusion"] else ""
        self.say(
            f"devices: {summary['participation']:.0%} trained, {summary['inclusion']:.0%} could{short}; "
            f"{summary['trained_below_full_memory']} that trained could not hold the full model"
        )
        self.say(f"results in {folder}")

    def close(self) -> None:
        """Stop the bar, so that the terminal is left in order."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def round_line(record: dict[str, Any], num_stages: int) -> str:
    """Return one round as one line of a log."""
    completed = len(record["selected"]) - len(record["failed"])
    peak = max(record["peak_memory_mib"].values(), default=None)
    late = f" late {len(record['late'])}" if record["late"] else ""
    return (
        f"round {record['round']} stage {record['stage'] + 1}/{num_stages} ({record['stage_round']}) "
        f"loss {_number(record['train_loss'], '.4f')} accuracy {_accuracy(record)} "
        f"perturbation {_number(record['perturbation'], '.4f')} slope {_number(record['slope'], '+.4f')} "
        f"devices {completed}/{len(record['selected'])}{late} peak {_number(peak, '.2f')} MiB "
        f"emulated {duration(record['emulated_s'])} wall {record['wall_s']:.2f} s"
    )


def closing_table(stages: Sequence[dict[str, Any]]) -> Table:
    """Return the stages of a run as a table."""
    table = Table(
        title="stages (measured peak, against the full model's predicted one)",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="underline",
    )
    for heading in ("stage", "blocks", "rounds", "ended", "peak MiB", "of full", "eligible", "accuracy"):
        table.add_column(heading, justify="left" if heading in ("blocks", "ended") else "right", overflow="fold")
    for record in stages:
        table.add_row(
            str(record["stage"] + 1),
            record["blocks"],
            str(record["rounds"]),
            record["reason"],
            f"{record['peak_memory_mib']:.2f}",
            f"{record['peak_memory_mib'] / record['full_memory_mib']:.0%}",
            str(record["eligible"]),
            _number(record["accuracy"], ".4f"),
        )
    return table


def _percent(share: float) -> str:
    return f"{round(share * 100) + 0}%"


def _accuracy(record: dict[str, Any]) -> str:
    """Return the accuracy of a round, with a tilde if it is of some of the test samples only."""
    sampled = record.get("accuracy_sampled")
    return _number(record["accuracy"], ".4f") if sampled is None else f"~{sampled:.4f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
