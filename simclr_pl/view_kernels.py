# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton reads the annotations of a kernel: only its own are allowed there.)
"""The device stage of images on a GPU, as two Triton kernels: crop and resize, then colour.

The same arithmetic as `simclr_pl.image_operations`, which serves where these cannot: there each
operation is a few launches on a part of the batch, some 300 in all, and at a few milliseconds a step
the host cannot launch them fast enough. Here a launch does the whole batch, and what is done to a row
is read on the device, from the row's own parameters.

The block sizes are reasoned, not timed: at 4 warps a block of 1024 gives each thread 8 elements, few
enough for three channels in registers. The first kernel has a program for each block of a row, the
second one for each row: 512 images in two views are 1024 of them, some 8 for each of the 132
multiprocessors of an H200, and about as many as their registers hold at once. This module imports
triton, so import it where a GPU is at hand only.

Symbols: B images, V views, R = B*V rows, C channels, H x W pixels of an image, S side of a view.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements of a view in the first kernel, pixels in the second
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # fusion: Triton's default until 3.9 only


@triton.jit
def _reach(place, start, length, size: tl.constexpr):
    """Where an output pixel looks along one axis: centre, support, first pixel, and how many.

    The centres of at most ceil(2 support) pixels lie within (centre - support, centre + support).
    """
    scale = length.to(tl.float32) / size
    support = tl.maximum(scale, 1.0)
    centre = start.to(tl.float32) + (place.to(tl.float32) + 0.5) * scale
    first = tl.maximum(tl.floor(centre - support - 0.5).to(tl.int32) + 1, start)
    return centre, support, first, tl.minimum(tl.ceil(2 * support).to(tl.int32), length)


@triton.jit
def _weight(pixel, centre, support, end):
    """The triangle filter at a pixel, 0 beyond the crop; as `_resize_weights` has it."""
    weight = tl.maximum(1.0 - tl.abs(pixel.to(tl.float32) + 0.5 - centre) / support, 0.0)
    return tl.where(pixel < end, weight, 0.0)


@triton.jit
def crop_block(
    flat,
    starts,
    crops,
    out,
    strides_row,
    stride_column,
    stride_channel,
    size: tl.constexpr,
    channels: tl.constexpr,
    one_stride: tl.constexpr,
    block: tl.constexpr,
):
    """Kernel: a block of the elements of one view, in the order of memory: row, column, channel."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * block + tl.arange(0, block)
    channel = element % channels
    across = (element // channels) % size
    down = element // (channels * size)
    top = tl.load(crops + row * 5).to(tl.int32)
    left = tl.load(crops + row * 5 + 1).to(tl.int32)
    height = tl.load(crops + row * 5 + 2).to(tl.int32)
    width = tl.load(crops + row * 5 + 3).to(tl.int32)
    across = tl.where(tl.load(crops + row * 5 + 4) > 0, size - 1 - across, across)
    stride_row = strides_row
    if not one_stride:
        stride_row = tl.load(strides_row + row)
    at = flat + tl.load(starts + row) + channel.to(tl.int64) * stride_channel
    centre_y, support_y, first_y, n_down = _reach(down, top, height, size)
    centre_x, support_x, first_x, n_across = _reach(across, left, width, size)
    inside = down < size
    sums = tl.zeros((block,), dtype=tl.float32)
    weights = tl.zeros((block,), dtype=tl.float32)
    for j in range(n_down):
        y = first_y + j
        of_y = _weight(y, centre_y, support_y, top + height)
        for i in range(n_across):
            x = first_x + i
            weight = of_y * _weight(x, centre_x, support_x, left + width)
            pixel = at + y.to(tl.int64) * stride_row + x.to(tl.int64) * stride_column
            seen = tl.load(pixel, mask=inside & (weight > 0), other=0)
            sums += weight * seen.to(tl.float32)
            weights += weight
    mean = tl.div_rn(sums, tl.where(inside, weights, 1.0))  # `/` may miss a tie of the rounding
    view = out + row * size * size * channels
    tl.store(view + element, (mean + 0.5).to(tl.uint8), mask=inside)


def crop_flat(
    flat: Tensor,
    starts: Tensor,
    crops: Tensor,
    size: int,
    channels: int,
    stride_row: Tensor | int,
    stride_column: int,
    stride_channel: int = 1,
) -> Tensor:
    """Crops, flips and resizes images that lie anywhere in one buffer, each of a size of its own.

    All offsets and strides are in bytes, from the first element of ``flat``; its own shape and
    strides do not matter. Time grows with the square of how much a crop is shrunk.

    Args:
        flat: uint8, the buffer.
        starts: (R,) int64, where each row's image starts.
        crops: (R, 5) int64 of each row, within its image: top, left, height, width, flipped.
        size: S.
        channels: C.
        stride_row: from a pixel to the one below; (R,) int64 where the images differ in it.
        stride_column: from a pixel to the one on its right.
        stride_channel: from a channel to the next one.

    Returns:
        (R, C, S, S) uint8, channels last in memory; within 1 of `crop_resize`.
    """
    assert flat.dtype == torch.uint8
    assert starts.shape == crops.shape[:1]
    out = flat.new_empty(len(starts), size, size, channels)
    with torch.cuda.device_of(flat):
        crop_block[(len(starts), triton.cdiv(size * size * channels, _BLOCK))](
            flat,
            starts.contiguous(),
            crops.contiguous(),
            out,
            stride_row.contiguous() if isinstance(stride_row, Tensor) else stride_row,
            stride_column,
            stride_channel,
            size=size,
            channels=channels,
            one_stride=not isinstance(stride_row, Tensor),
            block=_BLOCK,
            **_OPTIONS,
        )
    return out.permute(0, 3, 1, 2)


def crop_rows_on_gpu(pixels: Tensor, index: Tensor, crops: Tensor, size: int) -> Tensor:
    """`crop_resize` of ``pixels[index]``, read where it lies.

    Args:
        pixels: (M, C, H, W) uint8, of any strides.
        index: (B,) int64 positions in it, from 0; (B, V) where the views of a row are of several images.
        crops: (B, V, 5) int64 from `Augment.draw_crops`.
        size: S.

    Returns:
        (B, V, C, S, S) uint8, each view with its channels last in memory; within 1 of
        `crop_resize`.
    """
    stride_image, stride_channel, stride_row, stride_column = pixels.stride()
    starts = index * stride_image
    if index.dim() == 1:
        starts = starts[:, None].expand(crops.shape[:2])
    rows = crop_flat(
        pixels,
        starts.flatten(),
        crops.flatten(0, 1),
        size,
        pixels.shape[1],
        stride_row,
        stride_column,
        stride_channel,
    )
    return rows.view(*crops.shape[:2], *rows.shape[1:])


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _blend(other, x, factor):
    return _clamp(other + factor * (x - other))


@triton.jit
def _grey_of(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _hue_part(value, spread, k):
    k -= tl.floor(k / 6.0) * 6.0
    return value - spread * _clamp(tl.minimum(k, 4.0 - k))


@triton.jit
def _turn(factor, red, green, blue):
    """`adjust_hue` of one row."""
    value = tl.maximum(tl.maximum(red, green), blue)
    spread = value - tl.minimum(tl.minimum(red, green), blue)
    inverse = 1.0 / tl.maximum(spread, 1e-20)
    green_or_blue = tl.where(
        green == value, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0
    )
    sixth = tl.where(red == value, (green - blue) * inverse, green_or_blue) + 6.0 * factor
    return (
        _hue_part(value, spread, sixth + 5.0),
        _hue_part(value, spread, sixth + 3.0),
        _hue_part(value, spread, sixth + 1.0),
    )


@triton.jit
def _operate(number, factor, mean_grey, red, green, blue, channels: tl.constexpr):
    """One operation of the jitter; those on colours leave one channel as it is."""
    if number == 0:
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif number == 1:
        red = _blend(mean_grey, red, factor)
        green = _blend(mean_grey, green, factor)
        blue = _blend(mean_grey, blue, factor)
    if channels == 3:
        if number == 2:
            grey = _grey_of(red, green, blue)
            red = _blend(grey, red, factor)
            green = _blend(grey, green, factor)
            blue = _blend(grey, blue, factor)
        elif number == 3:
            red, green, blue = _turn(factor, red, green, blue)
    return red, green, blue


@triton.jit
def _load(at, pixel, strides, size: tl.constexpr, channels: tl.constexpr, white: tl.constexpr):
    """A block of pixels in [0, 1]; a single channel comes three times."""
    at += (pixel // size).to(tl.int64) * strides[1] + (pixel % size).to(tl.int64) * strides[2]
    inside = pixel < size * size
    red = tl.div_rn(tl.load(at, mask=inside, other=0).to(tl.float32), white)
    green, blue = red, red
    if channels == 3:
        at += strides[0]
        green = tl.div_rn(tl.load(at, mask=inside, other=0).to(tl.float32), white)
        at += strides[0]
        blue = tl.div_rn(tl.load(at, mask=inside, other=0).to(tl.float32), white)
    return red, green, blue


@triton.jit
def _jitter(order, factor, first, mean_grey, red, green, blue, channels: tl.constexpr):
    """The first so many operations of a row's order."""
    for position in range(first):
        number = tl.load(order + position).to(tl.int32)
        amount = tl.load(factor + tl.maximum(number, 0))
        red, green, blue = _operate(number, amount, mean_grey, red, green, blue, channels)
    return red, green, blue


@triton.jit
def _mean_grey(
    at,
    strides,
    order,
    factor,
    size: tl.constexpr,
    channels: tl.constexpr,
    white: tl.constexpr,
    block: tl.constexpr,
):
    """The mean grey of a row where its contrast is changed; 0 where it is not."""
    place = 4
    for position in tl.static_range(4):
        place = tl.where(tl.load(order + position) == 1, position, place)
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, tl.where(place < 4, size * size, 0), block):
        pixel = start + tl.arange(0, block)
        red, green, blue = _load(at, pixel, strides, size, channels, white)
        red, green, blue = _jitter(order, factor, place, 0.0, red, green, blue, channels)
        # Beyond the view all is black, and stays so until contrast: it adds nothing.
        total += _grey_of(red, green, blue) if channels == 3 else red
    return tl.sum(total, 0) / (size * size)


@triton.jit(do_not_specialize=("n_images", "n_views"))
def colour_row(
    images,
    out,
    order,
    factor,
    is_grey,
    is_solarised,
    n_images,
    n_views,
    stride_image,
    stride_view,
    strides,
    mean,
    std,
    size: tl.constexpr,
    channels: tl.constexpr,
    white: tl.constexpr,
    finish: tl.constexpr,
    block: tl.constexpr,
):
    """Kernel: the colours of one row; pointers that are None have no operation."""
    row = tl.program_id(0)
    view, image = row // n_images, row % n_images
    choice = (image * n_views + view).to(tl.int64)
    at = images + image.to(tl.int64) * stride_image + view.to(tl.int64) * stride_view
    out += row.to(tl.int64) * size * size * channels
    if order is not None:
        order += 4 * choice
        factor += 4 * choice
        mean_grey = _mean_grey(at, strides, order, factor, size, channels, white, block)
    for start in range(0, size * size, block):
        pixel = start + tl.arange(0, block)
        red, green, blue = _load(at, pixel, strides, size, channels, white)
        if order is not None:
            red, green, blue = _jitter(order, factor, 4, mean_grey, red, green, blue, channels)
        if is_grey is not None:
            greyed = tl.load(is_grey + choice) != 0
            grey = _grey_of(red, green, blue)
            red = tl.where(greyed, grey, red)
            green = tl.where(greyed, grey, green)
            blue = tl.where(greyed, grey, blue)
        if is_solarised is not None:
            inverted = tl.load(is_solarised + choice) != 0
            red = tl.where(inverted & (red >= 0.5), 1.0 - red, red)
            green = tl.where(inverted & (green >= 0.5), 1.0 - green, green)
            blue = tl.where(inverted & (blue >= 0.5), 1.0 - blue, blue)
        if finish:
            red = (red - mean[0]) / std[0]
            green = (green - mean[1]) / std[1]
            blue = (blue - mean[2]) / std[2]
        inside = pixel < size * size
        tl.store(out + pixel * channels, red, mask=inside)
        if channels == 3:
            tl.store(out + pixel * channels + 1, green, mask=inside)
            tl.store(out + pixel * channels + 2, blue, mask=inside)


def colour_rows_on_gpu(
    images: Tensor, table: dict[str, Any], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Jitters and greys crops; where none is to be blurred, also solarises and normalises them.

    Each row has the jitter's four operations in its own order, clamped after each. Contrast needs the
    row's mean grey at that point: a first pass over the row's pixels does what comes before.

    Args:
        images: (B, V, C, S, S) uint8, or float in [0, 1], of any strides; C is 1 or 3.
        table: from `Augment.draw`, its arrays as tensors on the same device; "factor", "order", "grey"
            and "solarise" are read. Where it has "sigma" the caller blurs, solarises and normalises.
        mean: subtracted from each channel at the end; a single number serves all channels.
        std: divides each channel after that.

    Returns:
        (V*B, C, S, S) float32, channels last in memory, all of view 0 first.
    """
    n_images, n_views, channels, size, _ = images.shape
    assert channels in (1, 3)
    finish = "sigma" not in table
    used = ["order", "factor"] + ["grey"] * (channels == 3) + ["solarise"] * finish
    given = {name: table[name].contiguous() for name in used if name in table}
    # As bytes: they are 0 or 1.
    flags = {name: given[name].view(torch.uint8) for name in ("grey", "solarise") if name in given}
    numbers = [tuple(float(v[c % len(v)]) for c in range(3)) for v in (mean, std)]
    out = images.new_empty((n_images * n_views, size, size, channels), dtype=torch.float32)
    with torch.cuda.device_of(images):
        colour_row[(len(out),)](
            images,
            out,
            given.get("order"),
            given.get("factor"),
            flags.get("grey"),
            flags.get("solarise"),
            n_images,
            n_views,
            *images.stride()[:2],
            images.stride()[2:],
            *numbers,
            size=size,
            channels=channels,
            white=1.0 if images.is_floating_point() else 255.0,
            finish=finish,
            block=min(_BLOCK, triton.next_power_of_2(size * size)),
            **_OPTIONS,
        )
    return out.permute(0, 3, 1, 2)
