"""SmartFreeze's participant selector: communities of devices with alike data, and in each the loss and the speed."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.messages import DeviceReport
from fedfreeze.seeds import numpy_generator
from fedfreeze.select.base import ProbeRequest, Probes, Selector, Situation
from fedfreeze.select.communities import find_communities
from fedfreeze.select.dealing import deal_slots, speed_factor, trainable

Place = tuple[int, int]
"""Community and part of a device."""

UNKNOWN: Place = (-1, 0)
"""Where devices are that never told a signature: a community of their own."""


class SmartFreezeSelector(Selector):
    """Deals the participants to communities, and takes the devices of the highest utility in each.

    [paper]: devices are picked by memory capacity (which the coordinator has looked at before), statistical and system
    heterogeneity, with a community-detection step called RL-CD. [ours]: everything else, as its form is not public.

    Utility, after Oort (Lai et al., OSDI 2021): n_i x sqrt(mean squared loss) x (T / t_i)^alpha where T < t_i, with T a
    percentile of the candidates' predicted seconds. Devices without data to train on, that failed in this stage, or
    that cannot meet the deadline are taken only where nobody else is left.
    """

    probing = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.select_config = config.select
        self.limit = config.select.community_limit or 2 * config.train.participants
        self.communities: list[list[list[int]]] = []  # community -> part -> devices
        self.place: dict[int, Place] = {}
        self.squared_loss: dict[int, float] = {}
        self.last_selected: dict[int, int] = {}  # device -> round
        self.failed: set[int] = set()  # in this stage, since they were last asked
        self.stage = 0
        self.asked: set[int] = set()  # devices, for this round
        self.refreshed_at: int | None = None  # round of the stage; None: not in this stage yet

    def prepare(self, situation: Situation) -> None:
        """See Selector."""
        super().prepare(situation)
        if situation.stage != self.stage:
            self.stage = situation.stage
            self.refreshed_at = None
            self.failed.clear()

    def wanted(self, candidates: Sequence[int], count: int) -> ProbeRequest | None:
        """Ask the candidates when a stage starts, and again every `refresh_rounds` rounds of it."""
        settings, now = self.select_config, self.situation.stage_round
        again = settings.refresh_rounds
        due = self.refreshed_at is None or (again is not None and now - self.refreshed_at >= again)
        if not settings.communities or not due:
            return None
        able = trainable(self.situation.samples, candidates)[0]
        self.asked = set(self._drawn(able))
        return ProbeRequest(sorted(self.asked), settings.signature_size)

    def _drawn(self, able: list[int]) -> list[int]:
        """Return which devices are asked: `signature_devices` of them, half of those without a community.

        Those that have one tell where the others of theirs go (`_adopt`), so without them in the draw most would be
        unknown again; those without make known more devices each time. Where one kind is short the other fills. [ours]
        """
        most = self.select_config.signature_devices
        if most is None or len(able) <= most:
            return able
        known = [device for device in able if device in self.place]
        new = [device for device in able if device not in self.place]
        of_known = min(len(known), max(most // 2, most - len(new)))
        generator = numpy_generator(self.config.seed, "signature devices", self.situation.round)
        drawn = [new[place] for place in generator.choice(len(new), most - of_known, replace=False)]
        by_community: dict[int, list[int]] = {}
        for place in generator.permutation(len(known)):
            by_community.setdefault(self.place[known[place]][0], []).append(known[place])
        # one of each community, the largest first, then in proportion to their sizes
        turns = [
            (number / len(members) if number else -len(members), top, device)
            for top, members in sorted(by_community.items())
            for number, device in enumerate(members)
        ]
        return sorted([*drawn, *(device for *_, device in sorted(turns)[:of_known])])

    def learn(self, probes: Probes) -> None:
        """Take losses, and find communities anew."""
        told = np.isfinite(probes.signatures).all(axis=1) & np.isfinite(probes.squared_loss)
        if not told.any():
            return  # nobody answered: the next round asks again
        devices = [int(device) for device in probes.devices[told]]
        self.squared_loss.update(zip(devices, map(float, probes.squared_loss[told]), strict=True))
        self.failed.difference_update(devices)
        found = find_communities(
            probes.signatures[told],
            neighbours=self.select_config.neighbours,
            limit=self.limit,
            seed=self.config.seed,
            key=self.situation.round,
        )
        self._adopt([[[devices[row] for row in part] for part in community] for community in found.parts])
        self.refreshed_at = self.situation.stage_round

    def _adopt(self, communities: list[list[list[int]]]) -> None:
        """Go over to new communities; a device that did not answer goes where most of its old community went.

        Its old signature is of another model, and would be much to store; the company it kept says the same. [ours]
        """
        new = _places(communities)
        for community in self.communities:
            members = [device for part in community for device in part]
            votes = Counter(new[device] for device in members if device in new)
            if not votes:
                # who was asked and did not answer is unknown until asked again; of whom nobody was, nothing is new
                if self.asked.isdisjoint(members):
                    communities.append(community)
                continue
            by_community: Counter[int] = Counter()
            for (top, _), number in votes.items():
                by_community[top] += number
            favoured = min(by_community, key=lambda top: (-by_community[top], top))
            _, part = min((-number, part) for (top, part), number in votes.items() if top == favoured)
            communities[favoured][part] = sorted(
                [*communities[favoured][part], *(device for device in members if device not in new)]
            )
        self.communities = communities
        self.place = _places(communities)

    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """See Selector."""
        able, last = self._able(candidates)
        utility = dict(zip(able, self._utilities(able).tolist(), strict=True))
        generator = numpy_generator(self.config.seed, "select", round_number)
        dealt = self._deal(able, min(count, len(able)), round_number)
        chosen: list[int] = []
        for (members, slots), exploring in zip(dealt, self._exploring(dealt, generator), strict=True):
            chosen += self._choose(members, slots, exploring, utility, generator)
        chosen += last[: max(0, count - len(chosen))]
        self.last_selected.update(dict.fromkeys(chosen, round_number))
        return sorted(chosen)

    def _able(self, candidates: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the candidates that may complete the round, ascending, and the others, the best of them first."""
        able, last = trainable(self.situation.samples, candidates)
        deadline = self.config.train.deadline_s if self.select_config.speed_utility else None
        late = {device for device in able if deadline is not None and self.situation.seconds[device] > deadline}
        hopeless = sorted(device for device in able if device in late or device in self.failed)
        return [device for device in able if device not in late and device not in self.failed], [*hopeless, *last]

    def _utilities(self, devices: Sequence[int]) -> np.ndarray:
        settings, index = self.select_config, np.asarray(devices, dtype=np.int64)
        utility = self.situation.samples[index].astype(np.float64)
        if settings.loss_utility:
            # nothing is known against a device that told no loss, so it counts as the worst served one [ours]
            highest = max(self.squared_loss.values(), default=1.0)
            utility *= np.sqrt([self.squared_loss.get(device, highest) for device in devices])
        if settings.speed_utility and len(devices):
            seconds = self.situation.seconds[index]
            preferred_s = float(np.percentile(seconds, settings.preferred_percentile))
            utility *= speed_factor(seconds, preferred_s, settings.speed_exponent)
        return utility

    def _deal(self, able: Sequence[int], slots: int, round_number: int) -> list[tuple[list[int], int]]:
        """Deal the slots to communities, and those of each to its parts; return candidates and slots of each part."""
        groups: dict[int, dict[Place, list[int]]] = {}
        for device in able:
            place = self._place(device)
            groups.setdefault(place[0], {}).setdefault(place, []).append(device)
        served: dict[int | Place, int] = {}  # community or part -> round in which one of its devices was selected
        for device, when in self.last_selected.items():
            place = self._place(device)
            for group in (place[0], place):
                served[group] = max(when, served.get(group, 0))

        def share(members: dict[Any, list[int]], number: int) -> list[int]:
            volumes = [self._volume(devices) for devices in members.values()]
            waits = [round_number - served.get(group, 0) for group in members]
            return deal_slots(number, volumes, waits, [len(d) for d in members.values()], turn=round_number)

        tops = {top: [device for part in groups[top].values() for device in part] for top in sorted(groups)}
        dealt: list[tuple[list[int], int]] = []
        for top, given in zip(tops, share(tops, slots), strict=True):
            parts = dict(sorted(groups[top].items()))
            dealt += zip(parts.values(), share(parts, given), strict=True)
        return [(part, number) for part, number in dealt if number]

    def _place(self, device: int) -> Place:
        return self.place.get(device, UNKNOWN)

    def _volume(self, devices: Sequence[int]) -> float:
        """Return what a group's slots are in proportion to."""
        by_volume = self.select_config.slots_by_volume
        return float(sum(self.situation.samples[device] for device in devices)) if by_volume else 1.0

    def _exploring(self, dealt: Sequence[tuple[list[int], int]], generator: np.random.Generator) -> list[int]:
        """Draw which of the dealt slots explore: `exploration` of them, a fraction left over by chance."""
        slots = [part for part, (_, number) in enumerate(dealt) for _ in range(number)]
        wanted = self.select_config.exploration * len(slots)
        number = math.floor(wanted) + int(generator.random() < wanted % 1)
        drawn = generator.permutation(len(slots))[:number]
        exploring = Counter(slots[i] for i in drawn)
        return [exploring[part] for part in range(len(dealt))]

    def _choose(
        self, members: list[int], slots: int, exploring: int, utility: dict[int, float], generator: np.random.Generator
    ) -> list[int]:
        """Return the members of a part that take its slots: some at random that never trained, the rest by utility."""
        ranked = sorted(members, key=lambda device: (-utility[device], device))
        untried = [device for device in members if device not in self.last_selected]
        best = ranked[: slots - min(exploring, len(untried))]
        taken = set(best)
        new = [device for device in untried if device not in taken]
        drawn = generator.permutation(len(new))[: slots - len(best)]
        chosen = [*best, *(new[i] for i in drawn)]
        taken = set(chosen)
        return [*chosen, *(device for device in ranked if device not in taken)][:slots]

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Take the losses that training showed."""
        for report in reports:
            if report.failed is None and report.squared_loss is not None:
                self.squared_loss[report.device] = report.squared_loss
            elif report.failed is not None and not report.left_out:
                self.failed.add(report.device)

    def state_dict(self) -> dict[str, Any]:
        """See Selector."""
        return {
            "communities": self.communities,
            "squared_loss": sorted(self.squared_loss.items()),
            "last_selected": sorted(self.last_selected.items()),
            "failed": sorted(self.failed),
            "stage": self.stage,
            "refreshed_at": self.refreshed_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Selector."""
        self.communities = [[list(part) for part in community] for community in state["communities"]]
        self.place = _places(self.communities)
        self.squared_loss = dict(state["squared_loss"])
        self.last_selected = dict(state["last_selected"])
        self.failed = set(state["failed"])
        self.stage = state["stage"]
        self.refreshed_at = state["refreshed_at"]


def _places(communities: Iterable[Iterable[Iterable[int]]]) -> dict[int, Place]:
    return {
        device: (top, part)
        for top, parts in enumerate(communities)
        for part, members in enumerate(parts)
        for device in members
    }
