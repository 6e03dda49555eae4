"""What a rank holds on a GPU beside the device that it emulates: memory of its own, and libraries that are warm."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.data.batches import drawn_once, evaluation_batch, staged_bytes, training_batches
from fedfreeze.data.store import Data
from fedfreeze.device.cap import GRANULE_BYTES
from fedfreeze.device.cuda_cap import OWN_SEGMENT_BYTES, SEGMENT_BYTES
from fedfreeze.network.stage import LocalTrainer, Stage
from fedfreeze.seeds import global_seed

# A device with more samples than this has its batches copied one by one.
MOST_STAGED_BYTES = 2**30


class Held:
    """The emulator's tensors of a stage, in one piece of memory that fills segments of the allocator.

    So no tensor of a device finds room beside them that its cap would not count.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, torch.dtype]], device: torch.device):
        """`sizes`: how many elements of which type each tensor has, by name."""
        self.device = device
        begins, end = {}, 0
        for name, (count, dtype) in sizes.items():
            begins[name] = end
            end += -(-count * dtype.itemsize // GRANULE_BYTES) * GRANULE_BYTES
        whole = max(OWN_SEGMENT_BYTES, -(-end // SEGMENT_BYTES) * SEGMENT_BYTES)
        self.memory = torch.empty(whole, dtype=torch.uint8, device=device)
        self._rooms = {
            name: self.memory[begins[name] : begins[name] + count * dtype.itemsize].view(dtype)
            for name, (count, dtype) in sizes.items()
        }

    def room(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a tensor (count,); where none was set aside that fits, new one."""
        found = self._rooms.get(name)
        if found is None or found.dtype != dtype or len(found) < count:
            return torch.empty(count, dtype=dtype, device=self.device)
        return found[:count]

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a flat tensor, from wherever it lies, into its room; what was there is overwritten."""
        return self.room(name, len(tensor), tensor.dtype).copy_(tensor)

    @property
    def samples(self) -> torch.Tensor:
        """Memory (bytes,) that stands for the storage of the device at work."""
        return self._rooms["samples"]


def held_for(
    stage: Stage, config: Config, data: Data, parts: Sequence[np.ndarray], device: torch.device, *, counted: bool
) -> Held:
    """Return room for what the emulator of a stage holds: global and start values, the sum, a device's samples."""
    elements = len(stage.flat)
    sizes = {"values": (elements, torch.float32), "total": (elements, torch.int64)}
    if config.method.sum != "exact":
        sizes["total"] = (elements, torch.float32)
    sizes["over"] = (elements - stage.flat.parameters, torch.int64)
    if counted:
        sizes |= dict.fromkeys(("start", "part_start"), (elements, torch.float32))
        sizes |= dict.fromkeys(("count", "index"), (elements, torch.int64))
    most, image_bytes = max(len(part) for part in parts), int(np.prod(data.image_shape))
    staged = staged_bytes(most, image_bytes, config.train.local_epochs)
    sizes["samples"] = (min(staged, MOST_STAGED_BYTES), torch.uint8)
    return Held(sizes, device)


def warm_up(
    stage: Stage, config: Config, data: Data, parts: Sequence[np.ndarray], device: torch.device, room: torch.Tensor
) -> None:
    """Take a training step and an evaluation step of a stage, as devices and server will; its values are others after.

    cuBLAS, cuDNN and the like set memory aside when they are first used, from the same allocator: whoever came first
    would pay for all.
    """
    rows = max(parts, key=len)[: config.train.batch_size]
    trainer = LocalTrainer(stage, config.train)
    stage.begin_device(torch.from_numpy(np.unique(data.train.labels[rows])))
    with global_seed(config.seed, "warm-up"):
        for images, labels in training_batches(
            data, rows, drawn_once(config, data, len(rows), "warm-up"), device, room
        ):
            trainer.step(images, labels)
        stage.eval()
        with torch.inference_mode():
            tested = np.arange(min(len(data.test), config.eval.batch_size))
            images, _ = evaluation_batch(data, data.test, tested, device)
            stage(images)
    stage.train()
