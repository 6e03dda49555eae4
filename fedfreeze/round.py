"""One federated round: the heart of fedfreeze, on one screen."""

from dataclasses import dataclass

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
    plan = RoundPlan.from_json(
        ranks.share(ranks.together(lambda: coordinator.plan_round().to_json() if coordinator else None))
    )
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
    judged = None
    if coordinator is not None:
        active = change[: emulator.stage.flat.active_parameters]
        moved = weight_sum > 0  # a round in which every device failed says nothing about convergence
        perturbation = window.push(plan.round, active.cpu().numpy()) if moved else None
        judged = coordinator.judge(reports, perturbation).to_json()
    verdict = Verdict(**ranks.share(judged))
    accuracy = evaluate(ranks, emulator) if verdict.evaluate else None
    return RoundResult(plan, reports, verdict, accuracy, sum(len(tensor) for tensor in update.tensors()))


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
