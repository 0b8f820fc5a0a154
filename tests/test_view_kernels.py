"""The device stage of images on a GPU: in Triton's interpreter, through its compiler, and on a GPU."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from simclr_pl.augment import Augment, Table
from simclr_pl.gpu import triton_serves
from simclr_pl.image_operations import crop_resize

Run = Callable[..., Any]
OPERATIONS = (
    tvf.adjust_brightness,
    tvf.adjust_contrast,
    tvf.adjust_saturation,
    tvf.adjust_hue,
)


def cropped(*case: Any) -> Tensor:
    from simclr_pl.view_kernels import crop_block, crop_rows_on_gpu

    assert type(crop_block).__name__ == "InterpretedFunction"
    return crop_rows_on_gpu(*case)


def cropped_from_a_buffer(*case: Any) -> Tensor:
    from simclr_pl.view_kernels import crop_flat

    return crop_flat(*case)


def coloured(*case: Any) -> Tensor:
    from simclr_pl.view_kernels import colour_rows_on_gpu

    return colour_rows_on_gpu(*case)


def applied(augment: Augment, images: Tensor, table: Table) -> Tensor:
    return augment._apply_kernels(images, table)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def channels_last(x: Tensor) -> Tensor:
    """The same (..., C, H, W), with the channels of a pixel side by side in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def means(line: np.ndarray, start: int, length: int, size: int) -> np.ndarray:
    """(H, ...) to (S, ...) float64, by the triangle filter, a pixel at a time."""
    scale = length / size
    out = np.zeros((size, *line.shape[1:]))
    for place in range(size):
        centre, total = (place + 0.5) * scale, 0.0
        for pixel in range(length):
            weight = max(0.0, 1 - abs(pixel + 0.5 - centre) / max(scale, 1.0))
            out[place] += weight * line[start + pixel]
            total += weight
        out[place] /= total
    return out


def crop_in_float64(pixels: Tensor, crop: list[int], size: int) -> Tensor:
    """(C, H, W) uint8 to (C, S, S) float64, not rounded."""
    top, left, height, width, flipped = crop
    rows = means(pixels.permute(1, 2, 0).double().numpy(), top, height, size)
    across = means(rows.swapaxes(0, 1), left, width, size)[:: -1 if flipped else 1]
    return torch.from_numpy(across.transpose(2, 1, 0).copy())


def crops_of(height: int, width: int) -> list[list[int]]:
    """The whole, single pixels at two corners, a line, an inner crop and those at two borders."""
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (2, 0, 1, width)]
    boxes += [(2, 1, height // 2, width // 3), (0, 3, height, 2), (height - 3, 0, 3, width - 1)]
    return [[*box, i % 2] for i, box in enumerate(boxes + boxes[:1])]


def spaced_out(x: Tensor) -> Tensor:
    """The same (M, C, H, W), with gaps between all elements."""
    m, channels, height, width = x.shape
    room = torch.zeros(m + 1, channels, 2 * height, 3 * width, dtype=x.dtype)
    room[1:, :, ::2, 1::3] = x
    return room[1:, :, ::2, 1::3]


def images_innermost(x: Tensor) -> Tensor:
    """The same (M, C, H, W), with the images side by side for each pixel."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("sides", "size", "layout"),
    [
        ((9, 14), 32, channels_last),
        ((26, 19), 7, images_innermost),  # 26 / 7: shrinks by 3.7
        ((20, 20), 20, Tensor.contiguous),
        ((5, 37), 5, spaced_out),
    ],
)
def test_crops_are_the_float64_means_rounded_and_within_one_of_crop_resize(
    interpreted: Run,
    sides: tuple[int, int],
    size: int,
    layout: Callable[[Tensor], Tensor],
    channels: int,
) -> None:
    pixels = layout(bytes_of(3, channels, *sides))
    index = torch.tensor([2, 0])
    crops = [crops_of(*sides)[i:] + crops_of(*sides)[:i] for i in range(2)]
    views = interpreted(cropped, pixels, index, torch.tensor(crops), size)
    assert views.shape == (2, 8, channels, size, size)
    assert views.dtype == torch.uint8
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (views.int() - crop_resize(pixels[index], torch.tensor(crops), size)).abs().max() <= 1
    for i, image in enumerate(index.tolist()):
        for view, crop in zip(views[i], crops[i], strict=True):
            mean = crop_in_float64(pixels[image], crop, size)
            assert (view - mean).abs().max() <= 0.5 + 1e-4  # the same byte but for ties


def test_crops_are_those_of_crop_resize_but_for_a_few_ties(interpreted: Run) -> None:
    pixels = channels_last(bytes_of(9, 3, 32, 32))
    crops = torch.from_numpy(
        Augment().draw_crops(0, 0, np.arange(9), 2, np.full(9, 32), np.full(9, 32))
    )
    views = interpreted(cropped, pixels, torch.arange(9), crops, 20)
    assert (views != crop_resize(pixels, crops, 20)).float().mean() < 2e-3


def test_the_views_of_a_row_may_be_of_several_images(interpreted: Run) -> None:
    pixels = channels_last(bytes_of(4, 3, 8, 11))
    index = torch.tensor([[0, 3], [2, 2], [1, 0]])
    crops = torch.tensor(crops_of(8, 11)[:6]).view(3, 2, 5)
    views = interpreted(cropped, pixels, index, crops, 6)
    alone = interpreted(cropped, pixels, index.flatten(), crops.view(6, 1, 5), 6)
    assert torch.equal(views.flatten(0, 1), alone.flatten(0, 1))
    assert not torch.equal(views, interpreted(cropped, pixels, index[:, 0], crops, 6))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_mixed_sizes_are_cropped_out_of_one_buffer(
    interpreted: Run, channels: int
) -> None:
    sides = [(7, 5), (12, 31), (20, 9)]
    images = [bytes_of(height, width, channels) for height, width in sides]
    ends = np.cumsum([image.numel() for image in images])
    rows = [2, 0, 1, 1]
    starts = torch.tensor([ends[r] - images[r].numel() for r in rows])
    crops = torch.tensor([crops_of(*sides[r])[(0, 4, 0, 5)[i]] for i, r in enumerate(rows)])
    strides = torch.tensor([sides[r][1] * channels for r in rows])
    flat = torch.cat([image.flatten() for image in images])
    views = interpreted(cropped_from_a_buffer, flat, starts, crops, 7, channels, strides, channels)
    assert views.shape == (4, channels, 7, 7)
    for view, r, crop in zip(views, rows, crops, strict=True):
        pixels = images[r].permute(2, 0, 1)[None]
        assert torch.equal(
            view, interpreted(cropped, pixels, torch.zeros(1).long(), crop[None, None], 7)[0, 0]
        )
        assert (view - crop_in_float64(pixels[0], crop.tolist(), 7)).abs().max() <= 0.5 + 1e-4


def test_crops_use_no_pixel_outside_of_them(interpreted: Run) -> None:
    pixels = torch.stack([torch.zeros(3, 30, 30), torch.full((3, 30, 30), 255.0)]).to(torch.uint8)
    pixels[:, :, 10:19, 12:26] = bytes_of(3, 9, 14)
    for size in (4, 20):
        crops = torch.tensor([[[10, 12, 9, 14, 0]]] * 2)
        black, white = interpreted(cropped, pixels, torch.arange(2), crops, size)
        assert torch.equal(black, white)


def by_torchvision(x: Tensor, factors: list[float], order: list[int]) -> Tensor:
    for number in order:
        if number >= 0:
            x = OPERATIONS[number](x, factors[number])
    return x


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_row_is_jittered_in_its_own_order_as_torchvision_does(
    interpreted: Run, channels: int, kind: torch.dtype
) -> None:
    order = [*itertools.permutations(range(4)), (-1,) * 4, (2, -1, 0, -1), (1, 3, -1, -1)]
    order = torch.tensor(order).view(9, 3, 4)
    factor = torch.rand(9, 3, 4) * torch.tensor([2.0, 2, 2, 1]) - torch.tensor([0, 0, 0, 0.5])
    images = channels_last(bytes_of(9, 3, channels, 7, 7))
    images[4, :, :, :3] = images[4, :, :1, :3]  # greys
    floats = images / 255
    given = images if kind == torch.uint8 else floats
    table = {"order": order, "factor": factor}
    rows = interpreted(coloured, given, table, (0.0,), (1.0,))
    assert rows.shape == (27, channels, 7, 7)
    for view, image in itertools.product(range(3), range(9)):
        of_row = factor[image, view].tolist(), order[image, view].tolist()
        expected = by_torchvision(floats[image, view], *of_row)
        torch.testing.assert_close(rows[9 * view + image], expected, rtol=0, atol=1e-5)
    assert torch.equal(rows[8], floats[8, 0])  # -1 is untouched to the bit


NOTHING: dict[str, Any] = {"jitter": 0.0, "grey": 0.0, "blur": 0.0}
EVERYTHING: dict[str, Any] = {"rotation": 20.0, "shift": 0.2, "solarise": 0.7, "grey": 0.4}
OPTIONS: list[dict[str, Any]] = [
    {"size": 33, "blur": 0.0, "solarise": 0.4, "grey": 0.4},  # 33 * 33: more than a block
    {"size": 32, "blur": 0.0},
    {"size": 20, "blur": 0.6, **EVERYTHING},
    {"size": 20, "blur": 0.0, **EVERYTHING},
    {"size": 7, "blur": 0.6},
    {"size": 5, **NOTHING, "grey": 0.5},
    {"size": 5, **NOTHING, "solarise": 0.5},
    {"size": 5, **NOTHING, "rotation": 20.0},
    {"size": 5, **NOTHING},
]


def drawn(augment: Augment, n: int, n_views: int, device: str = "cpu") -> Table:
    table = augment.draw(0, 0, np.arange(n), n_views)
    return {
        name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
        for name, value in table.items()
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_views_of_the_kernels_are_those_of_torch(
    interpreted: Run, options: dict[str, Any], channels: int
) -> None:
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    augment = Augment(**options, mean=mean, std=std)
    table = drawn(augment, 4, 2)
    images = channels_last(bytes_of(4, 2, channels, augment.size, augment.size))
    views = interpreted(applied, augment, images, table)
    expected = augment.apply_batched(images, table)
    assert views.shape == expected.shape == (8, channels, augment.size, augment.size)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    difference = (views - expected).abs() * torch.tensor(std).view(-1, 1, 1)
    assert difference.max() <= 1e-5  # of images within [0, 1]


def test_one_mean_and_deviation_serve_all_channels(interpreted: Run) -> None:
    images = bytes_of(2, 1, 3, 4, 4)
    views = interpreted(coloured, images, {}, (0.5,), (0.25,))
    torch.testing.assert_close(views, (images[:, 0] / 255 - 0.5) / 0.25)


# Triton's compiler needs no GPU, only the target's name.


def compile_for(capability: int, kernel: Any, kinds: Table, constants: Table) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simclr_pl.view_kernels import _OPTIONS

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    source = ASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=_OPTIONS)


@pytest.mark.parametrize(("capability", "channels"), [(75, 1), (90, 3)])
def test_kernels_compile(
    capability: int, channels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton comes with torch for some systems only")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from simclr_pl.view_kernels import colour_row, crop_block

    whole = dict.fromkeys(crop_block.arg_names + colour_row.arg_names, "i32")
    arrays = {"flat": "*u8", "starts": "*i64", "crops": "*i64", "order": "*i64", "factor": "*fp32"}
    arrays |= {"is_grey": "*u8", "is_solarised": "*u8", "strides": ("i32",) * 3}
    kinds = {**whole, **arrays, "mean": ("fp32",) * 3, "std": ("fp32",) * 3}
    shape = {"size": 32, "channels": channels, "block": 1024}
    for differ in ({"strides_row": "i32"}, {"strides_row": "*i64"}):
        constants = {**shape, "one_stride": differ["strides_row"] == "i32"}
        crop_kinds = {**kinds, **differ, "out": "*u8"}
        assert "st.global" in compile_for(capability, crop_block, crop_kinds, constants).asm["ptx"]
    for images, finish, absent in [
        ("*u8", True, {}),
        ("*fp32", False, {"is_grey": None, "is_solarised": None}),
    ]:
        constants = {
            **shape,
            **absent,
            "finish": finish,
            "white": 255.0 if images == "*u8" else 1.0,
        }
        colour_kinds = {**kinds, "images": images, "out": "*fp32"}
        compiled = compile_for(capability, colour_row, colour_kinds, constants)
        assert "st.global" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 1024  # bytes, of the one sum


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_a_gpu = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@needs_gpu
@on_a_gpu
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_gpu_makes_the_views_of_torch_without_waiting(
    options: dict[str, Any], channels: int
) -> None:
    from simclr_pl.data.image_stage import ImageStage  # Lightning takes a while to import
    from simclr_pl.data.sources import ResidentImages

    augment = Augment(**options, mean=(0.0,), std=(1.0,))
    images = ResidentImages(bytes_of(9, channels, 40, 50), np.zeros(9, np.int64))
    crops = augment.draw_crops(0, 0, np.arange(5), 2, np.full(5, 40), np.full(5, 50))
    index, on_device = torch.tensor([8, 0, 3, 3, 1], device="cuda"), torch.from_numpy(crops).cuda()
    table, size, stage = drawn(augment, 5, 2, "cuda"), augment.size, ImageStage()
    stage._crop(images, index, on_device, size)  # moves the set
    assert triton_serves(index.device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        own = stage._crop(images, index, on_device, size)
        views = augment.apply(own, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = own.int() - crop_resize(images.pixels.cuda()[index], on_device, size)
    assert difference.abs().max() <= 1
    assert views.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views, augment.apply_batched(own, table), rtol=0, atol=1e-5)
