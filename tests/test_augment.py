"""The augmentation's draws against torchvision's distributions, and its work image by image."""

import inspect
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from simclr_pl.augment import Augment, Table, digits, simclr_cifar, simclr_imagenet
from simclr_pl.errors import InputError
from simclr_pl.image_operations import crop_resize, crop_resize_mixed

EVERYTHING: dict[str, Any] = {"rotation": 20.0, "shift": 0.2, "solarise": 0.3}
NOTHING: dict[str, Any] = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
MANY = np.arange(20_000)
OF_THE_BATCH = {"jitter_rows", "jitter_counts", "grey_rows", "blur_rows"}  # the rest is (B, V, ...)


def to_tensors(table: Table, device: str = "cpu") -> Table:
    return {
        name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
        for name, value in table.items()
    }


def in_loader_layout(images: Tensor) -> Tensor:
    """The same (B, V, C, S, S), with the channels of a pixel side by side in memory."""
    return images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def draw_crops(augment: Augment, n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, 5) crops of n images of one size."""
    sides = np.full(n, height), np.full(n, width)
    return augment.draw_crops(seed, 0, np.arange(n), 1, *sides)[:, 0]


def torchvision_crops(
    n: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """(n, 4) top, left, height, width."""
    image = torch.empty(1, height, width)
    draws = (RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n))
    return np.array(list(draws))


def crop_statistics(crops: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    top, left, h, w = crops[:, :4].T
    return {
        "area share": h * w / (height * width),
        "log ratio": np.log(w / h),
        "top": top,
        "left": left,
        "centre down": (top + h / 2) / height,
        "centre across": (left + w / 2) / width,
        "across minus down": left / width - top / height,
        "largest share of a side": np.maximum(h / height, w / width),
    }


def p_values(ours: np.ndarray, theirs: np.ndarray, height: int, width: int) -> dict[str, float]:
    """Of the Kolmogorov-Smirnov test that both come from one distribution, by statistic."""
    expected = crop_statistics(theirs, height, width)
    return {
        name: stats.ks_2samp(numbers, expected[name], method="asymp").pvalue
        for name, numbers in crop_statistics(ours, height, width).items()
    }


@pytest.mark.parametrize(
    ("height", "width", "options", "fallback"),
    [
        (96, 96, {}, 0.0),
        (375, 500, {}, 0.0),
        (500, 375, {}, 0.0),
        (50, 75, {"crop_scale": (0.3, 0.9), "crop_ratio": (0.5, 1.5)}, 0.0),
        (100, 900, {}, 0.2),  # wide: often no attempt fits, and the crop is the central one
        (900, 100, {}, 0.2),  # tall
        (60, 400, {"crop_scale": (0.05, 0.14)}, 0.0),
    ],
)
def test_crops_are_distributed_as_torchvision_s(
    height: int, width: int, options: dict[str, Any], fallback: float
) -> None:
    n = 10_000
    augment = Augment(**options)
    ours = draw_crops(augment, n, height, width)
    theirs = torchvision_crops(n, height, width, augment.crop_scale, augment.crop_ratio)
    # 56 comparisons in all cases together; keyed draws and a seeded peer: the same at every run
    assert min(p_values(ours, theirs, height, width).values()) > 1e-3
    central = torchvision_crops(1, height, width, (1.0, 1.0), augment.crop_ratio)
    shares = [(crops[:, :4] == central).all(1).mean() for crops in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert shares[0] >= fallback  # the case does what it is here for


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"crop_scale": (0.11, 1.0)}, "area share"),
        ({"crop_ratio": (0.77, 4 / 3)}, "log ratio"),
    ],
)
def test_the_comparison_of_crops_notices_a_slightly_narrower_range(
    options: dict[str, Any], name: str
) -> None:
    theirs = torchvision_crops(10_000, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3))
    ours = draw_crops(Augment(**options), 10_000, 375, 500)
    assert p_values(ours, theirs, 375, 500)[name] < 1e-4


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
    counts = table.pop("jitter_counts")
    assert [[type(n) for n in row] for row in counts] == [[int] * 4] * 4
    changed = {name: int((table[name] > 0).sum()) for name in ("grey", "sigma")}
    described = {name: (value.shape, value.dtype) for name, value in table.items()}
    assert described == {
        "angle": ((5, 3), np.float32),
        "shift": ((5, 3, 2), np.float32),
        "factor": ((5, 3, 4), np.float32),
        "order": ((5, 3, 4), np.int64),
        "jitter_rows": ((4, 15), np.int64),
        "grey_rows": ((changed["grey"],), np.int64),
        "blur_rows": ((changed["sigma"],), np.int64),
        "grey": ((5, 3), np.bool_),
        "sigma": ((5, 3), np.float32),
        "solarise": ((5, 3), np.bool_),
    }


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"rotation": 0.0, "shift": 0.0}, {"angle", "shift"}),
        ({"rotation": 0.0}, set()),  # a shift alone needs both
        ({"jitter": 0.0}, {"factor", "order", "jitter_rows", "jitter_counts"}),
        ({"strength": 0.0}, {"factor", "order", "jitter_rows", "jitter_counts"}),
        ({"grey": 0.0}, {"grey", "grey_rows"}),
        ({"blur": 0.0}, {"sigma", "blur_rows"}),
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


@pytest.mark.parametrize("n_views", [1, 2, 3])
@pytest.mark.parametrize("p", [0.0001, 0.6, 1.0])  # none, some and all
def test_rows_and_counts_are_those_of_the_table_s_orders_greys_and_sigmas(
    p: float, n_views: int
) -> None:
    table = Augment(jitter=p, grey=p, blur=p).draw(0, 0, np.arange(7), n_views)
    views = [(i, v) for v in range(n_views) for i in range(7)]  # all of view 0 first
    assert table["grey_rows"].tolist() == [n for n, at in enumerate(views) if table["grey"][at]]
    assert table["blur_rows"].tolist() == [n for n, at in enumerate(views) if table["sigma"][at]]
    for position in range(4):
        expected, counts = [], []
        for operation in (0, 1, 2, 3, -1):
            have = [n for n, at in enumerate(views) if table["order"][at][position] == operation]
            expected += have
            counts.append(len(have))
        assert table["jitter_rows"][position].tolist() == expected
        assert table["jitter_counts"][position] == counts[:4]


def everything_drawn(
    index: np.ndarray, n_views: int, epoch: int = 4, first_view: int = 0
) -> dict[str, np.ndarray]:
    """By sample and view, with crops and flips; images have sizes that depend on their index."""
    augment = Augment(**EVERYTHING)
    sides = 40 + index % 7, 30 + index % 11
    crops = augment.draw_crops(3, epoch, index, n_views, *sides, first_view)
    table = augment.draw(3, epoch, index, n_views, first_view)
    by_view = {name: value for name, value in table.items() if name not in OF_THE_BATCH}
    return {**by_view, "crop": crops[..., :4], "flip": crops[..., 4]}


def test_draws_of_a_sample_are_the_same_alone_in_any_batch_and_with_more_views() -> None:
    index = np.array([12, 5, 900_000, 0])
    batch = everything_drawn(index, 2)
    shuffled = everything_drawn(index[[2, 0, 3, 1]], 3)
    for name, value in batch.items():
        np.testing.assert_array_equal(shuffled[name][[1, 3, 0, 2], :2], value)
        for row, sample in enumerate(index):
            alone = everything_drawn(np.array([sample]), 2)
            np.testing.assert_array_equal(alone[name][0], value[row])


def test_first_view_continues_the_numbering_of_the_views() -> None:
    index = np.array([12, 5, 900_000, 0])
    four, last_two = everything_drawn(index, 4), everything_drawn(index, 2, first_view=2)
    for name, value in last_two.items():
        np.testing.assert_array_equal(value, four[name][:, 2:])


@pytest.mark.parametrize("name", everything_drawn(np.arange(1), 1))
def test_views_samples_and_epochs_get_draws_of_their_own(name: str) -> None:
    index = np.arange(50)
    value = everything_drawn(index, 3)[name]
    for a, b in itertools.combinations(range(3), 2):
        assert not np.array_equal(value[:, a], value[:, b])
    assert not np.array_equal(value, everything_drawn(index, 3, epoch=5)[name])
    assert not np.array_equal(value[:25], value[25:])


def torchvision_view(
    augment: Augment, image: Tensor, row: dict[str, Any], radius: int, channels: int
) -> Tensor:
    """One crop (C, S, S) uint8 to a view, by torchvision; the blur's window ends at 3 sigma."""
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
        window = 2 * min(radius, math.ceil(3 * row["sigma"])) + 1
        x = tvf.gaussian_blur(x, [window] * 2, [row["sigma"]] * 2)
    if row.get("solarise"):
        x = tvf.solarize(x, 0.5)
    return tvf.normalize(x, list(augment.mean), list(augment.std))


@pytest.mark.parametrize(
    ("backend", "channels"),
    [("apply", 1), ("apply", 3), ("apply_batched", 1), ("apply_batched", 3)],
)
@pytest.mark.parametrize("n_views", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "radius", "tolerance"),
    [
        ({"size": 32, **EVERYTHING}, 1, 1e-4),  # torchvision rotates on a grid of its own
        ({"size": 61, **EVERYTHING, "blur": 1.0}, 3, 1e-4),
        ({"size": 33, "solarise": 0.3}, 1, 1e-5),
        ({"size": 20, **NOTHING}, 0, 1e-6),
        ({"size": 20, **NOTHING, "grey": 0.5}, 0, 1e-6),
        ({"size": 20, **NOTHING, "solarise": 0.5}, 0, 1e-6),
        ({"size": 140, **NOTHING, "blur": 1.0, "blur_sigma": (0.9, 1.0)}, 3, 2e-6),
        ({"size": 140, **NOTHING, "blur": 1.0, "blur_sigma": (0.1, 5.0)}, 7, 2e-6),
    ],
)
def test_views_equal_torchvision_s_image_by_image(
    options: dict[str, Any],
    radius: int,
    tolerance: float,
    n_views: int,
    backend: str,
    channels: int,
) -> None:
    of_channels = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.3, 0.25)[:channels]}
    augment = Augment(**options, **of_channels)
    n = 7 if augment.size < 100 else 2
    shape = (n, n_views, channels, augment.size, augment.size)
    images = in_loader_layout(torch.randint(0, 256, shape, dtype=torch.uint8))
    drawn = augment.draw(0, 0, np.arange(n), n_views)
    before = images.clone()
    views = getattr(augment, backend)(images, to_tensors(drawn))
    assert torch.equal(images, before)
    by_view = {name: value for name, value in drawn.items() if name not in OF_THE_BATCH}
    expected = []
    for v in range(n_views):
        for i in range(n):
            row = {name: value[i, v].tolist() for name, value in by_view.items()}
            expected.append(torchvision_view(augment, images[i, v], row, radius, channels))
    difference = (views - torch.stack(expected)).abs() * torch.tensor(augment.std).view(-1, 1, 1)
    assert difference.max() <= tolerance  # of images within [0, 1]


@pytest.mark.parametrize(
    ("options", "backend"),
    [({}, "apply"), ({"rotation": 20.0}, "apply"), ({}, "apply_batched"), (NOTHING, "apply")],
)
def test_rows_are_float_all_of_view_0_first(options: dict[str, Any], backend: str) -> None:
    augment = Augment(size=16, **options)
    images = torch.randint(0, 256, (5, 3, 3, 16, 16), dtype=torch.uint8)
    apply = getattr(augment, backend)
    views = apply(images, to_tensors(augment.draw(0, 0, np.arange(5), 3)))
    assert views.shape == (15, 3, 16, 16)
    assert views.dtype == torch.float32
    for i in range(5):
        for v in range(3):
            table = to_tensors(augment.draw(0, 0, np.array([i]), 1, first_view=v))
            alone = apply(images[i : i + 1, v : v + 1], table)
            torch.testing.assert_close(views[5 * v + i], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rotation": 20.0}])
@pytest.mark.parametrize("layout", [in_loader_layout, Tensor.contiguous])
def test_rgb_views_on_the_cpu_are_channels_last_in_memory(
    options: dict[str, Any], layout: Callable[[Tensor], Tensor]
) -> None:
    augment = Augment(size=16, **options)
    images = layout(torch.randint(0, 256, (5, 2, 3, 16, 16), dtype=torch.uint8))
    views = augment.apply(images, to_tensors(augment.draw(0, 0, np.arange(5), 2)))
    assert views.is_contiguous(memory_format=torch.channels_last)


class NoHost(TorchDispatchMode):
    """Fails where an operation would make a GPU wait for the host, or the host for a GPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.seen.add(name.rstrip("_"))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type != self.device for t in tensors):
            raise RuntimeError(f"{name} has a tensor on the host")
        if name == "lift_fresh":
            raise RuntimeError("a tensor is made of numbers")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"):
            raise RuntimeError(f"{name} is read back")
        if name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:]):
            raise RuntimeError(f"{name} counts a mask")
        return out


NEEDS_CUDA = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs CUDA's torch")
DEVICES = ["meta", pytest.param("cuda", marks=NEEDS_CUDA)]  # neither needs a GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "wait",
    [
        Tensor.nonzero,
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.sum().tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.index_put_((x[:, 0] > 0,), x[:1, 0]),
        lambda x: x.cpu(),
        lambda x: x.new_tensor([0.5, 1.0]),
        lambda x: torch.tensor([0.5, 1.0], device=x.device),
        lambda x: x[[0, 1]],
        lambda x: x + torch.tensor(1.0),
    ],
)
def test_what_waits_for_a_device_fails_without_one(
    wait: Callable[[Tensor], Any], device: str
) -> None:
    with FakeTensorMode() if device == "cuda" else nullcontext(), NoHost(device):
        x = torch.ones(4, 3, device=device)
        assert x.mul(2).shape == (4, 3)
        with pytest.raises(RuntimeError):
            wait(x)


def on_device(table: Table, device: str) -> Table:
    """Stand-ins without values, of the same shapes."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device=device)
        if isinstance(value, Tensor)
        else value
        for name, value in table.items()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_views_are_made_without_waiting_for_the_device(
    channels: int, device: str
) -> None:
    augment = Augment(size=33, **EVERYTHING, mean=(0.5,), std=(0.25,))
    drawn = augment.draw(0, 0, np.arange(20), 2)
    assert min(min(row) for row in drawn["jitter_counts"]) > 0  # no operation is skipped
    described = to_tensors(drawn)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        table = on_device(described, device)
        pixels = torch.empty(20, channels, 40, 50, dtype=torch.uint8, device=device)
        crops = torch.empty(20, 2, 5, dtype=torch.int64, device=device)
        with NoHost(device) as guard:
            views = augment.apply_batched(crop_resize(pixels, crops, 33), table)
    assert views.shape == (40, channels, 33, 33)
    assert views.device.type == device
    assert {"grid_sampler_2d", "index_copy", "reflection_pad2d", "where"} <= guard.seen


@pytest.mark.parametrize("device", DEVICES)
def test_crops_of_mixed_sizes_are_made_without_waiting_for_the_device(device: str) -> None:
    with FakeTensorMode() if device == "cuda" else nullcontext():
        flat = torch.empty(90_000, 3, dtype=torch.uint8, device=device)
        start, width = torch.empty(2, 20, dtype=torch.int64, device=device)
        crops = torch.empty(20, 2, 5, dtype=torch.int64, device=device)
        with NoHost(device) as guard:
            views = crop_resize_mixed(flat, start, width, crops, 33, (1200, 1000))
    assert views.shape == (20, 2, 3, 33, 33)
    assert {"index", "bmm", "split"} <= guard.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_gpu_makes_the_same_views_without_waiting(channels: int) -> None:
    augment = Augment(size=33, **EVERYTHING, mean=(0.0,), std=(1.0,))
    pixels = torch.randint(0, 256, (5, channels, 40, 50), dtype=torch.uint8)
    crops = augment.draw_crops(0, 0, np.arange(5), 2, np.full(5, 40), np.full(5, 50))
    drawn = augment.draw(0, 0, np.arange(5), 2)
    images = crop_resize(pixels, torch.from_numpy(crops), 33)
    expected = augment.apply_batched(images, to_tensors(drawn))
    inputs = pixels.cuda(), torch.from_numpy(crops).cuda()
    table = to_tensors(drawn, "cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        own_images = crop_resize(*inputs, 33)
        views = augment.apply(own_images, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert views.shape == expected.shape
    assert (own_images.cpu().int() - images.int()).abs().max() <= 1
    views = augment.apply(images.cuda(), table)  # of the same bytes
    torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=1e-4)


def test_normalise_uses_each_channel_s_numbers_or_one_for_all() -> None:
    x = torch.rand(2, 3, 4, 5)
    own = Augment(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)).normalise(x.clone())
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        torch.testing.assert_close(own[:, channel], (x[:, channel] - mean) / std)
    one_for_all = Augment(mean=(0.2,), std=(0.5,)).normalise(x.clone())
    torch.testing.assert_close(one_for_all, (x - 0.2) / 0.5)


def test_normalise_works_in_place() -> None:
    x = torch.rand(2, 3, 4, 5)
    assert Augment().normalise(x).data_ptr() == x.data_ptr()


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


def test_small_views_are_those_of_multi_crop_and_the_original_stays() -> None:
    augment = Augment(size=224, jitter=0.3, crop_scale=(0.14, 1.0))
    before = dict(vars(augment))
    small = augment.small()
    assert vars(small) == {**before, "size": 96, "crop_scale": (0.05, 0.14)}
    assert vars(augment) == before
    assert Augment(size=32).small().size == 14
    assert Augment(size=8).small().size == 8  # no smaller


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
