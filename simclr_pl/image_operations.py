"""The operations of the augmentation: pure functions on batches, with parameters for each image.

Symbols: B images, V views, C channels, H x W pixels of an image, S side of a view, n any number of
images. Images are float in [0, 1] unless said otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    down = _resize_weights(top, height, size, pixels.shape[2])  # (B, V, S, H)
    across = _resize_weights(left, width, size, pixels.shape[3])  # (B, V, S, W)
    across = torch.where(flip[..., None, None] > 0, across.flip(2), across)
    x = pixels[:, None].float() @ across.transpose(2, 3)[:, :, None]  # (B, V, C, H, S)
    x = down[:, :, None] @ x  # (B, V, C, S, S)
    return x.round_().clamp_(0, 255).to(torch.uint8)


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
    weights = x.new_tensor(_GREY_WEIGHTS)
    return torch.einsum("nchw,c->nhw", x, weights)[:, None].expand_as(x)


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
    value, brightest = x.max(1)
    spread = value - x.min(1).values
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    sixth = torch.where(  # hue in sixths of a turn, where red leads; else green, else blue
        brightest == 0,
        (green - blue) / safe,
        torch.where(brightest == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = torch.where(spread > 0, sixth, torch.zeros_like(sixth)) + 6 * factor[:, None, None]
    k = torch.remainder(sixth[:, None] + x.new_tensor([5.0, 3.0, 1.0])[:, None, None], 6)
    drop = torch.minimum(k, 4 - k).clamp_(0, 1)  # (n, 3, S, S)
    return value[:, None] - spread[:, None] * drop


def jitter_colour(x: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """Applies the four jitter operations, to each image in its own order.

    Args:
        x: (n, C, S, S).
        factor: (n, 4) of brightness, contrast, saturation and hue.
        order: (n, 4), row i lists the operations (0 to 3) for image i in order; -1 is none.

    Returns:
        (n, C, S, S).
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    x = x.clone()
    for position in range(order.shape[1]):
        for number, operation in enumerate(operations):
            some = (order[:, position] == number).nonzero()[:, 0]
            if len(some):
                x[some] = operation(x[some], factor[some, number])
    return x


def blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur with reflected borders.

    Args:
        x: (n, C, S, S), S > radius.
        sigma: (n,) standard deviations, in pixels, > 0.
        radius: the window is 2 * radius + 1 pixels.

    Returns:
        (n, C, S, S), as torchvision's `gaussian_blur` with that window.
    """
    offset = torch.arange(radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)  # (n, radius + 1), one half
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
