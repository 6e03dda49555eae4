"""The small messages of a round: rank 0's plan, the devices' reports, rank 0's verdict. They travel as JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """One selected device: which rank emulates it, and under which cap."""

    device: int
    rank: int
    cap_bytes: int | None


@dataclass(frozen=True)
class RoundPlan:
    """What rank 0 decided before a round; with the seed, all that a rank needs to know."""

    round: int
    stage: int
    stage_round: int
    assignments: tuple[Assignment, ...]
    learning_rate: float
    fraction_bits: int

    def devices_of(self, rank: int) -> list[Assignment]:
        """Return the devices that a rank emulates, in the order of their numbers."""
        return [assignment for assignment in self.assignments if assignment.rank == rank]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RoundPlan":
        """Rebuild a plan."""
        assignments = tuple(Assignment(**assignment) for assignment in values["assignments"])
        return cls(**{**values, "assignments": assignments})


@dataclass(frozen=True)
class DeviceReport:
    """What became of one device in a round."""

    device: int
    samples: int
    failed: str | None = None
    """Why it was left out of the sum; None: it completed."""
    out_of_memory: bool = False
    loss: float | None = None
    """Mean training loss over its steps."""
    steps: int = 0
    peak_bytes: int = 0
    """Largest use of what its cap governs."""
    tensor_peak_bytes: int = 0
    """Largest sum of live tensor bytes."""

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
    checkpoint: bool
    perturbation: float | None = None
    slope: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
