"""The embedded digits: the same images for ever."""

import hashlib

import numpy as np
import torch
from pictures import opened, pixels_of

from simclr_pl.data import Digits
from simclr_pl.data.sources import ResidentImages


def test_digits_have_1347_and_450_grey_images_of_32_pixels_in_all_classes() -> None:
    digits = opened(Digits())
    assert digits.channels == 1
    assert digits.bank is digits.train
    for images, count in ((digits.train, 1347), (digits.query, 450)):
        assert isinstance(images, ResidentImages)
        assert len(images) == count
        assert images.pixels.shape == (count, 1, 32, 32)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == np.int64
        assert np.bincount(images.labels).min() > 0.05 * count
        assert images.labels.max() == 9


def test_digits_are_the_same_for_ever() -> None:
    # A change of these pixels makes every published number on them void.
    digits = opened(Digits())
    digest = hashlib.sha256()
    for images in (digits.train, digits.query):
        digest.update(images.pixels.numpy().tobytes())
        digest.update(images.labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "256edd4b207969c26119550940d35f3a271bf65075cebb6f9c188182a3940ee4"


def test_digits_do_not_depend_on_random_state_and_are_drawn_anew_each_time() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the global state is the point)
    first = opened(Digits())
    torch.manual_seed(6)
    np.random.seed(6)  # noqa: NPY002
    again = opened(Digits())
    for name in ("train", "query"):
        one, other = getattr(first, name), getattr(again, name)
        assert torch.equal(one.pixels, other.pixels)
        assert np.array_equal(one.labels, other.labels)
        assert one.pixels.data_ptr() != other.pixels.data_ptr()


def test_digit_splits_share_no_image() -> None:
    digits = opened(Digits())
    train, query = ({p.tobytes() for p in pixels_of(s)} for s in (digits.train, digits.query))
    assert len(train) == 1347  # no image twice
    assert len(query) == 450
    assert not train & query


def test_digits_lie_at_every_place_of_a_noisy_canvas() -> None:
    pixels = opened(Digits()).train.pixels[:, 0].float()
    centre = (pixels > 128).float()  # above all noise
    rows = (centre.sum((0, 2)) > 0).nonzero()[:, 0]
    columns = (centre.sum((0, 1)) > 0).nonzero()[:, 0]
    assert (rows.min(), rows.max()) == (0, 31)
    assert columns.min() <= 2
    assert columns.max() >= 29
    corner = pixels[:, 0, 0][pixels[:, 0, 0] <= 77]
    assert 0.25 * 255 < corner.max() <= 0.3 * 255 + 0.5
    assert abs(corner.mean() - 0.15 * 255) < 2
