"""What a device would reserve on a GPU: what it holds, its batches and its steps, put through the allocator's model.

The order of allocations is that of the operations, which is the same on a CPU; it is noted by the counter of tensor
bytes. Not seen: what kernels take for themselves (workspaces of cuDNN), and kernels that a CPU lacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedfreeze.config.schema import TrainConfig
from fedfreeze.config.ways import WHOLE, Way
from fedfreeze.device.cap import DeviceOutOfMemoryError, TensorByteCounter
from fedfreeze.device.segments import Block, SegmentAllocator, SegmentLimitError
from fedfreeze.network.flat import aligned_elements
from fedfreeze.network.probing import ImageShape
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.units import FLOAT_BYTES, MIB


@dataclass(frozen=True)
class StepRecord:
    """What a step of a kind allocates and frees, in its order."""

    batch: tuple[int, ...]
    """Bytes of what comes for it and is there until the next batch has come: pixels, images, labels."""
    events: tuple[int, ...]
    """Bytes of each allocation, not rounded; for the end of the n-th of them, counted from 0, -(n + 1)."""
    tensor_bytes: int
    """Peak of live tensor bytes."""


class Held:
    """What a device holds between steps, in the order in which it comes to a GPU (Stage, FlatPart, LocalTrainer)."""

    def __init__(self, trainer: LocalTrainer):
        """`trainer` may be on any device, and its tensors without values."""
        stage = trainer.stage
        self.storages = {_key(tensor) for tensor in trainer.held_tensors()}
        """Whose storages they are."""
        moving = {id(slot.tensor) for slot in stage.flat.slots if slot.tensor.dtype == torch.float32}
        trained = stage.trained_tensors()
        self.loaded = [(tensor.nbytes, False) for tensor in stage.frozen_tensors()]
        """Bytes of each tensor, and whether it goes into the flat buffer when all are there."""
        self.loaded += [(tensor.nbytes, id(tensor) in moving) for tensor in trained]
        # of a counter of batches there is a copy, to put it back
        self.loaded += [(tensor.nbytes, False) for tensor in trained if not tensor.is_floating_point()]
        aligned = aligned_elements(torch.device("cuda"))
        elements = parameters = 0
        for slot in stage.flat.slots:
            length = slot.end - slot.begin
            room = -(-length // aligned) * aligned
            elements += room
            parameters += room if slot.is_parameter else 0
            if room > length:
                self.loaded.append(((room - length) * FLOAT_BYTES, True))
        self.flat_bytes = elements * FLOAT_BYTES
        self.momentum_bytes = parameters * FLOAT_BYTES if trainer.descent.momentum.numel() else 0

    def place(self, allocator: SegmentAllocator) -> None:
        """Have it allocated, and what was only needed for that given back, as before each device on a GPU."""
        moving = []
        for size, moves in self.loaded:
            if size:
                block = allocator.alloc(size)
                moving += [block] if moves else []
        if self.flat_bytes:
            allocator.alloc(self.flat_bytes)
        for block in moving:
            allocator.free(block)
        if self.momentum_bytes:
            allocator.alloc(self.momentum_bytes)
        allocator.give_back()


class DeviceSegments:
    """The segments of one device, from a cold start over its batches."""

    def __init__(self, held: Held | None, cap_bytes: int | None = None):
        """`held`: None: nothing. Raises DeviceOutOfMemoryError where the cap does not hold it."""
        self.cap_bytes = cap_bytes
        self.allocator = SegmentAllocator()
        if held is not None:
            held.place(self.allocator)
        # as on a GPU: what was needed to come there is not the device's
        self.allocator.peak_bytes = self.allocator.reserved_bytes
        self.allocator.limit_bytes = cap_bytes
        if cap_bytes is not None and self.allocator.reserved_bytes > cap_bytes:
            raise DeviceOutOfMemoryError("load", self.allocator.reserved_bytes, cap_bytes)
        self._batch: list[Block] = []

    @property
    def peak_bytes(self) -> int:
        """The most that was reserved."""
        return self.allocator.peak_bytes

    def alloc(self, size: int) -> Block:
        """Return a block. Raises DeviceOutOfMemoryError where the allocator refuses it."""
        try:
            return self.allocator.alloc(size)
        except SegmentLimitError as error:
            raise refusal(error) from None

    def begin_batch(self, sizes: Sequence[int]) -> None:
        """Have a batch come: pixels, images, labels; each of the batch before goes when its successor is there.

        Raises DeviceOutOfMemoryError.
        """
        before, self._batch = self._batch, []
        for size in sizes[:1]:
            self._batch.append(self.alloc(size))
            for block in before[:1]:
                self.allocator.free(block)
        self._batch += [self.alloc(size) for size in sizes[1:]]
        for block in reversed(before[1:]):
            self.allocator.free(block)

    def step(self, record: StepRecord) -> None:
        """Take a step on a new batch, by what is known of it. Raises DeviceOutOfMemoryError."""
        self.begin_batch(record.batch)
        blocks: list[Block] = []
        for event in record.events:
            if event < 0:
                self.allocator.free(blocks[-event - 1])
            else:
                blocks.append(self.alloc(event))


class StepRecorder:
    """Notes the allocations of a step while it runs, and asks a device's allocator for each; a StorageListener."""

    def __init__(self, segments: DeviceSegments | None = None):
        self.segments = segments
        self.events: list[int] = []
        self._allocations = 0
        self._live: dict[int, tuple[int, Block | None]] = {}
        """The number and the block of each that was not freed yet."""
        self._refused: DeviceOutOfMemoryError | None = None
        self._ended = False

    def created(self, key: int, size_bytes: int) -> None:
        """See StorageListener."""
        if self._ended or self._refused is not None:
            return
        block = None
        if self.segments is not None:
            try:
                block = self.segments.alloc(size_bytes)
            except DeviceOutOfMemoryError as error:
                self._refused = error
                return
        self._live[key] = self._allocations, block
        self._allocations += 1
        self.events.append(size_bytes)

    def freed(self, key: int) -> None:
        """See StorageListener. What was there before the step is not its own."""
        if self._ended or key not in self._live:
            return
        number, block = self._live.pop(key)
        self.events.append(-number - 1)
        if self.segments is not None and block is not None:
            self.segments.allocator.free(block)

    def check(self, operation: str) -> None:
        """See StorageListener."""
        if self._refused is not None:
            raise self._refused

    def end(self) -> None:
        """Let what is left go: a step's losses are read and forgotten."""
        for key in list(self._live):
            self.freed(key)
        self._ended = True


def recorded(
    run: Callable[[], torch.Tensor],
    held: Callable[[], Sequence[torch.Tensor]],
    holds: Held | None = None,
    segments: DeviceSegments | None = None,
) -> tuple[torch.Tensor, StepRecord]:
    """Run a step; return what it returns, and its record. Raises DeviceOutOfMemoryError where `segments` refuse.

    `held` gives what is there when it begins; what of it the device does not hold between steps is its batch.
    """
    counter, recorder = TensorByteCounter(), StepRecorder(segments)
    tensors = held()
    known = set() if holds is None else holds.storages
    batch = batch_bytes([tensor for tensor in tensors if _key(tensor) not in known])
    counter.adopt(tensors)
    del tensors  # as a block may let go of the batch
    if segments is not None:
        segments.begin_batch(batch)
    counter.listener = recorder
    with counter:
        result = run()
    recorder.end()
    return result, StepRecord(batch, tuple(recorder.events), counter.peak_bytes)


def batch_bytes(batch: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the bytes of a batch in the order in which they are allocated: images come from uint8 pixels (batches.py).

    The temporaries of augmentation are not among them. [ours: they are a quarter of the images, and gone by then]
    """
    pixels = [tensor.numel() for tensor in batch if tensor.dim() == 4 and tensor.dtype == torch.float32]
    return (*pixels, *(tensor.nbytes for tensor in batch))


def refusal(error: SegmentLimitError) -> DeviceOutOfMemoryError:
    """Return what a refused request means, in the words of the cap on a GPU."""
    return DeviceOutOfMemoryError(
        f"an allocation of {error.request_bytes / MIB:.2f} MiB", error.needed_bytes, error.limit_bytes
    )


def first_batches(batch_size: int) -> list[int]:
    """Return the batches by which a device's memory is told: two, and a smaller one, which leaves gaps (trial.py)."""
    last = max(2, batch_size // 2)
    sizes = [batch_size] * 2
    while last > 0:
        sizes.append(min(last, batch_size))
        last -= batch_size
    return sizes


def predicted(stage: Stage, train: TrainConfig, image_shape: ImageShape, way: Way = WHOLE) -> tuple[int, int]:
    """Return the tensor bytes of a step of a stage by a way, and what its first steps would reserve on a GPU.

    Both in bytes; of a stage that trains piece by piece the most of any, each from a cold start. Tensors may have
    shapes only. The stage's weights should lie as on a GPU (`trial.model_on`). [torch's allocator; what kernels take
    for themselves is not in it]
    """
    trainer = stage.trainer(train)
    trainer.go(way)
    tensor_bytes = peak_bytes = 0
    for _ in trainer.pieces():
        holds = Held(trainer.at_work)
        segments = DeviceSegments(holds)
        records: dict[int, StepRecord] = {}
        for samples in first_batches(train.batch_size):
            if samples not in records:
                records[samples] = step_record(trainer, holds, samples, image_shape)
            segments.step(records[samples])
        tensor_bytes = max(tensor_bytes, records[train.batch_size].tensor_bytes)
        peak_bytes = max(peak_bytes, segments.peak_bytes)
    return tensor_bytes, peak_bytes


def step_record(trainer: LocalTrainer, holds: Held, samples: int, image_shape: ImageShape) -> StepRecord:
    """Take a step on so many black images, and return its record; tensors may have shapes only."""
    images, labels = torch.zeros(samples, *image_shape), torch.zeros(samples, dtype=torch.int64)
    return recorded(lambda: trainer.step(images, labels), lambda: [*trainer.held_tensors(), images, labels], holds)[1]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
