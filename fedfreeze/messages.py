"""The small messages of a round: rank 0's plan, the devices' reports, rank 0's verdict. They travel as JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """One selected device: which rank emulates it, under which cap, and what it trains."""

    device: int
    rank: int
    cap_bytes: int | None
    level: int = 0
    """Which of the method's sub-models the device trains, the smallest first (Method.num_levels)."""
    way: str = "whole"
    """How it takes its steps (`train.fit`)."""
    stores: bool = False
    """Whether it runs its frozen blocks first and stores what they put out (`train.prefix: stored`)."""


@dataclass(frozen=True)
class LeftOut:
    """One selected device that does not finish in time: it is sent the model, and what it does is not used."""

    device: int
    samples: int
    cap_bytes: int | None
    reason: str


@dataclass(frozen=True)
class RoundPlan:
    """What rank 0 decided before a round; with the seed, all that a rank needs to know."""

    round: int
    stage: int
    stage_round: int
    assignments: tuple[Assignment, ...]
    learning_rate: float
    fraction_bits: int
    left_out: tuple[LeftOut, ...] = ()
    """Selected devices that the emulated clock leaves out; they are not trained, as nobody would see the result."""

    def devices_of(self, rank: int) -> list[Assignment]:
        """Return the devices that a rank emulates, those of one level together, else in the order of their numbers."""
        mine = [assignment for assignment in self.assignments if assignment.rank == rank]
        return sorted(mine, key=lambda assignment: (assignment.level, assignment.device))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RoundPlan":
        """Rebuild a plan."""
        assignments = tuple(Assignment(**assignment) for assignment in values["assignments"])
        left_out = tuple(LeftOut(**device) for device in values["left_out"])
        return cls(**{**values, "assignments": assignments, "left_out": left_out})


@dataclass(frozen=True)
class AskedGroup:
    """Devices that one rank asks, by one forward pass where it can; who they are does not depend on the ranks."""

    rank: int
    devices: tuple[int, ...]
    cap_bytes: tuple[int | None, ...]


@dataclass(frozen=True)
class ProbePlan:
    """Which devices are asked for their loss and signature before a round, and which rank emulates each."""

    round: int
    stage: int
    groups: tuple[AskedGroup, ...]
    """In the order of the devices' numbers, which ascend in each and from each to the next."""
    signature_size: int
    """Numbers of a signature at most; 0: losses alone."""

    @property
    def devices(self) -> list[int]:
        """The devices, ascending."""
        return [device for group in self.groups for device in group.devices]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        # not asdict, which takes a tenth of a second for 10,000 devices
        groups = [[group.rank, list(group.devices), list(group.cap_bytes)] for group in self.groups]
        return {"round": self.round, "stage": self.stage, "groups": groups, "signature_size": self.signature_size}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ProbePlan":
        """Rebuild a plan."""
        groups = tuple(AskedGroup(rank, tuple(devices), tuple(caps)) for rank, devices, caps in values["groups"])
        return cls(**{**values, "groups": groups})


@dataclass(frozen=True)
class DeviceReport:
    """What became of one device in a round."""

    device: int
    samples: int
    failed: str | None = None
    """Why it was left out of the sum; None: it completed."""
    out_of_memory: bool = False
    left_out: bool = False
    """It was too late: it failed by the emulated clock alone, and was not trained."""
    loss: float | None = None
    """Mean training loss over its steps."""
    squared_loss: float | None = None
    """Mean, over all the samples of all its steps, of the squared loss of a sample."""
    steps: int = 0
    peak_bytes: int = 0
    """Largest use of what its cap governs."""
    tensor_peak_bytes: int = 0
    """Largest sum of live tensor bytes."""
    large_statistics: bool = False
    """Its running statistics changed by more than the first of the two sums holds (aggregate.py)."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What rank 0 decided after a round."""

    end_stage: str | None
    """The reason why the stage ends (converged | fixed | round_limit), or None: it goes on."""
    stop: bool
    """No further round: training ended, or the round limit is reached."""
    evaluate: bool
    """On all the test data."""
    evaluate_sampled: bool
    """On `eval.samples` of them."""
    checkpoint: bool
    perturbation: float | None = None
    slope: float | None = None
    sparse: bool = False
    """Too few devices completed for the round to say anything of convergence."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
