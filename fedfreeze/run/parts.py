"""Where a round's seconds go: wall and processor seconds of its parts, on this rank."""

import time

PARTS = ("write", "ask", "plan", "train", "wait", "sum", "judge", "evaluate")
"""The parts of a round in their order; what each holds: docs/run_folder.md."""


class RoundParts:
    """Wall and processor seconds of parts that follow one another; the first begins when this is made. [ours]

    For people and benchmarks alone: nothing in a run depends on them.
    """

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}
        self.processor_s: dict[str, float] = {}
        """Of all threads of this process."""
        self._began = _now()

    def end(self, part: str) -> None:
        """Note that a part ends here and the next one begins."""
        began, self._began = self._began, _now()
        self.wall_s[part] = self._began[0] - began[0]
        self.processor_s[part] = self._began[1] - began[1]

    def before(self, earlier: "RoundParts") -> "RoundParts":
        """Return the parts of an earlier record and these."""
        joined = RoundParts()
        joined.wall_s = earlier.wall_s | self.wall_s
        joined.processor_s = earlier.processor_s | self.processor_s
        return joined


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()
