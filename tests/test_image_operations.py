"""The batched image operations against torchvision and PIL, image by image."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from simclr_pl import image_operations
from simclr_pl.image_operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    crop_resize,
    crop_resize_mixed,
    grey,
    jitter_colour,
    rotate_shift,
    to_float,
)

# In the order of `jitter_colour`: ours, torchvision's, factors.
COLOUR = {
    "brightness": (adjust_brightness, tvf.adjust_brightness, [0.0, 0.2, 1.0, 1.3, 1.8]),
    "contrast": (adjust_contrast, tvf.adjust_contrast, [0.0, 0.2, 1.0, 1.3, 1.8]),
    "saturation": (adjust_saturation, tvf.adjust_saturation, [0.0, 0.2, 1.0, 1.3, 1.8]),
    "hue": (adjust_hue, tvf.adjust_hue, [-0.5, -0.17, 0.0, 0.2, 0.5]),
}


def corner_colours() -> Tensor:
    """(3, 25, 5): every colour of a 5x5x5 lattice: greys, black, white, pure hues and ties."""
    levels = torch.linspace(0, 1, 5)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(3, 25, 5)


def images_for(kind: str, n: int = 5) -> Tensor:
    return {
        "colour": torch.rand(n, 3, 13, 17),
        "one pixel": torch.rand(n, 3, 1, 1),
        "one channel": torch.rand(n, 1, 9, 7),
        "greys": torch.rand(n, 1, 9, 7).expand(-1, 3, -1, -1),
        "black and white": (torch.rand(n, 1, 9, 7) > 0.5).float().expand(-1, 3, -1, -1),
        "lattice": corner_colours().expand(n, -1, -1, -1),
    }[kind]


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", COLOUR)
@pytest.mark.parametrize(
    "kind", ["colour", "one pixel", "one channel", "greys", "black and white", "lattice"]
)
def test_colour_operation_matches_torchvision(name: str, kind: str) -> None:
    ours, theirs, factors = COLOUR[name]
    x = images_for(kind)
    before = x.clone()
    expected = torch.stack([theirs(i, f) for i, f in zip(x, factors, strict=True)])
    assert_near(ours(x, torch.tensor(factors)), expected, 1e-5)
    assert torch.equal(x, before)  # the input stays


def test_hue_matches_torchvision_on_every_lattice_colour_and_turn() -> None:
    factors = torch.linspace(-0.5, 0.5, 25)
    x = images_for("lattice", 25)
    expected = torch.stack([tvf.adjust_hue(i, f) for i, f in zip(x, factors.tolist(), strict=True)])
    assert_near(adjust_hue(x, factors), expected, 1e-5)


@pytest.mark.parametrize("kind", ["colour", "greys", "lattice"])
def test_grey_matches_torchvision(kind: str) -> None:
    x = images_for(kind)
    assert_near(grey(x), tvf.rgb_to_grayscale(x, num_output_channels=3), 1e-6)


def test_to_float_divides_every_byte_by_255() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert to_float(x).flatten().tolist() == torch.tensor([i / 255 for i in range(256)]).tolist()


def rows_of(order: list[tuple[int, ...]]) -> tuple[Tensor, list[list[int]]]:
    """For each position, the images by their operation there, the untouched last; and how many."""
    rows, counts = [], []
    for position in range(4):
        have = [[i for i, own in enumerate(order) if own[position] == k] for k in (0, 1, 2, 3, -1)]
        rows.append([i for images in have for i in images])
        counts.append([len(images) for images in have[:4]])
    return torch.tensor(rows), counts


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_applies_each_image_s_own_order(channels: int) -> None:
    order = [*ORDERS, (-1,) * 4, (2, -1, 0, -1)]
    x = torch.rand(len(order), channels, 11, 8)
    factor = torch.rand(len(order), 4) * torch.tensor([2.0, 2, 2, 1]) - torch.tensor([0, 0, 0, 0.5])
    before = x.clone()
    theirs = [operation for _, operation, _ in COLOUR.values()]
    expected = []
    for image, factors, numbers in zip(x, factor.tolist(), order, strict=True):
        for number in numbers:
            if number >= 0:
                image = theirs[number](image, factors[number])
        expected.append(image)
    jittered = jitter_colour(x, factor, *rows_of(order))
    assert_near(jittered, torch.stack(expected), 1e-5)
    assert torch.equal(jittered[24], x[24])  # -1 is untouched to the bit
    assert torch.equal(x, before)


def test_jitter_orders_differ_from_each_other() -> None:
    x = torch.rand(1, 3, 11, 8).expand(24, -1, -1, -1)
    factor = torch.tensor([1.7, 1.6, 0.3, 0.2]).expand(24, -1)
    jittered = jitter_colour(x, factor, *rows_of(ORDERS))
    assert torch.pdist(jittered.flatten(1)).min() > 1e-3


def steps_and_noise(size: int) -> Tensor:
    """(4, 3, S, S): noise, black-and-white noise, a step edge and thin lines."""
    x = torch.zeros(4, 3, size, size)
    x[0] = torch.rand(3, size, size)
    x[1] = (torch.rand(size, size) > 0.5).float()
    x[2, :, :, size // 3 :] = 1
    x[3, :, :: size // 8] = 1
    return x


@pytest.mark.parametrize("sigmas", [(0.1, 0.5, 0.9, 1.2), (1.5, 1.8, 2.0, 2.0)])
def test_blur_of_radius_6_matches_the_papers_window_of_23_at_224_pixels(
    sigmas: tuple[float, ...],
) -> None:
    x = steps_and_noise(224)
    for images, own in ((x, sigmas), (x, sigmas[::-1])):
        expected = torch.stack(
            [tvf.gaussian_blur(i, [23, 23], [s, s]) for i, s in zip(images, own, strict=True)]
        )
        assert_near(blur(images, torch.tensor(own), 6), expected, 0.5 / 255)


def gaussian_taps(sigma: float, radius: int) -> np.ndarray:
    """(23,) float64, zero beyond the radius."""
    offset = np.arange(-11, 12)
    taps = np.exp(-0.5 * (offset / sigma) ** 2) * (np.abs(offset) <= radius)
    return taps / taps.sum()


def test_blur_differs_from_the_papers_by_at_most_half_a_level() -> None:
    # Both kernels sum to 1: no image within [0, 1] shows more than the sum of what one has and the
    # other lacks, and an image that is 1 there and 0 elsewhere shows that much, at its centre.
    shown, bounds = [], []
    for sigma in np.linspace(0.1, 2, 39).tolist():
        whole, ours = gaussian_taps(sigma, 11), gaussian_taps(sigma, min(6, math.ceil(3 * sigma)))
        difference = np.outer(whole, whole) - np.outer(ours, ours)
        bounds.append(np.maximum(difference, 0).sum())
        x = torch.from_numpy(difference > 0).float()[None, None]
        own = blur(x, torch.tensor([sigma]), 6) - tvf.gaussian_blur(x, [23, 23], [sigma, sigma])
        shown.append(own.abs()[0, 0, 11, 11].item())
    np.testing.assert_allclose(shown, bounds, rtol=0, atol=1e-6)
    assert max(bounds) * 255 == pytest.approx(0.522, abs=1e-3)


def test_blur_differs_from_the_papers_by_an_eighth_of_a_level_at_an_edge() -> None:
    x = torch.zeros(20, 1, 64, 64)
    x[..., 30:] = 1
    sigma = torch.linspace(0.1, 2, 20)
    expected = torch.cat([tvf.gaussian_blur(x[:1], [23, 23], [s, s]) for s in sigma.tolist()])
    assert (blur(x, sigma, 6) - expected).abs().max() * 255 == pytest.approx(0.131, abs=1e-3)


@pytest.mark.parametrize(
    ("radius", "size"), [(1, (2, 5)), (1, (32, 32)), (3, (7, 4)), (6, (9, 31))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_matches_torchvision_with_a_window_of_3_sigma(
    radius: int, size: tuple[int, int], channels: int
) -> None:
    sigma = torch.tensor([0.1, 0.4, 1.1, 2.0, 5.0])
    x = torch.rand(5, channels, *size)
    before = x.clone()
    expected = []
    for image, s in zip(x, sigma.tolist(), strict=True):
        window = 2 * min(radius, math.ceil(3 * s)) + 1
        expected.append(tvf.gaussian_blur(image, [window, window], [s, s]))
    assert_near(blur(x, sigma, radius), torch.stack(expected), 1e-6)
    assert torch.equal(x, before)


def test_blur_takes_images_that_are_not_contiguous_and_none_at_all() -> None:
    base = torch.rand(12, 10, 3, 6)
    views = [
        base.permute(3, 2, 0, 1),
        base.permute(3, 2, 1, 0)[..., ::2],
        torch.rand(1, 3, 7, 9).expand(4, -1, -1, -1),
    ]
    for x in views:
        sigma = torch.linspace(0.3, 2, len(x))
        assert not x.is_contiguous()
        assert torch.equal(blur(x, sigma, 2), blur(x.contiguous(), sigma, 2))
    assert blur(base[:0], torch.empty(0), 2).shape == (0, 10, 3, 6)


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_rotate_shift_matches_torchvision_affine(size: int, channels: int) -> None:
    angle = [0.0, 0.0, 10.0, -37.5, 90.0, 180.0, 251.0]
    shift = [[0.0, 0.0], [2.0, -3.0], [0.0, 0.0], [1.25, 3.5], [0.0, 2.0], [-4.3, 0.1], [90.0, 0.0]]
    x = torch.rand(len(angle), channels, size, size)
    expected = torch.stack(
        [
            tvf.affine(image, a, list(s), 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
            for image, a, s in zip(x, angle, shift, strict=True)
        ]
    )
    assert_near(rotate_shift(x, torch.tensor(angle), torch.tensor(shift)), expected, 1e-4)
    assert expected[6].abs().max() == 0  # shifted out of sight: black


def pil_crop_resize(pixels: Tensor, crop: list[int], size: int) -> Tensor:
    """(C, H, W) uint8 to (C, S, S) uint8."""
    top, left, height, width, flipped = crop
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = torch.from_numpy(np.array(image))
    return out[None] if out.dim() == 2 else out.permute(2, 0, 1)


def border_crops(height: int, width: int) -> list[list[int]]:
    """Crops that touch each border, each corner, none and all, of odd shapes, and single pixels."""
    h, w = height // 3, width // 2
    boxes = [(top, left, h, w) for top in (0, 5, height - h) for left in (0, 3, width - w)]
    boxes += [(0, 0, height, width), (1, 0, height - 2, width), (0, 2, height, width - 3)]
    boxes += [(0, 0, 1, 1), (height - 1, width - 1, 1, 1), (4, 0, 1, width), (0, 6, height, 1)]
    return [[*box, flipped] for box in boxes for flipped in (0, 1)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("full", "size"),
    [
        ((31, 47), 64),  # enlarges every crop
        ((97, 61), 11),  # shrinks most
        ((40, 40), 40),  # both, and the whole image stays as it is
        ((150, 20), 24),  # shrinks along one axis, enlarges along the other
    ],
)
def test_crop_resize_is_within_one_level_of_pil(
    full: tuple[int, int], size: int, channels: int
) -> None:
    noise = torch.randint(0, 256, (channels, *full), dtype=torch.uint8)
    checks = (torch.arange(full[0])[:, None] + torch.arange(full[1])).remainder(2) * 255
    pixels = torch.stack([noise, checks.to(torch.uint8).expand(channels, -1, -1)])
    crops = border_crops(*full)
    views = crop_resize(pixels, torch.tensor([crops, crops[::-1]]), size)
    assert views.shape == (2, len(crops), channels, size, size)
    assert views.dtype == torch.uint8
    for own, image, order in zip(views, pixels, (crops, crops[::-1]), strict=True):
        expected = torch.stack([pil_crop_resize(image, crop, size) for crop in order])
        assert (own.int() - expected.int()).abs().max() <= 1


def test_crop_resize_of_the_whole_image_at_its_own_size_is_the_identity() -> None:
    pixels = torch.randint(0, 256, (3, 3, 21, 21), dtype=torch.uint8)
    crops = torch.tensor([[0, 0, 21, 21, 0], [0, 0, 21, 21, 1]]).expand(3, -1, -1)
    views = crop_resize(pixels, crops, 21)
    assert torch.equal(views[:, 0], pixels)
    assert torch.equal(views[:, 1], pixels.flip(3))


@pytest.mark.parametrize("at_once", [1, 5000, 2**24])  # pixels: a row each, some, all rows
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_images_of_mixed_sizes_are_those_of_each_alone(
    channels: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [(31, 47), (40, 40), (12, 90), (70, 9)]
    images = [torch.randint(0, 256, (channels, *pair), dtype=torch.uint8) for pair in sides]
    flat = torch.cat([image.permute(1, 2, 0).flatten(0, 1) for image in images])
    start = torch.tensor([height * width for height, width in sides]).cumsum(0)
    start, width = start - torch.tensor([h * w for h, w in sides]), torch.tensor(sides)[:, 1]
    crops = torch.tensor([border_crops(*pair) for pair in sides])  # (B, V, 5)
    index, largest = torch.tensor([2, 0, 3, 3, 1]), tuple(crops[..., 2:4].amax((0, 1)).tolist())
    monkeypatch.setattr(image_operations, "_GATHERED", at_once)
    views = crop_resize_mixed(flat, start[index], width[index], crops[index], 20, largest)
    for own, i in zip(views, index.tolist(), strict=True):
        expected = crop_resize(images[i][None], crops[i][None], 20)[0]
        assert own.dtype == torch.uint8
        assert (own.int() - expected.int()).abs().max() <= 1
        assert (own != expected).float().mean() < 1e-2  # ties of the rounding


def test_crop_resize_uses_no_pixel_outside_the_crop() -> None:
    inside = torch.randint(0, 256, (1, 3, 9, 14), dtype=torch.uint8)
    pixels = torch.stack([torch.zeros(3, 40, 40), torch.full((3, 40, 40), 255.0)]).to(torch.uint8)
    pixels[:, :, 10:19, 20:34] = inside
    for size in (4, 30):
        black, white = crop_resize(pixels, torch.tensor([[[10, 20, 9, 14, 0]]] * 2), size)
        assert torch.equal(black, white)
