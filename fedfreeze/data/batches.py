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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images (batch, channels, height, width) and labels (batch,) of one device's samples.

    The last batch of an epoch may be smaller; a last batch of a single sample is dropped, because batch normalisation
    cannot learn from it. Random draws are made on the CPU, so they do not depend on where the training runs. A device's
    samples stay on the host, as on the storage of a real device: only the batch is in its memory.
    """
    pixels = torch.from_numpy(np.array(data.train.images[rows]))
    labels = torch.from_numpy(data.train.labels[rows])
    for chosen in _drawn(len(rows), batch_size, epochs, shuffle):
        images = augment_batch(pixels[chosen].to(device), augment, augmentation)
        yield plain_images(data, images), labels[chosen].to(device)


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
    if augment == "none":
        return images
    batch, _, height, width = images.shape
    if augment == "crop_flip":
        padding = max(1, height // 8)
        padded = functional.pad(images, (padding,) * 4)
        top, left = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator).to(images.device)
        rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
        each = torch.arange(batch, device=images.device)[:, None, None, None]
        channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        images = padded[each, channels, rows, columns]
    return flipped(images, _flips(batch, generator).to(images.device))


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
