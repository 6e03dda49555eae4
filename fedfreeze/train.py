"""A rank's emulator: trains the devices assigned to it, one after the other, each under its own cap."""

from collections.abc import Sequence

import numpy as np
import torch

from fedfreeze.aggregate import UPDATE_LIMIT, UpdateSum, usable
from fedfreeze.cap import DeviceMemory, DeviceOutOfMemoryError, make_cap
from fedfreeze.config import Config
from fedfreeze.data.batches import evaluation_batch, training_batches
from fedfreeze.data.store import Data
from fedfreeze.errors import ConfigError
from fedfreeze.methods import Method
from fedfreeze.plugins import own_code
from fedfreeze.reports import Assignment, DeviceReport, RoundPlan
from fedfreeze.seeds import global_seed, torch_generator
from fedfreeze.stage import LocalTrainer, Stage, sees_one_value


class Emulator:
    """Holds a stage on this rank; nothing is rebuilt between the devices of a stage."""

    def __init__(self, config: Config, data: Data, parts: Sequence[np.ndarray], method: Method, device: torch.device):
        self.config = config
        self.data = data
        self.parts = parts
        self.method = method
        self.device = device
        self.cap = make_cap(device)
        self.in_stage = False
        self.stage: Stage
        self.trainer: LocalTrainer
        self.values: torch.Tensor
        """The global values of the stage's flat buffer, the same bits on every rank.

        They and the sum stay on the host, so that a GPU holds nothing but the device that is emulated: what its
        allocator reserves is then what the cap is about.
        """

    def enter_stage(self, index: int) -> None:
        """Build the stage's network; the values it starts from are those in the method's modules."""
        self.cap.begin_stage()
        self.stage = self.method.enter_stage(index, self.device)
        self.trainer = LocalTrainer(self.stage, self.config.train)
        self.values = self.stage.flat.buffer.to("cpu", copy=True)
        self.in_stage = True
        self.has_batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.stage.modules())

    def leave_stage(self) -> None:
        """Freeze what the stage trained."""
        self.settle()
        self.method.leave_stage(self.stage)
        self.in_stage = False
        del self.stage, self.trainer, self.values

    def settle(self) -> None:
        """Write the global values into the network, over what the last device left there."""
        if self.in_stage:
            self.stage.flat.load(self.values)

    def empty_update(self, plan: RoundPlan) -> UpdateSum:
        """Return the sum to which this rank's devices add."""
        return self.method.empty_sum(self.stage, plan.fraction_bits)

    def train(self, assignment: Assignment, plan: RoundPlan, update: UpdateSum) -> DeviceReport:
        """Train one device on its own data under its cap and add its update; a device that fails adds nothing."""
        rows = self.parts[assignment.device]
        reason = self._cannot_learn(len(rows))
        if reason is not None:
            return DeviceReport(assignment.device, len(rows), failed=reason)
        try:
            report = self._train_locally(assignment, plan, rows)
        except DeviceOutOfMemoryError as error:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return DeviceReport(
                assignment.device, len(rows), failed=str(error), out_of_memory=True, peak_bytes=error.needed_bytes
            )
        except ValueError as error:
            if not sees_one_value(error):
                raise
            return DeviceReport(assignment.device, len(rows), failed="a batch too small for batch normalisation")
        if report.failed is None:
            change = self.stage.flat.buffer.cpu() - self.values
            if not usable(change):
                return DeviceReport(
                    assignment.device,
                    len(rows),
                    failed=f"diverged: a weight is not a number, or changed by more than {UPDATE_LIMIT:g}",
                )
            index = self.method.part_index(self.stage, assignment.cap_bytes)
            update.add(change if index is None else change[index], self.method.weight(len(rows)), index)
        return report

    def _cannot_learn(self, samples: int) -> str | None:
        if samples == 0:
            return "no samples"
        if samples == 1 and self.has_batch_norm:
            return "one sample, too few for batch normalisation"
        return None

    def _train_locally(self, assignment: Assignment, plan: RoundPlan, rows: np.ndarray) -> DeviceReport:
        config, key = self.config, (plan.round, assignment.device)
        steps = 0
        # dropout and the like draw from torch's global generator
        with self.cap.device(assignment.cap_bytes) as memory, global_seed(config.seed, "local training", *key):
            self.trainer.begin(self.values, plan.learning_rate)
            loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
            batches = training_batches(
                self.data,
                rows,
                batch_size=config.train.batch_size,
                epochs=config.train.local_epochs,
                augment=config.data.augment,
                shuffle=torch_generator(config.seed, "shuffle", *key),
                augmentation=torch_generator(config.seed, "augment", *key),
                device=self.device,
            )
            for images, labels in batches:
                loss_sum += self._step(memory, plan.stage, images, labels)
                steps += 1
        loss = loss_sum.item() / max(1, steps)
        if not np.isfinite(loss):
            return DeviceReport(assignment.device, len(rows), failed=f"diverged: the training loss is {loss}")
        return DeviceReport(
            assignment.device,
            len(rows),
            loss=loss,
            steps=steps,
            peak_bytes=memory.peak_bytes,
            tensor_peak_bytes=memory.tensor_peak_bytes,
        )

    def _step(self, memory: DeviceMemory, stage: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.cap.step(
            memory,
            (stage, len(images)),
            lambda: [*self.trainer.held_tensors(), images, labels],
            lambda: self.trainer.step(images, labels),
        )

    def apply(self, update: UpdateSum, weight_sum: int) -> torch.Tensor:
        """Merge the summed updates into the global values and return the change."""
        before = self.values
        name = self.config.method.name
        with own_code("method.name", name):  # the same on every rank, so all leave
            self.values = self.method.merge(before, update, weight_sum)
        if self.values.shape != before.shape or self.values.dtype != before.dtype:
            raise ConfigError(
                f"method.name: {name}.merge returned {self.values.dtype} of {tuple(self.values.shape)}, not "
                f"{before.dtype} of {tuple(before.shape)}"
            )
        return self.values - before

    def count_correct(self, rank: int, world_size: int) -> int:
        """Return how many test samples of this rank's batches the global network gets right.

        Batches are cut the same way for any number of ranks, so their numbers do not depend on it. This is the
        server's work: it runs outside the caps.
        """
        self.settle()
        self.stage.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        size = self.config.eval.batch_size
        with torch.inference_mode():
            for batch in range(rank, -(-len(self.data.test) // size), world_size):
                images, labels = evaluation_batch(self.data, self.data.test, batch * size, size, self.device)
                correct += (self.stage(images).argmax(1) == labels).sum()
        return int(correct)
