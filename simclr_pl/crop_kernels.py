"""Crop, flip and resize as compiled loops on the CPU, by the integers of Pillow's antialiased bilinear.

The result is Pillow's to the bit where it filters along the rows first, as Pillow 11 always does and
Pillow 13 mostly; else within 1.

Along the columns the filter is a sum of whole rows of memory, which compilers turn into wide vector
instructions; along the rows it would gather single bytes. So the image is transposed, filtered along
the columns, transposed back, and filtered along the columns again. From 400 x 300 to 224 pixels that
takes 123 us, a low-pass with `cv2.resize`, which only comes near the filter, 188, and Pillow 793.

Symbols: M images in a set, P pixels of all of them, B images of a batch, V views, C channels, H x W
pixels of an image, S side of a view.
"""

import math
from typing import Any

import cv2
import numpy as np

from simclr_pl.cpu import compiled, in_threads, scratch

_LARGEST = 64  # pixels; up to there a call of a library costs more than the work
_BITS = 22  # of the weights' fraction, as in Pillow's Resample.c: 32 - 8 for the pixel - 2

_compiled = compiled()  # exact: no fast mathematics


def is_small(size: int) -> bool:
    """Whether views of S pixels are best cropped by `crop_rows`, many in one call."""
    return size <= _LARGEST


@_compiled
def _filter(length: int, size: int, first: Any, taps: Any, weights: Any) -> None:
    """Weights (S, taps) int32 of the pixels from ``first`` (S,) on; it widens when it shrinks."""
    scale = length / size
    reach = max(scale, 1.0)
    inverse = 1.0 / reach
    for i in range(size):
        centre = (i + 0.5) * scale
        low = max(0, int(centre - reach + 0.5))
        count = min(length, int(centre + reach + 0.5)) - low
        total = 0.0
        for t in range(count):
            total += max(0.0, 1.0 - abs((t + low - centre + 0.5) * inverse))
        for t in range(count):
            weight = max(0.0, 1.0 - abs((t + low - centre + 0.5) * inverse)) / total
            weights[i, t] = int(0.5 + weight * (1 << _BITS))
        first[i], taps[i] = low, count


@_compiled
def _columns(
    rows: Any,
    n: int,
    size: int,
    flip: int,
    out: Any,
    total: Any,
    first: Any,
    taps: Any,
    weights: Any,
) -> None:
    """Filters ``rows`` (length, >= n) uint8 along its columns to ``out`` (S, >= n)."""
    half, bits = np.int32(1 << (_BITS - 1)), np.int32(_BITS)
    for i in range(size):
        at, count = first[i], taps[i]
        row, weight = rows[at], weights[i, 0]
        if count == 1:
            for k in range(n):
                total[k] = half + weight * np.int32(row[k])
        else:
            other, its = rows[at + 1], weights[i, 1]
            for k in range(n):
                total[k] = half + weight * np.int32(row[k]) + its * np.int32(other[k])
        for t in range(2, count):
            row, weight = rows[at + t], weights[i, t]
            for k in range(n):
                total[k] += weight * np.int32(row[k])
        target = out[size - 1 - i if flip else i]
        # A loop of its own: one that also read bytes would not be vectorised, for they might overlap.
        for k in range(n):
            target[k] = np.uint8(total[k] >> bits)  # no clipping: the weights are positive


@_compiled
def _columns_once(rows: Any, size: int, flip: int, out: Any) -> None:
    length, n = rows.shape
    most = 2 * math.ceil(max(length / size, 1.0)) + 1
    first, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.empty((size, most), np.int32)
    _filter(length, size, first, taps, weights)
    _columns(rows, n, size, flip, out, np.empty(n, np.int32), first, taps, weights)


def resize(
    pixels: np.ndarray,
    height: int,
    width: int,
    flip: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resizes one image by Pillow's antialiased bilinear filter.

    Args:
        pixels: (H, W, C) uint8, C of 1 or 3; may be a slice.
        height, width: of the result, in pixels.
        flip: mirror it, left to right.
        out: (height, width, C) uint8 to fill in, contiguous.

    Returns:
        (height, width, C) uint8; ``out`` if given.
    """
    full_height, _, channels = pixels.shape
    if out is None:
        out = np.empty((height, width, channels), np.uint8)
    across = _transposed(pixels, "resize 0")  # (W, H*C)
    narrow = scratch((width, full_height, channels), "resize 1")
    _columns_once(across, width, flip, narrow.reshape(width, -1))
    down = _transposed(narrow, "resize 2")  # (H, width*C)
    _columns_once(down, height, False, out.reshape(height, -1))
    return out


def _transposed(image: np.ndarray, purpose: str) -> np.ndarray:
    """(H, W, C) to (W, H*C)."""
    height, width, channels = image.shape
    room = scratch((width, height, channels), purpose)
    if channels == 1:
        cv2.transpose(image[..., 0], room[..., 0])
    else:
        cv2.transpose(image, room)
    return room.reshape(width, height * channels)


@_compiled
def _crop_range(
    flat: Any,
    begin: Any,
    sides: Any,
    index: Any,
    crops: Any,
    channels: int,
    out: Any,
    start: int,
    stop: int,
) -> None:
    """``flat`` (P*C,) to ``out`` (B, V, S, S*C), images ``start`` to ``stop`` of the batch."""
    size = out.shape[2]
    largest = 1
    for b in range(start, stop):
        for v in range(crops.shape[1]):
            largest = max(largest, crops[b, v, 2], crops[b, v, 3])
    most = 2 * math.ceil(max(largest / size, 1.0)) + 1
    first, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.empty((size, most), np.int32)
    across = np.empty((largest, largest * channels), np.uint8)
    narrow = np.empty((size, largest * channels), np.uint8)
    down = np.empty((largest, size * channels), np.uint8)
    total = np.empty(max(size, largest) * channels, np.int32)
    for b in range(start, stop):
        image, full_width = begin[index[b]], sides[index[b], 1]
        for v in range(crops.shape[1]):
            top, left, height, width, flip = crops[b, v]
            for y in range(height):
                at = (image + (top + y) * full_width + left) * channels
                row = flat[at : at + width * channels]
                for x in range(width):
                    for c in range(channels):
                        across[x, y * channels + c] = row[x * channels + c]
            _filter(width, size, first, taps, weights)
            _columns(across, height * channels, size, flip, narrow, total, first, taps, weights)
            for x in range(size):
                row = narrow[x]
                for y in range(height):
                    for c in range(channels):
                        down[y, x * channels + c] = row[y * channels + c]
            _filter(height, size, first, taps, weights)
            _columns(down, size * channels, size, 0, out[b, v], total, first, taps, weights)


def crop_rows(
    flat: np.ndarray,
    start: np.ndarray,
    sides: np.ndarray,
    index: np.ndarray,
    crops: np.ndarray,
    out: np.ndarray,
) -> None:
    """Crops, flips and resizes the images of a batch, as `resize` does each view.

    Args:
        flat: (P, C) uint8, contiguous, the pixels of M images of any sizes.
        start: (M,) int64, the first pixel of each.
        sides: (M, 2) int64, height and width of each.
        index: (B,) int64, which of the images.
        crops: (B, V, 5) int64 from `Augment.draw_crops`.
        out: (B, V, S, S, C) uint8 to fill in, contiguous.
    """
    n_images, n_views, size, _, channels = out.shape
    views = out.reshape(n_images, n_views, size, size * channels)
    values = flat.reshape(-1)

    def work(first: int, last: int) -> None:
        _crop_range(values, start, sides, index, crops, channels, views, first, last)

    in_threads(work, n_images)
