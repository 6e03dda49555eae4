"""What the frozen prefix puts out for devices' samples, kept from round to round of a stage, in which it stays. [ours]

The emulated device is another matter: it calculates its prefix in every step (`train.prefix: recomputed`), or stores
what it puts out (`stored`); its time and memory are charged so, whatever is kept here.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedfreeze.config.schema import Config
from fedfreeze.data.batches import (
    Changes,
    Drawn,
    augmented,
    drawn_in_round,
    evaluation_batch,
    plain_images,
    views_of_device,
)
from fedfreeze.data.store import Data
from fedfreeze.device.cost import trained_stage
from fedfreeze.device.feature_store import FeatureStore
from fedfreeze.errors import ConfigError
from fedfreeze.methods import make_method, method_class
from fedfreeze.network.blocks import build_network
from fedfreeze.network.memory import is_channels_last
from fedfreeze.network.probing import ImageShape
from fedfreeze.network.stage import Stage
from fedfreeze.seeds import global_seed, torch_generator
from fedfreeze.units import FLOAT_BYTES, MIB


@dataclass
class _Kept:
    """Features of one view of a device's samples; which of them are there."""

    array: np.ndarray
    """(samples, *shape), the channels of images last where the prefix puts them out so."""
    filled: np.ndarray
    """(samples)"""
    channels_last: bool

    def put(self, begin: int, found: torch.Tensor) -> None:
        """Take in features of samples from `begin` on."""
        values = found.permute(0, 2, 3, 1) if self.channels_last else found
        self.array[begin : begin + len(found)] = values.numpy()
        self.filled[begin : begin + len(found)] = True

    def tensor(self) -> torch.Tensor:
        """Return all of them as the prefix puts them out; the memory is the same."""
        found = torch.from_numpy(self.array)
        return found.permute(0, 3, 1, 2) if self.channels_last else found


@dataclass(frozen=True)
class FeatureBatch:
    """What the active block takes of a batch, and the images that it comes from; made when asked for."""

    owner: "FrozenFeatures"
    kept: dict[int, _Kept]
    """By view."""
    pixels: torch.Tensor
    drawn: Drawn
    labels: torch.Tensor
    """On the device; the others are on the host."""
    places: tuple[np.ndarray, np.ndarray]
    """View and sample of each, for numpy."""
    made: list[torch.Tensor] = field(default_factory=list)

    def features(self) -> torch.Tensor:
        """Return what the frozen prefix puts out, (batch, ...), on the device.

        By numpy, past a count of tensors, which sees what torch does; in memory as the prefix puts it out.
        """
        views, chosen = self.places
        first = self.kept[int(views[0])]
        found = first.array[chosen]
        for view in set(views.tolist()) - {int(views[0])}:
            found[views == view] = self.kept[view].array[chosen[views == view]]
        return torch.from_numpy(found.transpose(0, 3, 1, 2) if first.channels_last else found).to(self.owner.device)

    def counted_features(self) -> torch.Tensor:
        """Return the same where tensors are counted, as a device that calculates them: with their work and memory."""
        stage = self.owner.stage
        with stage.streaming() if self.owner.config.train.prefix == "streamed" else nullcontext():
            calculated = stage.frozen_forward(self.made[0])
        found = self.features()
        if calculated.stride() == found.stride():
            return calculated.copy_(found)  # in its place, as memory has places
        del calculated
        return self.read_features()

    def read_features(self) -> torch.Tensor:
        """Return the same where tensors are counted, as a device that stores them."""
        found = self.features()
        # strides of dimensions of length 1 say nothing, but decide how a convolution calculates
        return torch.empty_strided(found.shape, found.stride(), device=self.owner.device).copy_(found)

    def make_images(self) -> torch.Tensor:
        """Return the normalised images, (batch, channels, height, width), on the device, and hold them, as it does."""
        self.made.append(self.owner.images(self.pixels[self.drawn.chosen], self.drawn.changes))
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
        self.store = FeatureStore(0)  # if nothing is kept they are those of devices that store them, calculated anew
        if config.cache.features:
            folder = None if config.cache.dir is None else Path(config.cache.dir)
            self.store = FeatureStore(int(config.cache.budget_mib * MIB), folder, int(config.cache.disk_mib * MIB))
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._test: dict[bytes, torch.Tensor] = {}

    def batches(self, device: int, round_number: int) -> Iterator[FeatureBatch]:
        """Yield a device's training batches; draws are those that training without kept features makes."""
        rows, stage = self.parts[device], self.stage.index
        batches = drawn_in_round(
            self.config, self.data, len(rows), stage=stage, round_number=round_number, device=device
        )
        drawn = list(batches)
        pixels = torch.from_numpy(np.array(self.data.train.images[rows]))
        labels = torch.from_numpy(self.data.train.labels[rows])
        kept = self._features(device, drawn, pixels)
        for batch in drawn:
            assert batch.views is not None
            places = batch.views.numpy(), batch.chosen.numpy()
            yield FeatureBatch(self, kept, pixels, batch, labels[batch.chosen].to(self.device), places)

    def first_images(self, device: int) -> torch.Tensor:
        """Return normalised images of a batch of a device's first samples, on the device."""
        rows = self.parts[device][: self.config.train.batch_size]
        return evaluation_batch(self.data, self.data.train, rows, self.device)[0]

    def images(self, pixels: torch.Tensor, changes: Changes) -> torch.Tensor:
        """Return views of some pixels on the host as normalised images on the device."""
        return plain_images(self.data, augmented(pixels.to(self.device), changes))

    def of_test(self, rows: np.ndarray) -> torch.Tensor:
        """Return the features of some test samples, on the device; those of a batch that comes again are kept."""
        key = rows.tobytes()
        known = self._test.get(key)
        if known is None:
            images, _ = evaluation_batch(self.data, self.data.test, rows, self.device)
            found = self.stage.frozen_forward(images).cpu()
            room, is_kept = self._room(len(found), found)
            room.put(0, found)
            known = room.tensor()
            if is_kept:
                self._test[key] = known
        return known.to(self.device, copy=True)  # a block may begin with an operation in place

    def _features(self, device: int, drawn: Sequence[Drawn], pixels: torch.Tensor) -> dict[int, _Kept]:
        """Return a device's features by view, with all that were drawn."""
        wanted: dict[int, np.ndarray] = {}
        for batch in drawn:
            assert batch.views is not None
            for view in set(batch.views.tolist()):
                of_view = wanted.setdefault(view, np.zeros(len(pixels), dtype=bool))
                of_view[batch.chosen[batch.views == view].numpy()] = True
        table = views_of_device(self.config, self.data, len(pixels), stage=self.stage.index, device=device)
        assert table is not None
        return {view: self._view(device, view, of_view, pixels, table) for view, of_view in sorted(wanted.items())}

    def _view(self, device: int, view: int, wanted: np.ndarray, pixels: torch.Tensor, table: Changes) -> _Kept:
        """Return the features of one view of a device's samples, with all that are wanted."""
        kept = self._kept.get((device, view))
        size, count = self.config.train.batch_size, len(pixels)
        missing = wanted if kept is None else wanted & ~kept.filled
        for begin in range(0, count, size):
            if not missing[begin : begin + size].any():
                continue
            samples = torch.arange(begin, min(begin + size, count))  # always the same ones together
            images = self.images(pixels[samples], table.at(torch.full_like(samples, view), samples))
            found = self.stage.frozen_forward(images).cpu()
            if kept is None:
                kept, is_kept = self._room(count, found)
                if is_kept:
                    self._kept[device, view] = kept
            kept.put(begin, found)
        assert kept is not None
        return kept

    def _room(self, count: int, found: torch.Tensor) -> tuple[_Kept, bool]:
        """Return room for features of some samples, such as `found`, and whether the budgets have as much left.

        In the same order of memory in either case, by which convolutions calculate.
        """
        last = is_channels_last(found)
        shape = (count, *(found.permute(0, 2, 3, 1) if last else found).shape[1:])
        array = self.store.room(shape)
        mine = np.empty(shape, dtype=np.float32) if array is None else array
        return _Kept(mine, np.zeros(count, dtype=bool), last), array is not None


def check_storable(
    config: Config, image_shape: ImageShape, num_classes: int, fitted: dict[str, Any], device: torch.device
) -> None:
    """Raise ConfigError where devices are to store features or to stream weights (`train.prefix`) and cannot."""
    if config.train.prefix == "streamed" and device.type != "cpu":
        raise ConfigError(
            "train.prefix: streamed is for ranks on CPUs so far, where what is in a device's memory is counted; use "
            "recomputed, or train.device=cpu"
        )
    if config.train.prefix != "stored":
        return
    model = method_class(config).network(config.model, fitted)
    method = make_method(config, build_network(model, image_shape, num_classes, config.seed), fitted)
    for index in range(0 if method.counted else method.num_stages):
        with trained_stage(config, method, index, 0, torch.device("cpu")) as stage:
            reason = why_not_kept(stage, config, image_shape, device) if len(stage.frozen) else None
        if reason is not None:
            raise ConfigError(
                f"train.prefix: devices cannot store the features of stage {index + 1}: {reason}; use "
                "train.prefix=recomputed"
            )


def why_not_kept(stage: Stage, config: Config, image_shape: ImageShape, device: torch.device) -> str | None:
    """Return why a stage's features cannot be kept; None: they can. [ours]

    A stage with a loss or a forward of its own may do something else with the images. What the prefix makes of an image
    must not depend on chance nor on the other images, and hold no more memory than its values. Not on GPUs, where the
    cap is the allocator's, and would not see what is left out.
    """
    if device.type != "cpu":
        return "they are kept on CPUs only (train.device=cpu)"
    if not len(stage.frozen):
        return "nothing is frozen"
    if config.data.view_count is None:
        return f"data.augment={config.data.augment} has no end of views (set data.views)"
    names = ("forward", "loss", "frozen_forward")
    if any(getattr(type(stage), name) is not getattr(Stage, name) for name in names):
        return f"{type(stage).__name__} has a forward or a loss of its own"
    images = torch.rand(4, *image_shape, generator=torch_generator(0, "features")).to(device)
    found = []
    for number in range(2):
        with global_seed(number, "features"):
            found.append(stage.frozen_forward(images.clone()))
    one, other = found
    if not one.isfinite().all():
        return "the frozen blocks put out what is no number"
    if not torch.equal(one, other):
        return "the frozen blocks draw random numbers"
    if one.dtype != torch.float32 or len(one) != len(images):
        return f"the frozen blocks put out {one.dtype} of {tuple(one.shape)} for {len(images)} images"
    alone = stage.frozen_forward(images[:2].clone())
    if not torch.allclose(alone, one[:2], rtol=1e-3, atol=1e-4):
        return "what the frozen blocks make of an image depends on the others"
    if one.untyped_storage().nbytes() != one.numel() * FLOAT_BYTES:
        return "what the frozen blocks put out is a part of something larger"
    return None
