"""Compiled crops against Pillow, to the bit, and against the filter's definition."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr_pl.augment import Augment
from simclr_pl.crop_kernels import crop_rows, resize


@cache
def photographs() -> tuple[np.ndarray, np.ndarray]:
    """A temple and a flower, (427, 640, 3)."""
    temple, flower = load_sample_images().images
    return temple, flower


def by_pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear, along the rows first, whatever order its version prefers."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    for size in ((width, image.height), (width, height)):
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def by_definition(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The triangle filter in float64, widened when shrinking, normalised at the border."""

    def weights(length: int, size: int) -> np.ndarray:
        scale = length / size
        distance = np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale
        table = np.maximum(0.0, 1 - np.abs(distance) / max(1.0, scale))
        return table / table.sum(1, keepdims=True)

    down, across = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("ih,hwc,jw->ijc", down, pixels.astype(np.float64), across)


# Sides for an image of 60 x 70: both shrink, both grow, one of each, none, and down to one pixel.
SIDES = [
    (31, 17),
    (90, 111),
    (17, 99),
    (99, 17),
    (60, 70),
    (60, 20),
    (20, 70),
    (3, 3),
    (1, 1),
    (61, 71),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_noise_is_resized_to_the_bits_of_pillow(sides: tuple[int, int], channels: int) -> None:
    pixels = noise(0, 60, 70, channels)
    found = resize(pixels, *sides)
    assert found.dtype == np.uint8
    assert np.array_equal(found, by_pillow(pixels, *sides))
    assert np.array_equal(resize(pixels, *sides, flip=True), found[:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_noise_is_resized_within_1_of_the_triangle_filter_in_float64(
    sides: tuple[int, int], channels: int
) -> None:
    pixels = noise(0, 60, 70, channels)
    error = np.abs(resize(pixels, *sides) - by_definition(pixels, *sides)).max()
    assert error <= 1 + 1e-9  # a half for each axis


def test_photographs_are_resized_to_the_bits_of_pillow_at_every_ratio() -> None:
    for photograph in photographs():
        for ratio in np.geomspace(0.4, 200, 40):
            sides = max(1, round(427 / ratio)), max(1, round(640 / ratio))
            assert np.array_equal(resize(photograph, *sides), by_pillow(photograph, *sides)), ratio


@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_crops_of_simclr_are_those_of_pillow_in_one_step_within_1(size: int) -> None:
    # Pillow 13 may filter along the columns first; that rounds otherwise, by 1 at most.
    photograph = photographs()[0]
    crops = Augment(size).draw_crops(0, 0, np.arange(20), 2, np.full(20, 427), np.full(20, 640))
    for top, left, height, width, flipped in crops.reshape(-1, 5).tolist():
        part = photograph[top : top + height, left : left + width]
        image = Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)
        expected = np.asarray(image).astype(int)
        found = resize(part, size, size, bool(flipped)).astype(int)
        assert np.abs(found - (expected[:, ::-1] if flipped else expected)).max() <= 1


def test_black_and_white_stay_so() -> None:
    for value in (0, 255):
        for sides in SIDES:
            assert (resize(np.full((60, 70, 3), value, np.uint8), *sides) == value).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(20, 30), (50, 70), (80, 40)])
def test_a_slice_is_resized_into_the_place_it_is_given(
    sides: tuple[int, int], channels: int
) -> None:
    whole = noise(0, 80, 90, channels)
    part = whole[11:61, 7:77]
    assert not part.flags.c_contiguous
    batch = np.full((3, *sides, channels), 7, np.uint8)
    returned = resize(part, *sides, out=batch[1])
    assert np.shares_memory(returned, batch)
    assert np.array_equal(batch[1], by_pillow(part.copy(), *sides))
    assert (batch[[0, 2]] == 7).all()
    assert np.array_equal(whole, noise(0, 80, 90, channels))


def test_images_of_many_sizes_do_not_disturb_each_other_in_many_threads() -> None:
    sizes = [(60, 70), (9, 200), (150, 8), (61, 33)] * 25
    images = [noise(i, *size) for i, size in enumerate(sizes)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda image: resize(image, 40, 30), images))
    for image, one in zip(images, found, strict=True):
        assert np.array_equal(one, by_pillow(image, 40, 30))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 31, 64])
def test_a_batch_of_crops_equals_resizing_one_by_one(
    size: int, channels: int, threads: int
) -> None:
    sides = np.array([(37, 53), (90, 41), (8, 150), (37, 53)])
    images = [noise(i, *pair, channels) for i, pair in enumerate(sides.tolist())]
    flat = np.concatenate([image.reshape(-1, channels) for image in images])
    start = sides.prod(1).cumsum() - sides.prod(1)
    index = np.array([3, 0, 0, 2, 1])
    crops = Augment(size).draw_crops(0, 0, index, 3, *sides[index].T)
    crops[1, 0] = [0, 0, 37, 53, 1]
    crops[2, 1] = [36, 52, 1, 1, 0]
    crops[3, 0] = [0, 0, 8, 150, 0]
    crops[4, 2] = [83, 28, 7, 13, 1]
    out = np.empty((5, 3, size, size, channels), np.uint8)
    torch.set_num_threads(threads)
    crop_rows(flat, start, sides, index, crops, out)
    for b in range(5):
        for v, (top, left, height, width, flipped) in enumerate(crops[b].tolist()):
            part = images[index[b]][top : top + height, left : left + width]
            expected = by_pillow(part.copy(), size, size)
            assert np.array_equal(out[b, v], expected[:, ::-1] if flipped else expected)
