"""A device's batches: shuffled, augmented and normalised as whole tensors, never a sample at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from fedfreeze.data.store import Data, Split, normalise


def training_batches(
    data: Data,
    rows: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    augment: str,
    shuffle: torch.Generator,
    augmentation: torch.Generator,
    device: torch.device,
    room: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images (batch, channels, height, width) and labels (batch,) of one device's samples.

    The last batch of an epoch may be smaller; a last batch of a single sample is dropped, because batch normalisation
    cannot learn from it. Random draws are made on the CPU, so they do not depend on where the training runs. A device's
    samples stay on the host, as on the storage of a real device: only the batch is in its memory. `room` (bytes, uint8,
    `staged_bytes` of them) is memory of the emulator's on a GPU that stands for that storage: samples and draws come
    there by one copy, for which nothing waits.
    """
    pixels = torch.from_numpy(np.array(data.train.images[rows]))
    labels = torch.from_numpy(data.train.labels[rows])
    height = pixels.shape[2]
    steps: Iterator[tuple[torch.Tensor, torch.Tensor]] = (
        (chosen, _draw_moves(len(chosen), height, augment, augmentation))
        for chosen in _drawn(len(rows), batch_size, epochs, shuffle)
    )
    if room is not None and staged_bytes(len(rows), pixels[:1].numel(), epochs) <= len(room):
        drawn = list(steps)
        batches = [len(chosen) for chosen, _ in drawn]
        moves = torch.cat([moves for _, moves in drawn], 1)
        pixels, labels, chosen, moves = _staged([pixels, labels, torch.cat([c for c, _ in drawn]), moves], room)
        steps = zip(chosen.split(batches), moves.split(batches, 1), strict=True)
    for chosen, moves in steps:
        images = _moved(pixels[chosen].to(device), augment, moves.to(device))
        yield plain_images(data, images), labels[chosen].to(device)


_ALIGNED_BYTES = 512


def staged_bytes(samples: int, image_bytes: int, epochs: int) -> int:
    """Return the most bytes that a device's samples and draws take where `training_batches` has room for them."""
    whole_numbers = 1 + (1 + _MOVES) * epochs  # a label, and in each epoch the place and the moves of a sample
    return samples * (image_bytes + 8 * whole_numbers) + 4 * _ALIGNED_BYTES


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


def _drawn(count: int, batch_size: int, epochs: int, shuffle: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield the samples of each batch."""
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=shuffle).split(batch_size):
            if len(chosen) == 1 < batch_size and count > 1:
                continue
            yield chosen


# How many images each sample can become by an augmentation, where they are few.
VIEWS = {"none": 1, "flip": 2}


def training_views(
    count: int, *, batch_size: int, epochs: int, augment: str, shuffle: torch.Generator, augmentation: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, for the same draws as `training_batches` makes, the samples of each batch and which view of each it takes.

    View 1 is the flipped one.
    """
    for chosen in _drawn(count, batch_size, epochs, shuffle):
        yield chosen, _flips(len(chosen), augmentation).long() if augment == "flip" else torch.zeros_like(chosen)


def _flips(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(batch, generator=generator) < 0.5


def flipped(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Flip those of some images (batch, channels, height, width) for which `flips` is not zero."""
    return torch.where(flips.bool()[:, None, None, None], images.flip(-1), images)


def plain_images(data: Data, pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as the network takes them: normalised float32."""
    return normalise(pixels, data.mean, data.std)


def augment_batch(images: torch.Tensor, augment: str, generator: torch.Generator) -> torch.Tensor:
    """Augment uint8 images (batch, channels, height, width): random crops out of a zero padding, horizontal flips."""
    moves = _draw_moves(len(images), images.shape[2], augment, generator)
    return _moved(images, augment, moves.to(images.device))


_MOVES = 3  # numbers that say how an image is moved: rows and columns of its crop, whether it is flipped


def _padding(height: int) -> int:
    return max(1, height // 8)


def _draw_moves(batch: int, height: int, augment: str, generator: torch.Generator) -> torch.Tensor:
    """Draw how the images of a batch are moved, (3, batch), whole numbers, on the host."""
    moves = torch.zeros(_MOVES, batch, dtype=torch.int64)
    if augment == "crop_flip":
        moves[:2] = torch.randint(0, 2 * _padding(height) + 1, (2, batch), generator=generator)
    if augment != "none":
        moves[2] = _flips(batch, generator)
    return moves


def _moved(images: torch.Tensor, augment: str, moves: torch.Tensor) -> torch.Tensor:
    """Crop and flip uint8 images as it was drawn."""
    if augment == "none":
        return images
    batch, channels, height, width = images.shape
    if augment == "crop_flip":
        padded = functional.pad(images, (_padding(height),) * 4)
        rows = (moves[0, :, None] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (moves[1, :, None] + torch.arange(width, device=images.device))[:, None, None, :]
        each = torch.arange(batch, device=images.device)[:, None, None, None]
        planes = torch.arange(channels, device=images.device)[None, :, None, None]
        images = padded[each, planes, rows, columns]
    return flipped(images, moves[2])


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
