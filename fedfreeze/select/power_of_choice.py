"""Power-of-choice selection (Cho, Wang and Joshi, 2020): the highest losses among a random few."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedfreeze.config.schema import Config
from fedfreeze.messages import DeviceReport
from fedfreeze.seeds import numpy_generator
from fedfreeze.select.base import ProbeRequest, Probes, Selector
from fedfreeze.select.dealing import trainable, weighted_draw


class PowerOfChoice(Selector):
    """pow-d: draw d devices by data volume, ask for their losses at the global model, take those with the highest.

    Cho, Wang, Joshi, "Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection
    Strategies", arXiv 2010.01243 (2020). `stale_losses`: rpow-d, which asks nobody and takes the mean loss of a
    device's last training; unknown counts as infinite, so that new devices come first.

    Here [ours]: the d are drawn among those that hold the stage and are available, and are at least as many as the
    participants; a device that does not answer comes after those that did; one that failed counts as without loss for
    rpow-d, as it would be unknown, and come first, for ever; devices without data come last.
    """

    probing = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.choices = config.select.choices or 2 * config.train.participants
        self.stale = config.select.stale_losses
        self.asked: dict[int, float] = {}  # of this round
        self.last_loss: dict[int, float] = {}  # of a device's last training

    def wanted(self, candidates: Sequence[int], count: int) -> ProbeRequest | None:
        """Ask those drawn for their losses."""
        self.asked = {}
        return None if self.stale else ProbeRequest(self._drawn(self.situation.round, candidates, count))

    def learn(self, probes: Probes) -> None:
        """See Selector."""
        losses = zip(probes.devices.tolist(), probes.loss.tolist(), strict=True)
        self.asked = {device: loss for device, loss in losses if np.isfinite(loss)}

    def _drawn(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """Return the d devices of a round, in the order in which they were drawn; only those with data."""
        devices, _ = trainable(self.situation.samples, candidates)
        weights = self.situation.samples[np.asarray(devices, dtype=np.int64)].astype(np.float64)
        generator = numpy_generator(self.config.seed, "select", round_number)
        return [devices[i] for i in weighted_draw(generator, weights, max(self.choices, count))]

    def select(self, round_number: int, candidates: Sequence[int], count: int) -> list[int]:
        """See Selector."""
        losses, unknown = (self.last_loss, np.inf) if self.stale else (self.asked, -np.inf)
        # sorted keeps the order of the draw among equals
        drawn = self._drawn(round_number, candidates, count)
        ranked = sorted(drawn, key=lambda device: -losses.get(device, unknown))
        return sorted([*ranked, *trainable(self.situation.samples, candidates)[1]][:count])

    def observe(self, reports: Sequence[DeviceReport]) -> None:
        """Take the losses that training showed."""
        for report in reports:
            if report.failed is None and report.loss is not None:
                self.last_loss[report.device] = report.loss
            elif report.failed is not None and not report.left_out:
                self.last_loss[report.device] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """See Selector."""
        return {"last_loss": sorted(self.last_loss.items())} if self.stale else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Selector."""
        self.last_loss = dict(state.get("last_loss", []))
