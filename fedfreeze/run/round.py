"""One federated round: the heart of fedfreeze, on one screen."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedfreeze.comm.ranks import Ranks
from fedfreeze.device.emulator import Emulator
from fedfreeze.messages import DeviceReport, ProbePlan, RoundPlan, Verdict
from fedfreeze.run.parts import RoundParts
from fedfreeze.select import Probes
from fedfreeze.server.coordinator import Coordinator
from fedfreeze.server.pace import PerturbationWindow


@dataclass(frozen=True)
class RoundResult:
    """What a round came to; the same on every rank, but for its times."""

    plan: RoundPlan
    reports: tuple[DeviceReport, ...]
    verdict: Verdict
    accuracy: float | None
    """On all the test data, if it was asked for."""
    accuracy_sampled: float | None
    """On `eval.samples` of them, if that was asked for and the other was not."""
    elements_reduced: int
    """Elements that the all-reduce carried: active block + output module, the table not counted."""
    train_s: tuple[float, ...]
    """Wall seconds that each rank's devices took."""
    parts: RoundParts
    """Where this rank's seconds went; of all here, this alone differs from rank to rank."""


def run_round(
    ranks: Ranks, coordinator: Coordinator | None, window: PerturbationWindow, emulator: Emulator
) -> RoundResult:
    """Collective: every rank must call this. One federated round of the current stage; rank 0 has the coordinator."""
    parts = RoundParts()
    # participant selector: it may ask devices first; rank 0 decides, everyone knows
    if emulator.asks:
        ask_devices(ranks, coordinator, emulator)
    parts.end("ask")
    plan = RoundPlan.from_json(ranks.decide(lambda: plan_of(coordinator, begin=not emulator.asks)))
    parts.end("plan")

    # local training: each device in turn under its own memory cap; one that fails adds nothing
    update = emulator.empty_update(plan)
    mine = emulator.train(plan.devices_of(ranks.rank), plan, update)
    parts.end("train")

    # aggregation: active block + output module, once
    reports, train_s = gather_reports(ranks, plan, mine, parts.wall_s["train"])
    parts.end("wait")  # for the rank with most to do
    summed = update.tensors(over=any(report.large_statistics for report in reports))
    for tensor in summed:
        ranks.all_reduce(tensor)
    weight_sum = sum(emulator.method.weight(report.samples) for report in reports if report.failed is None)
    change = emulator.apply(update, weight_sum)
    parts.end("sum")

    # pace controller: block perturbation over what the stage freezes, then the verdict
    verdict = Verdict(**ranks.decide(lambda: judge(coordinator, window, emulator, plan, reports, change)))
    parts.end("judge")
    accuracy = evaluate(ranks, emulator) if verdict.evaluate else None
    sampled = evaluate(ranks, emulator, sampled=True) if verdict.evaluate_sampled else None
    parts.end("evaluate")
    reduced = sum(len(tensor) for tensor in summed)
    return RoundResult(plan, reports, verdict, accuracy, sampled, reduced, train_s, parts)


def plan_of(coordinator: Coordinator | None, *, begin: bool) -> dict[str, Any]:
    """Return the next plan as plain values; runs on rank 0 alone."""
    assert coordinator is not None
    if begin:
        coordinator.begin_round()
    return coordinator.plan_round().to_json()


def ask_devices(ranks: Ranks, coordinator: Coordinator | None, emulator: Emulator) -> None:
    """Collective: every rank must call this. Ask devices for what the selector wants to know before it chooses."""

    def begin() -> dict[str, Any] | None:
        assert coordinator is not None
        coordinator.begin_round()
        plan = coordinator.ask()
        return None if plan is None else plan.to_json()

    found = ranks.decide(begin)
    if found is None:
        return
    plan = ProbePlan.from_json(found)
    # each rank fills the rows of its own devices; the others are zero, so the sum is exact
    table = emulator.ask(plan, ranks.rank)
    ranks.all_reduce(table.view(-1))  # long sums of one dimension go by a ring
    ranks.decide(lambda: tell(coordinator, plan, table))


def tell(coordinator: Coordinator | None, plan: ProbePlan, table: torch.Tensor) -> None:
    """Tell the coordinator what the devices answered; runs on rank 0 alone."""
    assert coordinator is not None
    answered = table[:, 0] > 0
    rows = table[answered].numpy()
    devices = np.array(plan.devices, dtype=np.int64)[answered.numpy()]
    loss, squared_loss = rows[:, 1].astype(np.float64), rows[:, 2].astype(np.float64)
    coordinator.learn(Probes(devices, loss, squared_loss, rows[:, 3:]))


def judge(
    coordinator: Coordinator | None,
    window: PerturbationWindow,
    emulator: Emulator,
    plan: RoundPlan,
    reports: tuple[DeviceReport, ...],
    change: torch.Tensor,
) -> dict[str, Any]:
    """Measure block perturbation and return the verdict as plain values; runs on rank 0 alone."""
    assert coordinator is not None
    perturbation = None
    if not coordinator.is_sparse(reports):
        watched = emulator.stage.flat.without_gaps(change[: emulator.stage.watched_parameters])
        perturbation = window.push(plan.round, watched.cpu().numpy().copy())
    return coordinator.judge(reports, perturbation).to_json()


def gather_reports(
    ranks: Ranks, plan: RoundPlan, mine: list[DeviceReport], train_s: float
) -> tuple[tuple[DeviceReport, ...], tuple[float, ...]]:
    """Collective: every rank must call this. Return the reports of all devices, in the order of their numbers.

    And the wall seconds that each rank's devices took.
    """
    told = ranks.all_gather([train_s, [report.to_json() for report in mine]])
    reports = [DeviceReport(**row) for _, rows in told for row in rows]
    reports += [DeviceReport(d.device, d.samples, failed=d.reason, left_out=True) for d in plan.left_out]
    return tuple(sorted(reports, key=lambda report: report.device)), tuple(seconds for seconds, _ in told)


def evaluate(ranks: Ranks, emulator: Emulator, *, sampled: bool = False) -> float:
    """Collective: every rank must call this. Return the global network's accuracy on the test data, in [0, 1].

    `sampled`: on `eval.samples` of them.
    """
    mine, samples = emulator.count_correct(ranks.rank, ranks.world_size, sampled=sampled)
    correct = torch.tensor([mine])
    ranks.all_reduce(correct)
    return int(correct) / samples
