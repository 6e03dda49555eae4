"""A device's batches: shuffled, augmented and normalised as whole tensors, never a sample at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fedfreeze.config.schema import Config, DataConfig
from fedfreeze.data.store import Data, Split, normalise
from fedfreeze.seeds import torch_generator


@dataclass(frozen=True)
class Changes:
    """What augmentation does to each of some images, or to each view of each; nothing where both are None."""

    flips: torch.Tensor | None = None
    """(..., images), whether it is flipped."""
    offsets: torch.Tensor | None = None
    """(..., images, 2), row and column of the padded image at which it begins."""

    def at(self, views: torch.Tensor, chosen: torch.Tensor) -> "Changes":
        """Return what is done to some views of some samples."""
        return Changes(
            None if self.flips is None else self.flips[views, chosen],
            None if self.offsets is None else self.offsets[views, chosen],
        )


def views_of_samples(config: DataConfig, count: int, height: int, generator: torch.Generator) -> Changes | None:
    """Return every view of some samples, (views, samples); None where there is no end of them.

    Without `data.views`, view 1 is the flipped image. Else of each two views, one is flipped where the other is not, so
    that no sample comes in one direction alone.
    """
    number = config.view_count
    if number is None:
        return None
    if config.augment == "none":
        return Changes()
    if config.views is None:
        return Changes(torch.tensor([False, True])[:, None].expand(2, count))
    drawn = [draw_changes(count, config.augment, height, generator) for _ in range(number)]
    flips = [each.flips for each in drawn if each.flips is not None]
    flips = [~flips[view - 1] if view % 2 else flips[view] for view in range(number)]
    offsets = [each.offsets for each in drawn if each.offsets is not None]
    return Changes(torch.stack(flips), torch.stack(offsets) if offsets else None)


def draw_changes(count: int, augment: str, height: int, generator: torch.Generator) -> Changes:
    """Draw what augmentation does to some images of a height, anew for each."""
    if augment == "none":
        return Changes()
    offsets = None
    if augment == "crop_flip":
        offsets = torch.randint(0, 2 * _padding(height) + 1, (2, count), generator=generator).T
    return Changes(torch.rand(count, generator=generator) < 0.5, offsets)


def _padding(height: int) -> int:
    return max(1, height // 8)


def augmented(images: torch.Tensor, changes: Changes) -> torch.Tensor:
    """Change uint8 images (batch, channels, height, width): crops out of a zero padding, horizontal flips."""
    batch, channels, height, width = images.shape
    if changes.offsets is not None:
        padded = functional.pad(images, (_padding(height),) * 4)
        top, left = changes.offsets.to(images.device).T
        rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
        each = torch.arange(batch, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        images = padded[each, channel, rows, columns]
    if changes.flips is not None:
        images = torch.where(changes.flips.to(images.device)[:, None, None, None], images.flip(-1), images)
    return images


@dataclass(frozen=True)
class Draws:
    """The generators of one device in one round; all draws are on the CPU, so that they depend on nothing else."""

    shuffle: torch.Generator
    augmentation: torch.Generator
    views: torch.Generator
    """Of the counted views, the same in all rounds of a stage."""


@dataclass(frozen=True)
class Drawn:
    """One batch: which of a device's samples, which view of each where views are counted, what is done to them."""

    chosen: torch.Tensor
    views: torch.Tensor | None
    changes: Changes


def drawn_batches(
    config: DataConfig, count: int, height: int, *, batch_size: int, epochs: int, draws: Draws
) -> Iterator[Drawn]:
    """Yield the batches of a device of `count` samples.

    The last batch of an epoch may be smaller; a last batch of a single sample is dropped, because batch normalisation
    cannot learn from it. With `data.views` an epoch takes one view of all samples; [ours] so that a device that keeps
    what it makes of a view makes one at a time.
    """
    table = views_of_samples(config, count, height, draws.views)
    for _ in range(epochs):
        order = torch.randperm(count, generator=draws.shuffle)
        of_epoch = 0
        if config.views is not None and config.augment != "none":
            of_epoch = int(torch.randint(config.views, (), generator=draws.augmentation))
        for chosen in order.split(batch_size):
            if len(chosen) == 1 < batch_size and count > 1:
                continue
            if table is None or (config.augment == "flip" and config.views is None):
                changes = draw_changes(len(chosen), config.augment, height, draws.augmentation)
                views = None if table is None or changes.flips is None else changes.flips.long()
                yield Drawn(chosen, views, changes)
            else:
                views = torch.full_like(chosen, of_epoch)
                yield Drawn(chosen, views, table.at(views, chosen))


def drawn_in_round(
    config: Config, data: Data, count: int, *, stage: int, round_number: int, device: int, piece: int = 0
) -> Iterator[Drawn]:
    """Yield the batches of local training of a device of `count` samples, of one of the pieces that it trains.

    No device, no round and no piece draws as another.
    """
    key = (round_number, device, piece) if piece else (round_number, device)
    draws = Draws(
        torch_generator(config.seed, "shuffle", *key),
        torch_generator(config.seed, "augment", *key),
        _of_views(config, stage, device),
    )
    size, epochs = config.train.batch_size, config.train.local_epochs
    return drawn_batches(config.data, count, data.image_shape[1], batch_size=size, epochs=epochs, draws=draws)


def views_of_device(config: Config, data: Data, count: int, *, stage: int, device: int) -> Changes | None:
    """Return every view of a device's samples in a stage, as `drawn_in_round` counts them; see views_of_samples."""
    return views_of_samples(config.data, count, data.image_shape[1], _of_views(config, stage, device))


def _of_views(config: Config, stage: int, device: int) -> torch.Generator:
    return torch_generator(config.seed, "views", stage, device)


def drawn_once(config: Config, data: Data, count: int, purpose: str) -> Iterator[Drawn]:
    """Yield the batches of one pass over `count` samples, drawn for a purpose of the emulator's own."""
    draws = Draws(*(torch_generator(config.seed, f"{purpose} {draw}") for draw in ("shuffle", "augment", "views")))
    size = config.train.batch_size
    return drawn_batches(config.data, count, data.image_shape[1], batch_size=size, epochs=1, draws=draws)


def training_batches(
    data: Data, rows: np.ndarray, drawn: Iterable[Drawn], device: torch.device, room: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images (batch, channels, height, width) and labels (batch,) of one device's samples.

    A device's samples stay on the host, as on the storage of a real device: only the batch is in its memory. `room`
    (bytes, uint8, `staged_bytes` of them) is memory of the emulator's on a GPU that stands for that storage: samples
    and draws come there by one copy, for which nothing waits.
    """
    pixels = torch.from_numpy(np.array(data.train.images[rows]))
    labels = torch.from_numpy(data.train.labels[rows])
    if room is not None:
        drawn = list(drawn)
        epochs = -(-sum(len(batch.chosen) for batch in drawn) // max(1, len(rows)))
        if staged_bytes(len(rows), pixels[:1].numel(), epochs) <= len(room):
            pixels, labels, drawn = _staged_batches(pixels, labels, drawn, room)
    for batch in drawn:
        images = augmented(pixels[batch.chosen].to(device), batch.changes)
        yield plain_images(data, images), labels[batch.chosen].to(device)


_ALIGNED_BYTES = 512


def staged_bytes(samples: int, image_bytes: int, epochs: int) -> int:
    """Return the most bytes that a device's samples and draws take where `training_batches` has room for them."""
    # a label; in each epoch the place of a sample, row and column of its crop, and whether it is flipped
    return samples * (image_bytes + 8 + epochs * (8 + 2 * 8 + 1)) + 5 * _ALIGNED_BYTES


def _staged_batches(
    pixels: torch.Tensor, labels: torch.Tensor, drawn: list[Drawn], room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[Drawn]]:
    """Return a device's samples and draws in `room`."""
    sizes = [len(batch.chosen) for batch in drawn]
    tensors = [pixels, labels, torch.cat([batch.chosen for batch in drawn])]
    flips = [batch.changes.flips for batch in drawn if batch.changes.flips is not None]
    offsets = [batch.changes.offsets for batch in drawn if batch.changes.offsets is not None]
    tensors += [torch.cat(each) for each in (flips, offsets) if each]
    pixels, labels, chosen, *moves = _staged(tensors, room)
    nothing: list[torch.Tensor | None] = [None] * len(drawn)
    of_flips = list(moves.pop(0).split(sizes)) if flips else nothing
    of_offsets = list(moves.pop(0).split(sizes)) if offsets else nothing
    batches = zip(drawn, chosen.split(sizes), of_flips, of_offsets, strict=True)
    return pixels, labels, [Drawn(places, batch.views, Changes(f, o)) for batch, places, f, o in batches]


def _staged(tensors: list[torch.Tensor], room: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors from the host into `room`, at once, and return them there, without waiting."""
    ends = [0]
    for tensor in tensors:
        ends.append(-(-(ends[-1] + tensor.nbytes) // _ALIGNED_BYTES) * _ALIGNED_BYTES)
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=room.is_cuda)
    places = list(zip(tensors, ends, strict=False))
    for tensor, begin in places:
        host[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = room[: len(host)]
    there.copy_(host, non_blocking=True)
    return [there[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, begin in places]


def plain_images(data: Data, pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as the network takes them: normalised float32."""
    return normalise(pixels, data.mean, data.std)


def evaluation_batch(
    data: Data, split: Split, rows: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some samples of a split: normalised images and labels."""
    pixels = torch.from_numpy(np.array(split.images[rows])).to(device)
    return plain_images(data, pixels), torch.from_numpy(split.labels[rows]).to(device)


def plain_batches(
    data: Data, rows: np.ndarray, batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images and labels of some training samples, in order, without augmentation."""
    for start in range(0, len(rows), batch_size):
        yield evaluation_batch(data, data.train, rows[start : start + batch_size], device)
