"""What the frozen prefix puts out for devices' samples, kept from round to round of a stage, in which it stays. [ours]

The emulated device is another matter: it calculates its prefix in every step, and its time and memory are charged so.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.data.batches import VIEWS, evaluation_batch, flipped, plain_images, training_views
from fedfreeze.data.store import Data
from fedfreeze.network.memory import is_channels_last
from fedfreeze.network.stage import Stage
from fedfreeze.seeds import global_seed, torch_generator
from fedfreeze.units import FLOAT_BYTES, MIB


@dataclass
class _Kept:
    """Features of one device's samples, by view and sample; which of them are there."""

    values: torch.Tensor
    """(views, samples, *shape), the channels of images last where the prefix puts them out so."""
    filled: torch.Tensor
    """(views, samples)"""
    channels_last: bool

    def __post_init__(self) -> None:
        self.array = self.values.numpy()
        """The values; the same memory."""

    def take(self, views: np.ndarray, samples: np.ndarray) -> torch.Tensor:
        """Return features (batch, *shape), in memory as the prefix puts them out.

        By numpy, past a count of tensors, which sees what torch does.
        """
        found = self.array[views, samples]
        return torch.from_numpy(found.transpose(0, 3, 1, 2) if self.channels_last else found)

    def put(self, views: torch.Tensor, samples: torch.Tensor, found: torch.Tensor) -> None:
        """Take in features."""
        self.values[views, samples] = found.permute(0, 2, 3, 1) if self.channels_last else found
        self.filled[views, samples] = True


@dataclass(frozen=True)
class FeatureBatch:
    """What the active block takes of a batch, and the images that it comes from; made when asked for."""

    owner: "FrozenFeatures"
    kept: _Kept
    pixels: torch.Tensor
    views: torch.Tensor
    chosen: torch.Tensor
    labels: torch.Tensor
    """On the device; the others are on the host."""
    places: tuple[np.ndarray, np.ndarray]
    """`views` and `chosen` for numpy."""
    made: list[torch.Tensor] = field(default_factory=list)

    def features(self) -> torch.Tensor:
        """Return what the frozen prefix puts out, (batch, ...), on the device."""
        return self.kept.take(*self.places).to(self.owner.device)

    def counted_features(self) -> torch.Tensor:
        """Return the same where tensors are counted: with the device's own work and memory before."""
        self.owner.stage.frozen_forward(self.made[0])
        found = self.kept.take(*self.places)
        # strides of dimensions of length 1 say nothing, but decide how a convolution calculates
        return torch.empty_strided(found.shape, found.stride(), device=self.owner.device).copy_(found)

    def make_images(self) -> torch.Tensor:
        """Return the normalised images, (batch, channels, height, width), on the device, and hold them, as it does."""
        self.made.append(self.owner.images(self.pixels[self.chosen], self.views))
        return self.made[-1]


class FrozenFeatures:
    """The features of a stage's frozen prefix on this rank.

    They are calculated `train.batch_size` samples at a time, the same ones together, so that they have the same bits
    whatever is kept and whoever calculates them; against batches as they are trained they may differ by rounding. Of
    the device that is at work all features are held, whatever the budget.
    """

    def __init__(self, stage: Stage, data: Data, parts: Sequence[np.ndarray], config: Config, device: torch.device):
        self.stage = stage
        self.data = data
        self.parts = parts
        self.config = config
        self.device = device
        self.budget_bytes = int(config.cache.budget_mib * MIB)
        self.used_bytes = 0
        self._kept: dict[int, _Kept] = {}
        self._test: dict[bytes, torch.Tensor] = {}

    def batches(self, device: int, round_number: int) -> Iterator[FeatureBatch]:
        """Yield a device's training batches; draws are those that training without kept features makes."""
        config, rows = self.config, self.parts[device]
        key = (round_number, device)
        drawn = list(
            training_views(
                len(rows),
                batch_size=config.train.batch_size,
                epochs=config.train.local_epochs,
                augment=config.data.augment,
                shuffle=torch_generator(config.seed, "shuffle", *key),
                augmentation=torch_generator(config.seed, "augment", *key),
            )
        )
        kept = self._features(device, drawn)
        pixels = torch.from_numpy(np.array(self.data.train.images[rows]))
        labels = torch.from_numpy(self.data.train.labels[rows])
        for chosen, views in drawn:
            places = views.numpy(), chosen.numpy()
            yield FeatureBatch(self, kept, pixels, views, chosen, labels[chosen].to(self.device), places)

    def images(self, pixels: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Return views of some pixels on the host as normalised images on the device."""
        return plain_images(self.data, flipped(pixels.to(self.device), views.to(self.device)))

    def of_test(self, rows: np.ndarray) -> torch.Tensor:
        """Return the features of some test samples, on the device; those of a batch that comes again are kept."""
        key = rows.tobytes()
        known = self._test.get(key)
        if known is None:
            images, _ = evaluation_batch(self.data, self.data.test, rows, self.device)
            found = self.stage.frozen_forward(images)
            needed = found.numel() * FLOAT_BYTES
            if self.used_bytes + needed > self.budget_bytes:
                return found
            self.used_bytes += needed
            known = self._test[key] = found.to("cpu", copy=True)
        return known.to(self.device, copy=True)  # a block may begin with an operation in place

    def _features(self, device: int, drawn: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Kept:
        """Return a device's features, with all that were drawn."""
        rows = self.parts[device]
        kept = self._kept.get(device)
        wanted = torch.zeros(VIEWS[self.config.data.augment], len(rows), dtype=torch.bool)
        for chosen, views in drawn:
            wanted[views, chosen] = True
        missing = wanted if kept is None else wanted & ~kept.filled
        if kept is not None and not missing.any():
            return kept
        pixels = torch.from_numpy(np.array(self.data.train.images[rows]))
        size = self.config.train.batch_size
        for view, begin in itertools.product(range(len(wanted)), range(0, len(rows), size)):
            if not missing[view, begin : begin + size].any():
                continue
            # always the same samples together, and as many: a last one that is not full takes some twice
            samples = torch.arange(begin, begin + size) % len(rows)
            found = self.stage.frozen_forward(self.images(pixels[samples], torch.full((size,), view))).cpu()
            if kept is None:
                kept = self._make_room(device, wanted.shape, found)
            real = samples[: len(rows) - begin]
            kept.put(torch.full((len(real),), view), real, found[: len(real)])
        assert kept is not None
        return kept

    def _make_room(self, device: int, wanted: torch.Size, found: torch.Tensor) -> _Kept:
        """Return room for a device's features; they are kept if the budget has as much left."""
        last = is_channels_last(found)
        shape = found.permute(0, 2, 3, 1).shape if last else found.shape
        room = _Kept(torch.empty(*wanted, *shape[1:]), torch.zeros(wanted, dtype=torch.bool), last)
        needed = room.values.numel() * FLOAT_BYTES
        if self.used_bytes + needed <= self.budget_bytes:
            self.used_bytes += needed
            self._kept[device] = room
        return room


def can_be_kept(stage: Stage, config: Config, image_shape: tuple[int, int, int], device: torch.device) -> bool:
    """Tell whether a stage has features that can be kept: a prefix without chance, and a number of views. [ours]

    A stage with a loss or a forward of its own may do something else with the images. What the prefix makes of an image
    must not depend on the others, and hold no more memory than its values. Not on GPUs, where the cap is the
    allocator's, and would not see what is left out.
    """
    if device.type != "cpu":
        return False
    names = ("forward", "loss", "frozen_forward")
    own = any(getattr(type(stage), name) is not getattr(Stage, name) for name in names)
    if not config.cache.features or not len(stage.frozen) or own or config.data.augment not in VIEWS:
        return False
    images = torch.rand(4, *image_shape, generator=torch_generator(0, "features")).to(device)
    found = []
    for number in range(2):
        with global_seed(number, "features"):
            found.append(stage.frozen_forward(images.clone()))
    one, other = found
    if not torch.equal(one, other) or one.dtype != torch.float32 or len(one) != len(images):
        return False
    alone = stage.frozen_forward(images[:2].clone())
    dense = one.untyped_storage().nbytes() == one.numel() * FLOAT_BYTES
    return dense and torch.allclose(alone, one[:2], rtol=1e-3, atol=1e-4)
