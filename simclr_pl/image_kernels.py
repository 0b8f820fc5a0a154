"""The colour stage of the augmentation as one compiled pass over each image, for the CPU.

The same arithmetic as `simclr_pl.image_operations`, which serves every other device: there each
operation is a pass over a whole batch in memory, here a few rows of one image go through all operations
while they are in the core's cache. Contrast needs the image's mean grey, so an image takes two passes.

Symbols: N rows, S side of a view.
"""

import math
from typing import Any

import numpy as np

from simclr_pl.cpu import compiled, in_threads, recycled

_TILE = 1024  # pixels; three float32 planes of them are 12 KB, a third of a core's first cache
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)

# No NaN or infinity occurs, and sums may be taken in any order: that lets the loops be vectorised.
_compiled = compiled(fastmath=True)


@_compiled
def _clamp(x: Any) -> Any:
    return min(max(x, np.float32(0)), np.float32(1))


@_compiled
def _grey_of(r: Any, g: Any, b: Any) -> Any:
    return np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b


@_compiled
def _load(rgb: Any, scale: float, r: Any, g: Any, b: Any, n: int) -> None:
    # Pixels in one axis: over an (n, 3) array the loop is not vectorised, and takes 4 times as long.
    for k in range(n):
        r[k] = np.float32(rgb[3 * k]) * scale
        g[k] = np.float32(rgb[3 * k + 1]) * scale
        b[k] = np.float32(rgb[3 * k + 2]) * scale


@_compiled
def _scale(f: float, r: Any, g: Any, b: Any, n: int) -> None:
    for k in range(n):
        r[k] = _clamp(r[k] * f)
        g[k] = _clamp(g[k] * f)
        b[k] = _clamp(b[k] * f)


@_compiled
def _blend(f: float, mean: float, r: Any, g: Any, b: Any, n: int) -> None:
    for k in range(n):
        r[k] = _clamp(mean + f * (r[k] - mean))
        g[k] = _clamp(mean + f * (g[k] - mean))
        b[k] = _clamp(mean + f * (b[k] - mean))


@_compiled
def _saturate(f: float, r: Any, g: Any, b: Any, n: int) -> None:
    for k in range(n):
        y = _grey_of(r[k], g[k], b[k])
        r[k] = _clamp(y + f * (r[k] - y))
        g[k] = _clamp(y + f * (g[k] - y))
        b[k] = _clamp(y + f * (b[k] - y))


@_compiled
def _hue_part(value: Any, spread: Any, k: Any) -> Any:
    k = k - np.float32(6) * np.floor(k * np.float32(1 / 6))
    return value - spread * _clamp(min(k, np.float32(4) - k))


@_compiled
def _turn(f: float, r: Any, g: Any, b: Any, n: int) -> None:
    shift = np.float32(6) * f
    for k in range(n):
        red, green, blue = r[k], g[k], b[k]
        value = max(red, max(green, blue))
        spread = value - min(red, min(green, blue))
        inverse = np.float32(1) / max(spread, np.float32(1e-20))
        blue_leads = np.float32(4) + (red - green) * inverse
        green_leads = np.float32(2) + (blue - red) * inverse
        red_leads = (green - blue) * inverse
        sixth = red_leads if red == value else (green_leads if green == value else blue_leads)
        sixth = sixth + shift
        r[k] = _hue_part(value, spread, sixth + np.float32(5))
        g[k] = _hue_part(value, spread, sixth + np.float32(3))
        b[k] = _hue_part(value, spread, sixth + np.float32(1))


@_compiled
def _operate(number: int, f: float, mean: float, r: Any, g: Any, b: Any, n: int) -> None:
    if number == _BRIGHTNESS:
        _scale(f, r, g, b, n)
    elif number == _CONTRAST:
        _blend(f, mean, r, g, b, n)
    elif number == _SATURATION:
        _saturate(f, r, g, b, n)
    elif number == _HUE:
        _turn(f, r, g, b, n)


@_compiled
def _sum_grey(r: Any, g: Any, b: Any, n: int) -> Any:
    total = np.float32(0)
    for k in range(n):
        total += _grey_of(r[k], g[k], b[k])
    return total


@_compiled
def _to_grey(r: Any, g: Any, b: Any, n: int) -> None:
    for k in range(n):
        y = _grey_of(r[k], g[k], b[k])
        r[k], g[k], b[k] = y, y, y


@_compiled
def _gauss(sigma: float, radius: int, taps: Any) -> None:
    """One half of the window, from the middle on; the whole has the sum 1."""
    whole = np.float32(1)
    taps[0] = 1
    for t in range(1, radius + 1):
        taps[t] = math.exp(np.float32(-0.5) * (t / sigma) ** 2)
        whole += 2 * taps[t]
    for t in range(radius + 1):
        taps[t] /= whole


@_compiled
def _blur_plane(plane: Any, taps: Any, radius: int, across: Any, line: Any) -> None:
    """Blurs ``plane`` (S, S) in place; ``across`` (S, S) and ``line`` (S + 2 radius) are room."""
    size = plane.shape[0]
    for y in range(size):
        row, out, middle, centre = plane[y], across[y], line[radius:], taps[0]
        for x in range(size):
            middle[x] = row[x]
            out[x] = centre * row[x]
        for t in range(1, radius + 1):  # reflected, without the border itself
            line[radius - t] = row[t]
            line[radius + size - 1 + t] = row[size - 1 - t]
        for t in range(1, radius + 1):
            left, right, weight = line[radius - t :], line[radius + t :], taps[t]
            for x in range(size):
                out[x] += weight * (left[x] + right[x])
    for y in range(size):
        out = plane[y]
        middle = across[y]
        for x in range(size):
            out[x] = taps[0] * middle[x]
        for t in range(1, radius + 1):
            above, below, weight = (
                across[abs(y - t)],
                across[min(y + t, 2 * size - 2 - y - t)],
                taps[t],
            )
            for x in range(size):
                out[x] += weight * (above[x] + below[x])


@_compiled
def _store(rgb: Any, affine: Any, solarise: bool, r: Any, g: Any, b: Any, n: int) -> None:
    if solarise:
        half = np.float32(0.5)
        for k in range(n):
            r[k] = np.float32(1) - r[k] if r[k] >= half else r[k]
            g[k] = np.float32(1) - g[k] if g[k] >= half else g[k]
            b[k] = np.float32(1) - b[k] if b[k] >= half else b[k]
    r_scale, g_scale, b_scale = affine[0, 0], affine[0, 1], affine[0, 2]
    r_shift, g_shift, b_shift = affine[1, 0], affine[1, 1], affine[1, 2]
    for k in range(n):
        rgb[3 * k] = r[k] * r_scale + r_shift
        rgb[3 * k + 1] = g[k] * g_scale + g_shift
        rgb[3 * k + 2] = b[k] * b_scale + b_shift


@_compiled
def _colour_rows(
    images: Any,
    source: Any,
    out: Any,
    first: int,
    last: int,
    scale: float,
    factor: Any,
    order: Any,
    grey: Any,
    sigma: Any,
    solarise: Any,
    largest: int,
    affine: Any,
) -> None:
    pixels = out.shape[1] // 3
    size = int(math.sqrt(pixels))
    planes = np.empty((3, pixels), np.float32)
    across = np.empty((size, size), np.float32)
    line = np.empty(size + 2 * largest, np.float32)
    taps = np.empty(largest + 1, np.float32)
    for i in range(first, last):
        image = images[source[i]]  # (S*S*3,)
        contrast = 4  # where in the order the contrast is
        for position in range(4):
            if order[i, position] == _CONTRAST:
                contrast = position
        mean = np.float32(0)
        if contrast < 4:
            total = 0.0
            for start in range(0, pixels, _TILE):
                n = min(_TILE, pixels - start)
                r, g, b = planes[0, start:], planes[1, start:], planes[2, start:]
                _load(image[3 * start :], scale, r, g, b, n)
                for position in range(contrast):
                    number = order[i, position]
                    _operate(number, factor[i, number], mean, r, g, b, n)
                total += _sum_grey(r, g, b, n)
            mean = np.float32(total / pixels)
        blurred = sigma[i] > 0
        for start in range(0, pixels, _TILE):
            n = min(_TILE, pixels - start)
            r, g, b = planes[0, start:], planes[1, start:], planes[2, start:]
            if contrast == 4:
                _load(image[3 * start :], scale, r, g, b, n)
            for position in range(contrast if contrast < 4 else 0, 4):
                number = order[i, position]
                if number >= 0:
                    _operate(number, factor[i, number], mean, r, g, b, n)
            if grey[i]:
                _to_grey(r, g, b, n)
            if not blurred:
                _store(out[i, 3 * start :], affine, solarise[i], r, g, b, n)
        if blurred:
            radius = min(largest, math.ceil(3 * sigma[i]))
            _gauss(sigma[i], radius, taps)
            for c in range(1 if grey[i] else 3):
                _blur_plane(planes[c].reshape(size, size), taps, radius, across, line)
            if grey[i]:
                planes[1] = planes[0]
                planes[2] = planes[0]
            _store(out[i], affine, solarise[i], planes[0], planes[1], planes[2], pixels)


def colour_rows(
    images: np.ndarray,
    source: np.ndarray,
    table: dict[str, np.ndarray],
    largest_radius: int,
    mean: np.ndarray,
    std: np.ndarray,
) -> np.ndarray:
    """Jitter, grey, blur, solarisation and normalisation of RGB images, one after the other.

    Args:
        images: (N, S, S, 3) contiguous, uint8, or float32 in [0, 1].
        source: (N,) int64, the image of each row of the result.
        table: from `Augment.draw`, by row of the result; what is missing is not done.
        largest_radius: of the blur's window, in pixels.
        mean: (3,) subtracted.
        std: (3,) divides.

    Returns:
        (N, S, S, 3) float32.
    """
    count, size = len(source), images.shape[1]
    scale = np.float32(1 / 255 if images.dtype == np.uint8 else 1)
    absent = {
        "factor": np.ones((count, 4), np.float32),
        "order": np.full((count, 4), -1, np.int64),
        "grey": np.zeros(count, bool),
        "sigma": np.zeros(count, np.float32),
        "solarise": np.zeros(count, bool),
    }
    columns = [np.ascontiguousarray(table.get(name, default)) for name, default in absent.items()]
    affine = np.stack([1 / std, -mean / std]).astype(np.float32)
    out = recycled((count, size, size, 3), np.float32)
    rows = out.reshape(count, -1)
    flat = images.reshape(len(images), -1)

    def work(first: int, last: int) -> None:
        _colour_rows(flat, source, rows, first, last, scale, *columns, largest_radius, affine)

    in_threads(work, count)
    return out
