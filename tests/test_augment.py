"""The augmentation's draws against torchvision's distributions, and its work image by image."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from simclr_pl.augment import Augment, digits, simclr_cifar, simclr_imagenet
from simclr_pl.errors import InputError

EVERYTHING: dict[str, Any] = {"rotation": 20.0, "shift": 0.2, "solarise": 0.3}
NOTHING: dict[str, Any] = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
MANY = np.arange(20_000)


def draw_crops(augment: Augment, n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, 5) crops of n images of one size."""
    sides = np.full(n, height), np.full(n, width)
    return augment.draw_crops(seed, 0, np.arange(n), 1, *sides)[:, 0]


def crop_statistics(crops: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    top, left, h, w = crops[:, :4].T
    return {
        "area share": h * w / (height * width),
        "ratio": w / h,
        "centre down": (top + h / 2) / height,
        "centre across": (left + w / 2) / width,
        "across minus down": left / width - top / height,
        "largest share of a side": np.maximum(h / height, w / width),
    }


@pytest.mark.parametrize(
    ("height", "width", "options", "fallback"),
    [
        (96, 96, {}, 0.0),
        (50, 75, {"crop_scale": (0.3, 0.9), "crop_ratio": (0.5, 1.5)}, 0.0),
        (60, 400, {}, 0.2),  # wide: often no attempt fits, and the crop is the central one
        (400, 60, {}, 0.2),  # tall
    ],
)
def test_crops_are_distributed_as_torchvision_s(
    height: int, width: int, options: dict[str, Any], fallback: float
) -> None:
    n = 4000
    augment = Augment(**options)
    ours = draw_crops(augment, n, height, width)
    image = torch.empty(1, height, width)
    scale, ratio = list(augment.crop_scale), list(augment.crop_ratio)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    expected = crop_statistics(theirs, height, width)
    for name, numbers in crop_statistics(ours, height, width).items():
        assert stats.ks_2samp(numbers, expected[name], method="asymp").pvalue > 1e-3, name
    central = RandomResizedCrop.get_params(image, [1.0, 1.0], ratio)  # nothing as large fits
    shares = [(crops[:, :4] == central).all(1).mean() for crops in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.04)
    assert shares[0] >= fallback  # the case does what it is here for


@pytest.mark.parametrize(("height", "width"), [(200, 3), (3, 200), (1, 500), (7, 31)])
def test_crop_without_a_fit_is_torchvision_s_central_one(height: int, width: int) -> None:
    scale, ratio = [1.0, 1.0], [0.9, 1.1]
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), scale, ratio)
    crops = draw_crops(Augment(crop_scale=(1, 1), crop_ratio=(0.9, 1.1)), 5, height, width)
    assert [tuple(crop) for crop in crops[:, :4].tolist()] == [tuple(expected)] * 5


def test_crops_lie_inside_images_of_any_size_and_reach_every_border() -> None:
    height, width = np.divmod(np.arange(1600), 40) + np.array([[1], [1]])
    crops = Augment().draw_crops(0, 0, np.arange(1600), 3, height, width)
    assert crops.shape == (1600, 3, 5)
    assert crops.dtype == np.int64
    top, left, h, w, _ = np.moveaxis(crops, -1, 0)
    assert min(top.min(), left.min()) == 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h <= height[:, None]).all()
    assert (left + w <= width[:, None]).all()
    partial = (h < height[:, None]) & (w < width[:, None])
    for touches in (top == 0, left == 0, top + h == height[:, None], left + w == width[:, None]):
        assert (touches & partial).any()


def share_is(events: np.ndarray, probability: float) -> bool:
    result = stats.binomtest(int(events.sum()), events.size, probability)
    return bool(result.pvalue > 0.01)


def uniform_within(numbers: np.ndarray, low: float, high: float) -> bool:
    assert low <= numbers.min()
    assert numbers.max() <= high
    return bool(stats.kstest(numbers, "uniform", (low, high - low)).pvalue > 0.01)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_operations_are_as_frequent_as_asked(p: float) -> None:
    augment = Augment(flip=p, jitter=p or 0.5, grey=p or 0.5, blur=p or 0.5, solarise=p or 0.5)
    table = augment.draw(1, 2, MANY, 1)
    assert share_is(draw_crops(augment, 20_000, 32, 32)[:, 4], p)
    events = {
        "jitter": (table["order"] >= 0).all(-1),
        "grey": table["grey"],
        "blur": table["sigma"] > 0,
        "solarise": table["solarise"],
    }
    for name, happened in events.items():
        assert share_is(happened, p or 0.5), name
    together = np.corrcoef([e[:, 0] for e in events.values()]) if p == 0.3 else np.eye(4)
    assert np.abs(together - np.eye(4)).max() < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_jitter_factors_are_uniform_over_the_papers_ranges(strength: float) -> None:
    factor = Augment(strength=strength).draw(0, 0, MANY, 1)["factor"][:, 0]
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    for operation in range(3):
        assert uniform_within(factor[:, operation], low - 1e-6, high + 1e-6)
    assert uniform_within(factor[:, 3], -0.2 * strength - 1e-6, 0.2 * strength + 1e-6)
    assert np.abs(np.corrcoef(factor.T) - np.eye(4)).max() < 4 / math.sqrt(20_000)


def test_jitter_orders_are_permutations_each_as_frequent() -> None:
    order = Augment(jitter=0.5).draw(0, 0, MANY, 1)["order"][:, 0]
    applied = order[order[:, 0] >= 0]
    assert (order[order[:, 0] < 0] == -1).all()
    assert (np.sort(applied, 1) == np.arange(4)).all()
    _, counts = np.unique(applied, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


def test_sigma_angle_and_shift_are_uniform_over_their_ranges() -> None:
    augment = Augment(size=50, blur=0.5, blur_sigma=(0.3, 1.5), rotation=12.0, shift=0.25)
    table = augment.draw(0, 0, MANY, 1)
    assert uniform_within(table["sigma"][table["sigma"] > 0], 0.3 - 1e-6, 1.5 + 1e-6)
    assert uniform_within(table["angle"][:, 0], -12, 12)
    for axis in (0, 1):
        assert uniform_within(table["shift"][:, 0, axis], -12.5, 12.5)  # a quarter of 50 pixels


def test_table_has_the_documented_shapes_and_types() -> None:
    table = Augment(**EVERYTHING).draw(0, 0, np.arange(5), 3)
    described = {name: (value.shape, value.dtype) for name, value in table.items()}
    assert described == {
        "angle": ((5, 3), np.float32),
        "shift": ((5, 3, 2), np.float32),
        "factor": ((5, 3, 4), np.float32),
        "order": ((5, 3, 4), np.int64),
        "grey": ((5, 3), np.bool_),
        "sigma": ((5, 3), np.float32),
        "solarise": ((5, 3), np.bool_),
    }


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"rotation": 0.0, "shift": 0.0}, {"angle", "shift"}),
        ({"rotation": 0.0}, set()),  # a shift alone needs both
        ({"jitter": 0.0}, {"factor", "order"}),
        ({"strength": 0.0}, {"factor", "order"}),
        ({"grey": 0.0}, {"grey"}),
        ({"blur": 0.0}, {"sigma"}),
        ({"solarise": 0.0}, {"solarise"}),
    ],
)
def test_disabled_operations_are_absent_and_change_no_other(
    options: dict[str, Any], missing: set[str]
) -> None:
    whole = Augment(**EVERYTHING).draw(0, 0, np.arange(5), 2)
    table = Augment(**{**EVERYTHING, **options}).draw(0, 0, np.arange(5), 2)
    assert table.keys() == whole.keys() - missing
    for name in table.keys() - {"angle"}:
        np.testing.assert_array_equal(table[name], whole[name])


def everything_drawn(index: np.ndarray, n_views: int, epoch: int = 4) -> dict[str, np.ndarray]:
    """The table, with crops and flips; images have sizes that depend on their index."""
    augment = Augment(**EVERYTHING)
    crops = augment.draw_crops(3, epoch, index, n_views, 40 + index % 7, 30 + index % 11)
    return {**augment.draw(3, epoch, index, n_views), "crop": crops[..., :4], "flip": crops[..., 4]}


def test_draws_of_a_sample_are_the_same_alone_in_any_batch_and_with_more_views() -> None:
    index = np.array([12, 5, 900_000, 0])
    batch = everything_drawn(index, 2)
    shuffled = everything_drawn(index[[2, 0, 3, 1]], 3)
    for name, value in batch.items():
        np.testing.assert_array_equal(shuffled[name][[1, 3, 0, 2], :2], value)
        for row, sample in enumerate(index):
            alone = everything_drawn(np.array([sample]), 2)
            np.testing.assert_array_equal(alone[name][0], value[row])


@pytest.mark.parametrize("name", everything_drawn(np.arange(1), 1))
def test_views_samples_and_epochs_get_draws_of_their_own(name: str) -> None:
    index = np.arange(50)
    value = everything_drawn(index, 2)[name]
    assert not np.array_equal(value[:, 0], value[:, 1])
    assert not np.array_equal(value, everything_drawn(index, 2, epoch=5)[name])
    assert not np.array_equal(value[:25], value[25:])


def torchvision_view(
    augment: Augment, image: Tensor, row: dict[str, Any], radius: int, channels: int
) -> Tensor:
    """One crop (C, S, S) uint8 to a view, by torchvision, in the documented order."""
    operations = (
        tvf.adjust_brightness,
        tvf.adjust_contrast,
        tvf.adjust_saturation,
        tvf.adjust_hue,
    )
    x = tvf.to_dtype(image, torch.float32, scale=True)
    if "angle" in row:
        bilinear = InterpolationMode.BILINEAR
        x = tvf.affine(x, row["angle"], row["shift"], 1.0, [0.0, 0.0], interpolation=bilinear)
    for number in row.get("order", []):
        if number >= 0:
            x = operations[number](x, row["factor"][number])
    if row.get("grey"):
        x = tvf.rgb_to_grayscale(x, num_output_channels=channels)
    if row.get("sigma"):
        x = tvf.gaussian_blur(x, [2 * radius + 1] * 2, [row["sigma"]] * 2)
    if row.get("solarise"):
        x = tvf.solarize(x, 0.5)
    return tvf.normalize(x, list(augment.mean), list(augment.std))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n_views", [2, 3])
@pytest.mark.parametrize(
    ("options", "radius"),
    [
        ({"size": 32, **EVERYTHING}, 1),
        ({"size": 61, **EVERYTHING, "blur": 1.0}, 3),
        ({"size": 20, **NOTHING}, 0),
        ({"size": 20, **NOTHING, "grey": 0.5}, 0),
        ({"size": 140, **NOTHING, "blur": 1.0, "blur_sigma": (0.9, 1.0)}, 3),  # 3 sigma: < 7
    ],
)
def test_apply_equals_torchvision_image_by_image(
    options: dict[str, Any], radius: int, n_views: int, channels: int
) -> None:
    of_channels = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.3, 0.25)[:channels]}
    augment = Augment(**options, **of_channels)
    n = 8 if augment.size < 100 else 2
    images = torch.randint(
        0, 256, (n, n_views, channels, augment.size, augment.size), dtype=torch.uint8
    )
    drawn = augment.draw(0, 0, np.arange(n), n_views)
    table = {name: torch.from_numpy(value) for name, value in drawn.items()}
    before = images.clone()
    views = augment.apply(images, table)
    assert views.shape == (n_views * n, channels, augment.size, augment.size)
    assert views.dtype == torch.float32
    assert torch.equal(images, before)
    for v in range(n_views):
        for i in range(n):
            row = {name: value[i, v].tolist() for name, value in drawn.items()}
            expected = torchvision_view(augment, images[i, v], row, radius, channels)
            torch.testing.assert_close(views[v * n + i], expected, rtol=0, atol=1e-4)


def test_apply_orders_rows_all_of_view_0_first() -> None:
    augment = Augment(size=2, **NOTHING, mean=(0.0,), std=(1 / 255,))
    codes = torch.arange(6, dtype=torch.uint8).reshape(3, 2)  # image b, view v: 2 b + v
    views = augment.apply(codes[:, :, None, None, None].expand(-1, -1, 3, 2, 2), {})
    assert views[:, 0, 0, 0].round().tolist() == [0, 2, 4, 1, 3, 5]


def test_normalise_uses_each_channel_s_numbers_or_one_for_all() -> None:
    x = torch.rand(2, 3, 4, 5)
    own = Augment(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)).normalise(x)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        torch.testing.assert_close(own[:, channel], (x[:, channel] - mean) / std)
    torch.testing.assert_close(Augment(mean=(0.2,), std=(0.5,)).normalise(x), (x - 0.2) / 0.5)


def test_clean_crops_are_central_squares() -> None:
    height, width = np.array([224, 100, 31, 2, 1]), np.array([224, 333, 30, 5, 1])
    crops = Augment(clean_fraction=0.875).clean_crops(height, width)
    assert crops.shape == (5, 1, 5)
    top, left, h, w, flipped = crops[:, 0].T
    assert h.tolist() == w.tolist() == [196, 88, 26, 2, 1]  # of 26.25: 26; of 1.75: 2; at least 1
    assert not flipped.any()
    for start, side, full in ((top, h, height), (left, w, width)):
        after = full - start - side
        assert (start >= 0).all()
        assert (np.abs(after - start) <= 1).all()


def test_clean_crops_of_fraction_0_are_one_pixel_and_of_1_the_shorter_side() -> None:
    sides = np.array([9]), np.array([14])
    assert Augment(clean_fraction=0.0).clean_crops(*sides)[0, 0, 2:4].tolist() == [1, 1]
    assert Augment(clean_fraction=1.0).clean_crops(*sides)[0, 0].tolist() == [0, 2, 9, 9, 0]


PAPERS = {
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "jitter": 0.8,
    "grey": 0.2,
    "rotation": 0.0,
    "shift": 0.0,
    "solarise": 0.0,
}


def test_imagenet_preset_is_the_papers() -> None:
    expected = {
        **PAPERS,
        "size": 224,
        "strength": 1.0,
        "blur": 0.5,
        "blur_sigma": (0.1, 2.0),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "clean_fraction": 0.875,
    }
    assert vars(simclr_imagenet()) == expected
    assert vars(simclr_imagenet(96, 0.5, solarise=0.2)) == {
        **expected,
        "size": 96,
        "strength": 0.5,
        "solarise": 0.2,
    }


def test_cifar_preset_is_the_papers() -> None:
    expected = {
        **PAPERS,
        "size": 32,
        "strength": 0.5,
        "blur": 0.0,
        "blur_sigma": (0.1, 2.0),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "clean_fraction": 1.0,
    }
    assert vars(simclr_cifar()) == expected
    assert vars(simclr_cifar(blur=0.5, flip=0.0)) == {**expected, "blur": 0.5, "flip": 0.0}


def test_digits_preset_moves_without_mirror_or_colour() -> None:
    augment = digits(shift=0.1)
    assert digits().draw(0, 0, np.arange(3), 2).keys() == {"angle", "shift"}
    assert not draw_crops(augment, 1000, 32, 32)[:, 4].any()
    assert (augment.size, augment.crop_scale, augment.rotation) == (32, (0.6, 1.0), 10.0)
    assert (augment.shift, augment.clean_fraction) == (0.1, 1.0)
    assert len(augment.mean) == len(augment.std) == 1


def test_every_option_is_kept_under_its_name() -> None:
    assert vars(Augment()).keys() == inspect.signature(Augment).parameters.keys()


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarise", "clean_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_probability_outside_0_to_1_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"`{name}` must be within \[0, 1\]; got {value}"):
        Augment(**{name: value})


@pytest.mark.parametrize("name", ["crop_scale", "crop_ratio", "blur_sigma"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 0.5), (-1.0, 1.0)])
def test_an_empty_range_is_refused(name: str, low: float, high: float) -> None:
    message = rf"`{name}` must be a range .*got \({low}, {high}\)"
    with pytest.raises(InputError, match=message):
        Augment(**{name: (low, high)})


@pytest.mark.parametrize("options", [{"size": 0}, {"strength": -0.1}, {"strength": 2.6}])
def test_a_size_or_strength_out_of_range_is_refused(options: dict[str, Any]) -> None:
    received = rf"got {options.get('size', 224)} and {options.get('strength', 1.0)}"
    with pytest.raises(InputError, match=rf"`size` must be >= 2 and `strength` .*{received}"):
        Augment(**options)
