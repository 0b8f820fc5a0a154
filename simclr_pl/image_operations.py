"""The operations of the augmentation: pure functions on batches, with parameters for each image.

Symbols: B images, V views, C channels, H x W pixels of an image, P pixels of many images, S side of a
view, n any number of images. Images are float in [0, 1] unless said otherwise.

Nothing here waits for the device: no number is read back, and which rows an operation concerns is
known on the host before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHERED = 2**24  # pixels gathered at once, by 8 bytes of index each
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's; ITU-R 601-2


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [0, 1]."""
    return images.float().div_(255)


def crop_resize(pixels: Tensor, crops: Tensor, size: int) -> Tensor:
    """Crops, flips and resizes whole batches, bilinear with antialiasing, as PIL does.

    Each axis is one small matrix product; where the crop is larger than the view the triangle filter
    widens by the same factor, and no pixel outside the crop is used.

    Args:
        pixels: (B, C, H, W) uint8.
        crops: (B, V, 5) integers from `Augment.draw_crops`, on the same device.
        size: S.

    Returns:
        (B, V, C, S, S) uint8, within 1 of PIL's crop and resize.
    """
    top, left, height, width, flip = crops.to(torch.float32).unbind(-1)  # (B, V) each
    n_images, channels, full_height, full_width = pixels.shape
    down = _resize_weights(top, height, size, full_height)  # (B, V, S, H)
    across = _resize_weights(left, width, size, full_width)  # (B, V, S, W)
    across = torch.where(flip[..., None, None] > 0, across.flip(2), across)
    # All channels and views in one product each: with C between the rows and the columns no
    # transposition comes between the two, and the matrices are as large as they can be.
    x = pixels.permute(0, 2, 1, 3).float().reshape(n_images, full_height, -1)  # (B, H, C*W)
    x = down.flatten(1, 2) @ x  # (B, V*S, C*W)
    x = x.view(*across.shape[:2], size * channels, full_width) @ across.mT  # (B, V, S*C, S)
    x = x.add_(0.5).to(torch.uint8)  # rounds; means of pixels are in [0, 255]
    return x.view(*across.shape[:2], size, channels, size).transpose(2, 3)  # (B, V, C, S, S)


def crop_resize_mixed(
    flat: Tensor,
    start: Tensor,
    width: Tensor,
    crops: Tensor,
    size: int,
    largest: tuple[int, int],
) -> Tensor:
    """`crop_resize` of images that differ in size, which lie one behind the other.

    Each crop is gathered by itself, padded to the largest one.

    Args:
        flat: (P, C) uint8, the pixels of the images, row by row.
        start: (B,) int64, the first pixel of each image in ``flat``.
        width: (B,) int64 of each image, in pixels.
        crops: (B, V, 5) int64 from `Augment.draw_crops`, on the same device.
        size: S.
        largest: height and width of the largest crop, known on the host, in pixels.

    Returns:
        (B, V, C, S, S) uint8, within 1 of PIL's crop and resize.
    """
    n_views = crops.shape[1]
    start, width = (x.repeat_interleave(n_views)[:, None] for x in (start, width))  # (B*V, 1)
    rows = crops.flatten(0, 1)
    at_once = max(1, _GATHERED // (largest[0] * largest[1]))
    parts = zip(start.split(at_once), width.split(at_once), rows.split(at_once), strict=True)
    views = torch.cat([_crop_gathered(flat, *part, size, largest) for part in parts])
    return views.view(-1, n_views, *views.shape[1:])


def _crop_gathered(
    flat: Tensor, start: Tensor, width: Tensor, crops: Tensor, size: int, largest: tuple[int, int]
) -> Tensor:
    """Some rows (n, ...) of `crop_resize_mixed`: (n, C, S, S)."""
    top, left, height, across, _ = crops[..., None].unbind(1)  # (n, 1) each
    y, x = (torch.arange(side, device=flat.device) for side in largest)
    # The padding shows the last row and column: any pixel would do, for it has no weight.
    down = start + (top + torch.minimum(y, height - 1)) * width  # (n, H)
    pixel = down[:, :, None] + (left + torch.minimum(x, across - 1))[:, None]  # (n, H, W)
    corner = torch.cat([torch.zeros_like(crops[:, :2]), crops[:, 2:]], 1)
    return crop_resize(flat[pixel].permute(0, 3, 1, 2), corner[:, None], size)[:, 0]


def _resize_weights(start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
    """Weights (..., S, full) of every input pixel in every output pixel along one axis."""
    scale = (length / size)[..., None, None]
    start, length = start[..., None, None], length[..., None, None]
    out = torch.arange(size, device=start.device, dtype=start.dtype)
    centre = start + (out[:, None] + 0.5) * scale  # (..., S, 1)
    pixel = torch.arange(full, device=start.device, dtype=start.dtype) + 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(-1, keepdim=True)


def rotate_shift(x: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Rotates about the centre, then shifts; bilinear, black outside.

    Args:
        x: (n, C, S, S).
        angle: (n,) degrees, clockwise.
        shift: (n, 2) pixels to the right and down.

    Returns:
        (n, C, S, S), as torchvision's `affine` with scale 1 and no shear.
    """
    radians = torch.deg2rad(angle)
    cos, sin = radians.cos(), radians.sin()
    right, down = (shift * (2 / x.shape[-1])).unbind(1)  # in affine_grid's units: the side is 2
    # The grid maps output to input: undo the shift, then the rotation.
    theta = torch.stack(
        [cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down], 1
    ).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """RGB (n, 3, S, S) to grey in three equal channels."""
    red, green, blue = _GREY_WEIGHTS
    y = (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)
    return y.expand_as(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies (n, C, S, S) by ``factor`` (n,), clamped to [0, 1]."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Moves (n, C, S, S) from its mean grey value by ``factor`` (n,), clamped to [0, 1]."""
    luminance = grey(x)[:, :1] if x.shape[1] == 3 else x
    mean = luminance.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Moves RGB (n, 3, S, S) from its grey by ``factor`` (n,), clamped to [0, 1]."""
    if x.shape[1] != 3:
        return x
    return torch.lerp(grey(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue of RGB (n, 3, S, S) by ``factor`` (n,) turns.

    The hue is that of HSV; the way back is f(k) = v - v s max(0, min(k, 4 - k, 1)) with
    k = (5, 3, 1) + 6 hue mod 6 for red, green, blue.
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(1)  # (n, S, S)
    # Not x.max(1): on the CPU it takes ten times as long as all the rest.
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = spread.clamp(min=1e-20).reciprocal_()  # without spread the hue has no effect
    sixth = torch.where(  # hue in sixths of a turn, where red leads; else green, else blue
        red == value,
        (green - blue).mul_(inverse),
        torch.where(
            green == value,
            (blue - red).mul_(inverse).add_(2),
            (red - green).mul_(inverse).add_(4),
        ),
    ).add_(6 * factor[:, None, None])
    k = torch.stack([sixth + 5, sixth + 3, sixth + 1], 1)  # (n, 3, S, S)
    k -= (k / 6).floor_().mul_(6)  # a third of the cost of `remainder`
    drop = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value[:, None], spread[:, None], drop, value=-1)


def jitter_colour(
    x: Tensor, factor: Tensor, rows: Tensor, counts: Sequence[Sequence[int]]
) -> Tensor:
    """Applies the four jitter operations, to each image in its own order.

    Args:
        x: (n, C, S, S).
        factor: (n, 4) of brightness, contrast, saturation and hue.
        rows: (4, n) int64, for each position in the order the images sorted by their operation.
        counts: for each position, how many images have each operation there; the images beyond
            their sum have none.

    Returns:
        (n, C, S, S).
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    x = x.clone()
    for sorted_rows, numbers in zip(rows, counts, strict=True):
        start = 0
        for column, (operation, number) in enumerate(zip(operations, numbers, strict=True)):
            some = sorted_rows[start : start + number]
            if number:
                x.index_copy_(0, some, operation(x[some], factor[some, column]))
            start += number
    return x


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur with reflected borders.

    Args:
        x: (n, C, S, S), S > radius.
        sigma: (n,) standard deviations, in pixels, > 0.
        radius: the window is 2 * radius + 1 pixels at most; it ends at 3 sigma.

    Returns:
        (n, C, S, S), as torchvision's `gaussian_blur` but for its tails: with the paper's window and
        sigma <= 2 that is 0.13/255 at a straight edge, and 0.52/255 in an image made to show it.
    """
    offset = torch.arange(radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # (n, radius + 1), one half
    kernel = kernel * (offset <= (3 * sigma[:, None]).ceil())
    kernel = kernel / (2 * kernel.sum(1) - kernel[:, 0])[:, None]
    weights = kernel[..., None, None, None]
    for _ in range(2):  # along the width, then, transposed, along the height
        padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
        width = x.shape[3]
        x = x * weights[:, 0]
        for t in range(1, radius + 1):  # sums of shifted copies: a depthwise convolution costs more
            pair = padded[..., radius - t :][..., :width] + padded[..., radius + t :][..., :width]
            x = x.addcmul_(pair, weights[:, t])
        x = x.transpose(2, 3)
    return x
