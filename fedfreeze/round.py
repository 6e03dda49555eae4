"""One federated round: the heart of fedfreeze, on one screen."""

from dataclasses import dataclass
from typing import Any

import torch

from fedfreeze.comm import Ranks
from fedfreeze.coordinator import Coordinator
from fedfreeze.pace import PerturbationWindow
from fedfreeze.reports import DeviceReport, RoundPlan, Verdict
from fedfreeze.train import Emulator


@dataclass(frozen=True)
class RoundResult:
    """What a round came to; the same on every rank."""

    plan: RoundPlan
    reports: tuple[DeviceReport, ...]
    verdict: Verdict
    accuracy: float | None
    elements_reduced: int
    """Elements that the all-reduce carried: active block + output module, the table not counted."""


def run_round(
    ranks: Ranks, coordinator: Coordinator | None, window: PerturbationWindow, emulator: Emulator
) -> RoundResult:
    """Collective: every rank must call this. One federated round of the current stage; rank 0 has the coordinator."""
    # participant selector: rank 0 decides, everyone knows
    plan = RoundPlan.from_json(ranks.decide(lambda: plan_of(coordinator)))
    # local training: each device in turn under its own memory cap; one that fails adds nothing
    update = emulator.empty_update(plan)
    mine = [emulator.train(assignment, plan, update) for assignment in plan.devices_of(ranks.rank)]

    # aggregation: active block + output module, once
    for tensor in update.tensors():
        ranks.all_reduce(tensor)
    reports = gather_reports(ranks, mine)
    weight_sum = sum(emulator.method.weight(report.samples) for report in reports if report.failed is None)
    change = emulator.apply(update, weight_sum)

    # pace controller: block perturbation over the active block, then the verdict
    verdict = Verdict(**ranks.decide(lambda: judge(coordinator, window, emulator, plan, reports, change)))
    accuracy = evaluate(ranks, emulator) if verdict.evaluate else None
    return RoundResult(plan, reports, verdict, accuracy, sum(len(tensor) for tensor in update.tensors()))


def plan_of(coordinator: Coordinator | None) -> dict[str, Any]:
    """Return the next plan as plain values; runs on rank 0 alone."""
    assert coordinator is not None
    return coordinator.plan_round().to_json()


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
    if any(report.failed is None for report in reports):  # a round in which all failed says nothing of convergence
        active = change[: emulator.stage.flat.active_parameters]
        perturbation = window.push(plan.round, active.cpu().numpy().copy())
    return coordinator.judge(reports, perturbation).to_json()


def gather_reports(ranks: Ranks, mine: list[DeviceReport]) -> tuple[DeviceReport, ...]:
    """Collective: every rank must call this. Return the reports of all devices, in the order of their numbers."""
    rows = ranks.all_gather([report.to_json() for report in mine])
    reports = [DeviceReport(**row) for of_rank in rows for row in of_rank]
    return tuple(sorted(reports, key=lambda report: report.device))


def evaluate(ranks: Ranks, emulator: Emulator) -> float:
    """Collective: every rank must call this. Return the global network's accuracy on the test data, in [0, 1]."""
    correct = torch.tensor([emulator.count_correct(ranks.rank, ranks.world_size)])
    ranks.all_reduce(correct)
    return int(correct) / len(emulator.data.test)
