"""A rank's emulator: trains the devices assigned to it, one after the other, each under its own cap."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.config.ways import way_of
from fedfreeze.data.batches import drawn_in_round, plain_batches, training_batches
from fedfreeze.data.store import Data
from fedfreeze.device.asking import Asker, samples_stay_apart
from fedfreeze.device.cap import DeviceMemory, DeviceOutOfMemoryError, make_cap
from fedfreeze.device.cost import chunked_as_on_gpu
from fedfreeze.device.evaluation import count_correct, evaluated_rows
from fedfreeze.device.features import FeatureBatch, FrozenFeatures, why_not_kept
from fedfreeze.device.late import LateReport, Outcome, sum_late, told_later
from fedfreeze.device.on_gpu import Held, held_for, warm_up
from fedfreeze.device.probe import Probe
from fedfreeze.errors import ConfigError
from fedfreeze.messages import Assignment, DeviceReport, ProbePlan, RoundPlan
from fedfreeze.methods import Method
from fedfreeze.methods.aggregate import STATISTICS_LIMIT, UPDATE_LIMIT, UpdateSum, first_unusable
from fedfreeze.network.flat import Slot
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
        self.cap = make_cap(device, config.fleet.accounting)
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
        self.no_features: str | None = None
        """Why that of a stage was not kept, though it was asked for; None: it was."""
        self.values: torch.Tensor
        """The global values of the stage's flat buffer, the same bits on every rank; on the compute device."""
        self.held: Held | None = None
        """On a GPU, what is the emulator's own there, on top of each cap: these values, the sum, a device's samples."""

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
        with self.cap.on_top():
            if self.device.type != "cpu":
                self._prepare_gpu()
            self.values = self._mine("values", self.stage.flat.values().clone())
        self.in_stage = True
        self.has_batch_norm = has_batch_norm(self.stage)
        self.features = self._features()

    @property
    def stores(self) -> bool:
        """Whether devices store what their frozen blocks put out."""
        return self.config.train.prefix == "stored"

    def _features(self) -> FrozenFeatures | None:
        self.no_features = None
        if self.method.counted or not len(self.stage.frozen) or not (self.stores or self.config.cache.features):
            return None
        reason = why_not_kept(self.stage, self.config, self.data.image_shape, self.device)
        if reason is not None:
            if self.stores:  # at the start they could be stored (check_storable); the same on every rank, so all leave
                raise ConfigError(
                    f"train.prefix: devices cannot store the features of stage {self.stage.index + 1} any more: "
                    f"{reason}; use train.prefix=recomputed"
                )
            self.no_features = reason
            return None
        return FrozenFeatures(self.stage, self.data, self.parts, self.config, self.device)

    def _prepare_gpu(self) -> None:
        """Set aside what the emulator needs on the GPU, and warm its libraries; the stage's values stay as they are."""
        flat, facts = self.stage.flat, (self.config, self.data, self.parts, self.device)
        self.held = held_for(self.stage, *facts, counted=self.method.counted)
        values = self.held.put("values", flat.values())
        warm_up(self.stage, *facts, self.held.samples)
        flat.load(values)

    def _mine(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the emulator's: as it is on a CPU; on a GPU in its own memory, in place of the last."""
        return tensor if self.held is None else self.held.put(name, tensor)

    def enter_level(self, level: int) -> None:
        """Build a sub-model of the stage, in place of the one before."""
        if level != self.level:
            self._drop_part()
            self._train_with(level, self.method.enter_level(self.stage.index, level, self.device))
            self.part_start = self._mine("part_start", self.part.flat.values().clone())

    def _train_with(self, level: int, part: Stage) -> None:
        self.level, self.part = level, part
        by_segments = self.config.fleet.accounting == "cuda_segments"
        self.trainer = part.trainer(chunked_as_on_gpu(self.config.train) if by_segments else self.config.train)
        self.cap.holds(self.trainer)

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
        self.features = self.held = None
        del self.stage, self.values

    def settle(self) -> None:
        """Write the global values into the network, over what the last device left there."""
        if self.in_stage:
            self.stage.flat.load(self.values)

    def empty_update(self, plan: RoundPlan) -> UpdateSum:
        """Return the sum to which this rank's devices add."""
        update = self.method.empty_sum(self.stage, plan.fraction_bits)
        if self.held is not None:
            update.move(self.held.room)
        return update

    def train(self, assignments: Sequence[Assignment], plan: RoundPlan, update: UpdateSum) -> list[DeviceReport]:
        """Train devices, each on its own data under its cap, and add their updates; one that fails adds nothing."""
        begun = [self._train(assignment, plan, update) for assignment in assignments]
        return [each.report(self.check) if isinstance(each, LateReport) else each for each in begun]

    def _train(self, assignment: Assignment, plan: RoundPlan, update: UpdateSum) -> DeviceReport | LateReport:
        """Train one device and add its update; on a GPU its report can be had when the next ones' work is queued."""
        rows = self.parts[assignment.device]
        reason = cannot_learn(len(rows), self.has_batch_norm)
        if reason is not None:
            return DeviceReport(assignment.device, len(rows), failed=reason)
        start, index = self._start_of(assignment.level, plan.round, rows)
        try:
            losses, make = self._train_locally(assignment, plan, rows, start)
        except DeviceOutOfMemoryError as error:
            self.trainer.drop_gradients()
            return DeviceReport(
                assignment.device, len(rows), failed=str(error), out_of_memory=True, peak_bytes=error.needed_bytes
            )
        except ValueError as error:
            if not sees_one_value(error):
                raise
            return DeviceReport(assignment.device, len(rows), failed="a batch too small for batch normalisation")
        # a method of the user's own may sum without room for large statistics
        has_room = update.statistics_from < len(update.total)
        statistics_from = self.part.flat.parameters if has_room else len(self.part.flat)
        weight = self.method.weight(len(rows))
        if self.held is not None:
            change = self.part.flat.values().to(start.device) - start
            return told_later(sum_late(update, change, losses, weight, index, statistics_from), make)
        loss_sum, squared_loss_sum = losses.tolist()
        outcome = Outcome(loss_sum, squared_loss_sum, 1.0, 0.0, 0.0, 0.0)
        if not np.isfinite(outcome.loss_sum):
            return make(outcome)
        change = self.part.flat.values() - start
        if index is not None:
            change[index < 0] = 0.0  # what is the device's alone is neither sent nor judged
        beyond = first_unusable(change, statistics_from)
        if beyond is not None:
            return make(outcome._replace(usable=0.0, position=beyond, value=float(change[beyond])))
        if index is not None:
            change, index = change[index >= 0], index[index >= 0]
        return make(outcome._replace(large=update.add(change, weight, index)))

    def _reported(self, report: DeviceReport, slots: Sequence[Slot], samples: int, outcome: Outcome) -> DeviceReport:
        """Return a device's report with its losses, or with why its update was not added."""
        loss = outcome.loss_sum / max(1, report.steps)
        reason = f"diverged: the training loss is {loss}"
        if np.isfinite(loss):
            if outcome.usable:
                squared = outcome.squared_loss_sum / max(1, samples)
                return replace(report, loss=loss, squared_loss=squared, large_statistics=bool(outcome.large))
            slot = next(slot for slot in slots if outcome.position < slot.end)
            limit = UPDATE_LIMIT if slot.is_parameter else STATISTICS_LIMIT
            reason = f"diverged: {slot.path} is not a number, or changed by more than {limit:g} ({outcome.value:g})"
        return DeviceReport(report.device, report.samples, failed=reason)

    def _start_of(self, level: int, round_number: int, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the values that a device starts from, and where they belong in the stage; None: they are all of it."""
        labels = torch.from_numpy(np.unique(self.data.train.labels[rows]))
        if not self.method.counted:
            self.part.begin_device(labels)
            return self.values, None
        self.enter_level(level)
        self.part.begin_device(labels)
        index = self._mine("index", self.method.part_index(self.stage, self.part, round_number, labels))
        start = torch.where(index >= 0, self.values[index.clamp(min=0)], self.part_start)
        return self._mine("start", start), self.part.sent(index)

    def ask(self, plan: ProbePlan, rank: int) -> torch.Tensor:
        """Ask this rank's devices; return a row for each device of the plan, zero for those of other ranks.

        See Asker.ask. Where the stage has sub-models all answer with the smallest, which all of them hold.
        """
        if self.method.counted:
            self.enter_level(0)
        self.part.begin_asking()
        facts = self.data.num_classes, plan.signature_size, self.config.seed
        probe = Probe(self.part, self.cap, *facts, self.config.train.prefix)

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
    ) -> tuple[torch.Tensor, Callable[[Outcome], DeviceReport]]:
        """Train a device; return the sums of its losses and of their squares, (2,), and what makes its report."""
        config, key = self.config, (plan.round, assignment.device)
        steps = samples = 0
        kind = (plan.stage, self.level, assignment.way, len(rows))
        # dropout and the like draw from torch's global generator
        with self.cap.device(assignment.cap_bytes, kind) as memory, global_seed(config.seed, "local training", *key):
            self.trainer.begin(start, plan.learning_rate, way_of(assignment.way))
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            for piece in self.trainer.pieces():
                for count, take in self._steps(memory, plan, assignment, piece):
                    self.check()
                    sums += take()
                    steps += 1
                    samples += count
        report = DeviceReport(
            assignment.device,
            len(rows),
            steps=steps,
            peak_bytes=memory.peak_bytes,
            tensor_peak_bytes=memory.tensor_peak_bytes,
        )
        return sums, partial(self._reported, report, self.part.flat.slots, samples)

    def _steps(
        self, memory: DeviceMemory, plan: RoundPlan, assignment: Assignment, piece: int
    ) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
        """Yield for each of a device's batches for a piece how many samples it has, and what trains on it."""
        device, rows = assignment.device, self.parts[assignment.device]
        if self.features is not None:
            if assignment.stores:
                self._store(memory, plan.stage, self.features.first_images(device))
            for batch in self.features.batches(device, plan.round):
                yield len(batch.labels), partial(self._step_behind, memory, plan.stage, batch)
            return
        room = None if self.held is None else self.held.samples
        drawn = drawn_in_round(
            self.config, self.data, len(rows), stage=plan.stage, round_number=plan.round, device=device, piece=piece
        )
        for images, labels in training_batches(self.data, rows, drawn, self.device, room):
            yield len(images), partial(self._step, memory, (plan.stage, piece), images, labels)

    def _step(
        self, memory: DeviceMemory, at: tuple[int, int], images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Take a step on a batch; `at`: stage and piece."""
        return self.cap.step(
            memory,
            (*at, self.level, self.trainer.way, len(images)),
            lambda: [*self.trainer.held_tensors(), images, labels],
            lambda: self.trainer.counted_step(images, labels),
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
        kind = (stage, self.level, self.trainer.way, len(batch.labels))
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
        if self.held is not None and type(self.method).merge is not Method.merge:
            before, update = before.cpu(), update.on_host()  # which methods of users' own are promised
        name = self.config.method.name
        with own_code("method.name", name):  # the same on every rank, so all leave
            merged = self.method.merge(before, update, weight_sum)
        if merged.shape != before.shape or merged.dtype != before.dtype:
            raise ConfigError(
                f"method.name: {name}.merge returned {merged.dtype} of {tuple(merged.shape)}, not "
                f"{before.dtype} of {tuple(before.shape)}"
            )
        change = merged - before
        self.values = self._mine("values", merged)
        return change

    def _take_statistics(self) -> None:
        """Put the global values into the network, and what the method's statistics add to them."""
        self.settle()
        wanted = min(self.method.statistics_samples, len(self.data.train))
        if wanted:
            rows = numpy_generator(self.config.seed, "statistics").choice(len(self.data.train), wanted, replace=False)
            batches = plain_batches(self.data, np.sort(rows), self.config.eval.batch_size, self.device)
            self.method.take_statistics(self.stage, (images for images, _ in batches))
            self.values = self._mine("values", self.stage.flat.values().clone())

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
