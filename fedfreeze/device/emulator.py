"""A rank's emulator: trains the devices assigned to it, one after the other, each under its own cap."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.data.batches import drawn_batches, plain_batches, training_batches
from fedfreeze.data.store import Data
from fedfreeze.device.asking import Asker, samples_stay_apart
from fedfreeze.device.cap import DeviceMemory, DeviceOutOfMemoryError, make_cap
from fedfreeze.device.evaluation import count_correct, evaluated_rows
from fedfreeze.device.features import FeatureBatch, FrozenFeatures, draws_of, why_not_kept
from fedfreeze.device.probe import Probe
from fedfreeze.errors import ConfigError
from fedfreeze.messages import Assignment, DeviceReport, ProbePlan, RoundPlan
from fedfreeze.methods import Method
from fedfreeze.methods.aggregate import STATISTICS_LIMIT, UPDATE_LIMIT, UpdateSum, first_unusable
from fedfreeze.network.stage import LocalTrainer, Stage, cannot_learn, has_batch_norm, sees_one_value
from fedfreeze.plugins import own_code
from fedfreeze.seeds import global_seed, numpy_generator
from fedfreeze.select import selector_class


class Emulator:
    """Holds a stage on this rank; nothing is rebuilt between the devices of a stage."""

    def __init__(
        self,
        config: Config,
        data: Data,
        parts: Sequence[np.ndarray],
        method: Method,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called between steps and raises what must end the round: a lost rank, an end that is near."""
        self.check = check
        self.config = config
        self.data = data
        self.parts = parts
        self.method = method
        self.device = device
        self.cap = make_cap(device)
        self.in_stage = False
        self.peaks_asked: dict[Hashable, int] = {}
        """Bytes that a device's answer needs, of the kinds counted before."""
        self.asks = selector_class(config).probing
        """Whether the participant selector may ask devices before a round; every rank must know."""
        self.stage: Stage
        """The stage with the global values; where it has sub-models, they are what trains."""
        self.level: int | None = None
        self.part: Stage
        """What the devices of the current level train: a sub-model, or the stage itself."""
        self.trainer: LocalTrainer
        self.features: FrozenFeatures | None = None
        """What the stage's frozen prefix puts out, where it is kept."""
        self.values: torch.Tensor
        """The global values of the stage's flat buffer, the same bits on every rank.

        They and the sum stay on the host, so that a GPU holds nothing but the device that is emulated: what its
        allocator reserves is then what the cap is about.
        """

    def enter_stage(self, index: int) -> None:
        """Build the stage's network; the values it starts from are those in the method's modules."""
        if not self.method.counted:
            self.cap.begin_stage()
            self.stage = self.method.enter_stage(index, self.device)
            self._train_with(0, self.stage)
        else:
            # what the server needs for evaluation is not the devices': it lies under every cap
            self.stage = self.method.enter_stage(index, self.device)
            self.cap.begin_stage()
        self.values = self.stage.flat.values().to("cpu", copy=True)
        self.in_stage = True
        self.has_batch_norm = has_batch_norm(self.stage)
        self.features = self._features()

    @property
    def stores(self) -> bool:
        """Whether devices store what their frozen blocks put out."""
        return self.config.train.prefix == "stored"

    def _features(self) -> FrozenFeatures | None:
        if self.method.counted or not len(self.stage.frozen) or not (self.stores or self.config.cache.features):
            return None
        if why_not_kept(self.stage, self.config, self.data.image_shape, self.device) is not None:
            return None  # devices that store them were asked for this at the start (check_storable)
        return FrozenFeatures(self.stage, self.data, self.parts, self.config, self.device)

    def enter_level(self, level: int) -> None:
        """Build a sub-model of the stage, in place of the one before."""
        if level != self.level:
            self._drop_part()
            self._train_with(level, self.method.enter_level(self.stage.index, level, self.device))
            self.part_start = self.part.flat.values().to("cpu", copy=True)

    def _train_with(self, level: int, part: Stage) -> None:
        self.level, self.part = level, part
        self.trainer = LocalTrainer(part, self.config.train)

    def _drop_part(self) -> None:
        if self.level is not None:
            self.level = None
            del self.part, self.trainer

    def leave_stage(self) -> None:
        """Freeze what the stage trained."""
        self.settle()
        self._drop_part()
        self.method.leave_stage(self.stage)
        self.in_stage = False
        self.features = None
        del self.stage, self.values

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
        reason = cannot_learn(len(rows), self.has_batch_norm)
        if reason is not None:
            return DeviceReport(assignment.device, len(rows), failed=reason)
        start, index = self._start_of(assignment.level, plan.round, rows)
        try:
            report = self._train_locally(assignment, plan, rows, start)
        except DeviceOutOfMemoryError as error:
            self.trainer.drop_gradients()
            return DeviceReport(
                assignment.device, len(rows), failed=str(error), out_of_memory=True, peak_bytes=error.needed_bytes
            )
        except ValueError as error:
            if not sees_one_value(error):
                raise
            return DeviceReport(assignment.device, len(rows), failed="a batch too small for batch normalisation")
        if report.failed is None:
            change = self.part.flat.values().cpu() - start
            if index is not None:
                change[index < 0] = 0.0  # what is the device's alone is neither sent nor judged
            # a method of the user's own may sum without room for large statistics
            has_room = update.statistics_from < len(update.total)
            statistics_from = self.part.flat.parameters if has_room else len(change)
            beyond = first_unusable(change, statistics_from)
            if beyond is not None:
                return DeviceReport(assignment.device, len(rows), failed=self._diverged(change, beyond))
            if index is not None:
                change, index = change[index >= 0], index[index >= 0]
            large = update.add(change, self.method.weight(len(rows)), index)
            report = replace(report, large_statistics=large)
        return report

    def _diverged(self, change: torch.Tensor, position: int) -> str:
        """Say which tensor of the part has an element that cannot be summed."""
        slot = next(slot for slot in self.part.flat.slots if position < slot.end)
        limit = UPDATE_LIMIT if slot.is_parameter else STATISTICS_LIMIT
        return f"diverged: {slot.path} is not a number, or changed by more than {limit:g} ({float(change[position]):g})"

    def _start_of(self, level: int, round_number: int, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the values that a device starts from, and where they belong in the stage; None: they are all of it."""
        labels = torch.from_numpy(np.unique(self.data.train.labels[rows]))
        if not self.method.counted:
            self.part.begin_device(labels)
            return self.values, None
        self.enter_level(level)
        self.part.begin_device(labels)
        index = self.method.part_index(self.stage, self.part, round_number, labels)
        return torch.where(index >= 0, self.values[index.clamp(min=0)], self.part_start), index

    def ask(self, plan: ProbePlan, rank: int) -> torch.Tensor:
        """Ask this rank's devices; return a row for each device of the plan, zero for those of other ranks.

        See Asker.ask. Where the stage has sub-models all answer with the smallest, which all of them hold.
        """
        if self.method.counted:
            self.enter_level(0)
        probe = Probe(self.part, self.cap, self.data.num_classes, plan.signature_size, self.config.seed)

        def begin(rows: np.ndarray) -> None:
            self.part.flat.load(self._start_of(0, plan.round, rows)[0])

        asker = Asker(
            probe,
            self.cap,
            self.data,
            self.parts,
            self.device,
            batch_size=self.config.train.batch_size,
            kind=("asked", plan.stage, self.level, plan.signature_size),
            peaks=self.peaks_asked,
            begin=begin,
            check=self.check,
        )
        return asker.ask(plan, rank, together=self._asks_together())

    def _asks_together(self) -> bool:
        """Whether devices are alike but for their samples, and their caps a matter of counting."""
        alike = not self.method.counted and type(self.part).begin_device is Stage.begin_device
        if not alike or not self.cap.counts_enforce:
            return False
        self.part.flat.load(self.values)
        return samples_stay_apart(self.part, self.data, self.device)

    def _train_locally(
        self, assignment: Assignment, plan: RoundPlan, rows: np.ndarray, start: torch.Tensor
    ) -> DeviceReport:
        config, key = self.config, (plan.round, assignment.device)
        steps = samples = 0
        # dropout and the like draw from torch's global generator
        with self.cap.device(assignment.cap_bytes) as memory, global_seed(config.seed, "local training", *key):
            self.trainer.begin(start, plan.learning_rate)
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            for count, take in self._steps(memory, plan, assignment):
                self.check()
                sums += take()
                steps += 1
                samples += count
        loss = sums[0].item() / max(1, steps)
        if not np.isfinite(loss):
            return DeviceReport(assignment.device, len(rows), failed=f"diverged: the training loss is {loss}")
        return DeviceReport(
            assignment.device,
            len(rows),
            loss=loss,
            squared_loss=sums[1].item() / max(1, samples),
            steps=steps,
            peak_bytes=memory.peak_bytes,
            tensor_peak_bytes=memory.tensor_peak_bytes,
        )

    def _steps(
        self, memory: DeviceMemory, plan: RoundPlan, assignment: Assignment
    ) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
        """Yield for each of a device's batches how many samples it has, and what trains on it."""
        device, rows, train = assignment.device, self.parts[assignment.device], self.config.train
        if self.features is not None:
            if assignment.stores:
                self._store(memory, plan.stage, self.features.first_images(device))
            for batch in self.features.batches(device, plan.round):
                yield len(batch.labels), partial(self._step_behind, memory, plan.stage, batch)
            return
        drawn = drawn_batches(
            self.config.data,
            len(rows),
            self.data.image_shape[1],
            batch_size=train.batch_size,
            epochs=train.local_epochs,
            draws=draws_of(self.config, plan.stage, plan.round, device),
        )
        for images, labels in training_batches(self.data, rows, drawn, self.device):
            yield len(images), partial(self._step, memory, plan.stage, images, labels)

    def _step(self, memory: DeviceMemory, stage: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.cap.step(
            memory,
            (stage, self.level, len(images)),
            lambda: [*self.trainer.held_tensors(), images, labels],
            lambda: self.trainer.step(images, labels),
        )

    def _store(self, memory: DeviceMemory, stage: int, images: torch.Tensor) -> None:
        """Run the frozen blocks on a batch as a device does that stores what they put out, for its memory alone."""
        self.cap.step(
            memory,
            (stage, "stores", len(images)),
            lambda: [*self.stage.frozen_tensors(), images],
            lambda: self.stage.frozen_forward(images),
            lambda: images,  # its memory is known
        )

    def _step_behind(self, memory: DeviceMemory, stage: int, batch: FeatureBatch) -> torch.Tensor:
        """Take a step on kept features; where the device's memory is counted, the device's own way to come by them."""
        kind = (stage, self.level, len(batch.labels))
        if self.stores:
            return self.cap.step(
                memory,
                kind,
                lambda: [*self.trainer.held_behind(), batch.labels],
                lambda: self.trainer.step_behind(batch.read_features, batch.labels),
                lambda: self.trainer.step_behind(batch.features, batch.labels),
            )
        return self.cap.step(
            memory,
            kind,
            lambda: [*self.trainer.held_tensors(), batch.make_images(), batch.labels],
            lambda: self.trainer.step_behind(batch.counted_features, batch.labels),
            lambda: self.trainer.step_behind(batch.features, batch.labels),
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

    def _take_statistics(self) -> None:
        """Put the global values into the network, and what the method's statistics add to them."""
        self.settle()
        wanted = min(self.method.statistics_samples, len(self.data.train))
        if wanted:
            rows = numpy_generator(self.config.seed, "statistics").choice(len(self.data.train), wanted, replace=False)
            batches = plain_batches(self.data, np.sort(rows), self.config.eval.batch_size, self.device)
            self.method.take_statistics(self.stage, (images for images, _ in batches))
            self.values = self.stage.flat.values().to("cpu", copy=True)

    def count_correct(self, rank: int, world_size: int, *, sampled: bool = False) -> tuple[int, int]:
        """Return how many test samples of this rank's batches the global network gets right, and of how many in all.

        `sampled`: of the `eval.samples` alone.
        """
        self._take_statistics()
        rows = evaluated_rows(self.config, len(self.data.test), sampled=sampled)
        correct = count_correct(
            self.stage,
            self.data,
            rows,
            self.config.eval.batch_size,
            rank=rank,
            world_size=world_size,
            features=self.features,
            check=self.check,
        )
        return correct, len(rows)
