"""What the sources share: the form of a sample, the names of splits, and the decoding of one image."""

import contextlib
import io
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedfreeze.errors import DataError, one_line

if TYPE_CHECKING:
    from PIL import Image

Sample = tuple[np.ndarray, int]  # image: uint8 of shape (channels, height, width); label

SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val")}
FOLDER_FORMS = "Parquet files (train-*.parquet, test-*.parquet) or images (train/CLASS/*.png, test/CLASS/*.png)"


class BeginAgain(Exception):
    """Raised by a stream that has met what changes the samples before it: decode the source from its start again."""


def open_image(file: IO[bytes]) -> "Image.Image":
    """Open an encoded image; its pixels are not read yet. Raises DataError if it is of no known format."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except UnidentifiedImageError:  # its text is an address in memory
        raise DataError("it is no image of a known format") from None


def as_image(value: Any) -> "Image.Image":
    """Open what a column of images holds: bytes, a mapping with `bytes`, or an image. Raises DataError."""
    from PIL import Image

    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise DataError("the image has no bytes")
    if isinstance(value, bytes):
        return open_image(io.BytesIO(value))
    if not isinstance(value, Image.Image):
        raise DataError(f"the image is {type(value).__name__}, not encoded bytes")
    return value


def mode_of(image: "Image.Image") -> str:
    """Return `L` for a grey image of any depth, else `RGB`."""
    return "L" if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else "RGB"


def pixels_of(image: "Image.Image", mode: str, size: int | None) -> np.ndarray:
    """Decode an image to uint8 (channels, height, width), grey (`L`) or `RGB`; `size` scales and crops it to a square.

    Raises DataError, and whatever Pillow raises where the image is torn.
    """
    from PIL import Image, ImageOps

    image.load()
    with contextlib.suppress(Exception):  # photographs say which side is up; a spoilt note changes nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise DataError("the image holds floating-point numbers; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise DataError("the image has grey levels outside 0 to 65535; save it with 8 or 16 bits a channel")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    image = image.convert(mode)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def reason(error: BaseException) -> str:
    """Return why a file or an image cannot be read, on one line that leaves room for the rest of the message."""
    known = error.strerror if isinstance(error, OSError) else None  # without the path, which the caller names
    return known or one_line(error)[:200]


def unequal(place: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> DataError:
    """Return the error of an image that differs in shape (channels, height, width) from another."""
    action = "all must be of one size; give data.image_size=PIXELS to scale and crop them"
    if shape[0] != other_shape[0]:
        action = "all must be grey or all in colour; convert them"
    return DataError(f"{place}: image of {shape}, {other} has {other_shape} (channels, height, width); {action}")
