"""From files to pixels, and from pixels to the crops of all views.

Symbols: V views, C channels (1 or 3), H x W pixels of an image, S side of a view.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from simclr_pl.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_image(path: str, channels: int) -> np.ndarray:
    """Decodes one file, upright by its EXIF orientation.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: the file cannot be read as an image; the message has its path.
    """
    try:
        with Image.open(path) as image:
            return _pixels_of(ImageOps.exif_transpose(image), channels)
    except Exception as error:  # on damaged files Pillow also raises SyntaxError, ValueError, ...
        raise InputError(
            f"every file must be a readable image; got {path!r}: {error}. Repair or remove it."
        ) from error


def _pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(
            f"images must have 8 or 16 bits a channel; got Pillow's mode {image.mode!r}, whose range "
            "is unknown. Convert the images to 8 bits."
        )
    array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return array if array.ndim == 3 else array[..., None]


def to_pixels(image: Any, channels: int) -> np.ndarray:
    """The pixels of what a user's data set returns.

    Args:
        image: a PIL image, an (H, W) or (H, W, C) uint8 array, or a (C, H, W) uint8 tensor.
        channels: 3 or 1; grey images are repeated to 3.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: another type, dtype or shape.
    """
    if isinstance(image, Image.Image):
        return _pixels_of(image, channels)
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        found = f"{type(image).__name__} of {getattr(image, 'dtype', 'no dtype')}"
        raise InputError(
            "a data set's images must be PIL images, (H, W, C) uint8 arrays or (C, H, W) uint8 "
            f"tensors; got {found}. Return the image without transforms."
        )
    array = image if image.ndim == 3 else image[..., None]
    if array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, 2)
    if array.shape[2] != channels:
        raise InputError(
            f"images must have {channels} channels; got {array.shape[2]}. Set the source's `channels`."
        )
    return array


def cut_crops(pixels: np.ndarray, crops: np.ndarray, size: int, out: np.ndarray) -> None:
    """Cuts the crops of all views out of one decoded image.

    Args:
        pixels: (H, W, C) uint8.
        crops: (V, 5) top, left, height, width, flipped.
        size: S.
        out: (V, C, S, S) uint8, filled in.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    for view, (top, left, height, width, flipped) in enumerate(crops.tolist()):
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(crop).reshape(size, size, -1)
        out[view] = (array[:, ::-1] if flipped else array).transpose(2, 0, 1)
