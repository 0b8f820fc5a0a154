"""The compiled colour stage against the batched one, and against torchvision, image by image."""

import itertools
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from simclr_pl.augment import Augment, Table
from simclr_pl.image_kernels import colour_rows

ORDERS = list(itertools.permutations(range(4)))
AS_IT_IS = (np.zeros(3), np.ones(3))  # mean and deviation that leave images in [0, 1]
IN_0_TO_1: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}


def pictures(n: int, size: int) -> Tensor:
    """(n, 3, S, S) uint8 of seven kinds in turn: what has no spread, no light, no dark, no middle."""
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)  # noise, where it stays
    ramp = torch.linspace(0, 255, size)
    for i in range(n):
        if i % 7 == 1:
            x[i] = torch.randint(0, 256, (3, 1, 1))  # one colour
        elif i % 7 == 2:
            x[i] = 77  # one grey: no spread, hence no hue
        elif i % 7 == 3:
            x[i] = 0
        elif i % 7 == 4:
            x[i] = 255
        elif i % 7 == 5:
            x[i] = (0.3 * ramp[:, None] + 0.7 * ramp).byte()
        elif i % 7 == 6:
            x[i] = (torch.rand(3, size, size) > 0.5).byte() * 255
    return x


def batch(n_images: int, n_views: int, size: int) -> Tensor:
    """(B, V, 3, S, S) uint8."""
    return pictures(n_images * n_views, size).unflatten(0, (n_images, n_views))


def in_loader_layout(images: Tensor) -> Tensor:
    """The same (B, V, C, S, S), with the channels of a pixel side by side in memory."""
    return images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def drawn(augment: Augment, n_images: int, n_views: int) -> Table:
    table = augment.draw(0, 0, np.arange(n_images), n_views)
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in table.items()
    }


def as_rows(images: Tensor) -> np.ndarray:
    """(n, 3, S, S) to (n, S, S, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def colour(images: Tensor, table: dict[str, np.ndarray], radius: int = 1) -> Tensor:
    """`colour_rows` of (n, 3, S, S) images, each once, without normalisation."""
    views = colour_rows(as_rows(images), np.arange(len(images)), table, radius, *AS_IT_IS)
    return torch.from_numpy(views).permute(0, 3, 1, 2)


def assert_backends_agree(augment: Augment, images: Tensor, tolerance: float = 1e-5) -> None:
    table = drawn(augment, *images.shape[:2])
    compiled, batched = augment.apply(images, table), augment.apply_batched(images, table)
    torch.testing.assert_close(compiled, batched, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rotation", [0.0, 30.0])
@pytest.mark.parametrize("solarise", [0.0, 0.5])
@pytest.mark.parametrize("blur", [0.0, 0.6])
@pytest.mark.parametrize("grey", [0.0, 0.5])
@pytest.mark.parametrize("jitter", [0.0, 0.8])
def test_backends_agree_for_every_set_of_operations(
    jitter: float, grey: float, blur: float, solarise: float, rotation: float
) -> None:
    images = batch(7, 2, 32)
    for strength in (0.5, 1.0, 2.5) if jitter else (1.0,):
        options: dict[str, Any] = {
            "size": 32,
            "jitter": jitter,
            "strength": strength,
            "grey": grey,
            "blur": blur,
            "solarise": solarise,
            "rotation": rotation,
        }
        assert_backends_agree(Augment(**options, **IN_0_TO_1), images)
        assert_backends_agree(Augment(**options), images, 1e-5 / 0.224)  # ImageNet's deviation


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", [in_loader_layout, Tensor.contiguous])
@pytest.mark.parametrize("n_views", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 32, 33, 96, 224])  # tiles of 1,024 pixels: less, one, more
def test_backends_agree_for_every_size_views_layout_and_threads(
    size: int, n_views: int, layout: Callable[[Tensor], Tensor], threads: int
) -> None:
    torch.set_num_threads(threads)
    augment = Augment(size=size, grey=0.4, blur=0.6, solarise=0.4, **IN_0_TO_1)
    n_images = 3 if size > 100 else 7
    assert_backends_agree(augment, layout(batch(n_images, n_views, size)))


def test_backends_agree_for_every_order_of_the_jitter() -> None:
    augment = Augment(size=9, jitter=1.0, **IN_0_TO_1)
    orders = drawn(augment, 201, 1)["order"][:, 0]
    assert {tuple(order) for order in orders.tolist()} == set(ORDERS)
    assert_backends_agree(augment, batch(201, 1, 9))


OPERATIONS = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)


@pytest.mark.parametrize("kind", range(7))  # of picture
@pytest.mark.parametrize(
    "factors",
    [(1.3, 0.6, 1.7, 0.13), (0.2, 1.8, 0.2, -0.2), (1.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.5)],
)
def test_jitter_in_every_order_equals_torchvision(
    factors: tuple[float, float, float, float], kind: int
) -> None:
    images = pictures(7, 33)[kind].expand(26, -1, -1, -1)
    order = np.array([*ORDERS, (-1,) * 4, (2, -1, 0, -1)])
    factor = np.tile(np.float32(factors), (26, 1))
    expected = []
    for image, own in zip(images / 255, order.tolist(), strict=True):
        for number in own:
            if number >= 0:
                image = OPERATIONS[number](image, factors[number])
        expected.append(image)
    own_images = colour(images, {"order": order, "factor": factor})
    torch.testing.assert_close(own_images, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("size", "radius"), [(2, 1), (9, 1), (7, 6), (41, 6), (61, 9)])
def test_blur_equals_torchvision_with_a_window_of_3_sigma(
    size: int, radius: int, grey: bool
) -> None:
    sigma = np.float32([0.0, 0.1, 0.4, 1.0, 1.1, 2.0, 5.0])
    images = pictures(7, size)
    images[1:] = torch.randint(0, 256, (6, 3, size, size))
    expected = []
    for image, s in zip(images / 255, sigma.tolist(), strict=True):
        window = 2 * min(radius, math.ceil(3 * s)) + 1
        if grey:
            image = tvf.rgb_to_grayscale(image, num_output_channels=3)
        expected.append(tvf.gaussian_blur(image, [window] * 2, [s, s]) if s else image)
    blurred = colour(images, {"sigma": sigma, "grey": np.full(7, grey)}, radius)
    torch.testing.assert_close(blurred, torch.stack(expected), rtol=0, atol=2e-6)


def test_solarisation_equals_torchvision_and_spares_the_others() -> None:
    images = pictures(7, 33)
    some = np.array([True, False] * 3 + [True])
    expected = torch.stack(
        [
            tvf.solarize(image, 0.5) if chosen else image
            for image, chosen in zip(images / 255, some, strict=True)
        ]
    )
    torch.testing.assert_close(colour(images, {"solarise": some}), expected, rtol=0, atol=2e-7)


def test_every_byte_becomes_its_normalised_share_of_255() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 2.0])
    expected = (images / 255 - mean) / std
    for source in (images, (images / 255).astype(np.float32)):
        views = colour_rows(source, np.zeros(1, np.int64), {}, 1, mean, std)
        assert views.dtype == np.float32
        np.testing.assert_allclose(views, expected, rtol=0, atol=5e-7)


def test_rows_are_made_of_the_images_that_source_names() -> None:
    images = pictures(7, 9)
    source = np.array([6, 0, 0, 5, 1])
    views = colour_rows(as_rows(images), source, {}, 1, *AS_IT_IS)
    np.testing.assert_allclose(views, as_rows(images)[source] / 255, rtol=0, atol=1e-7)


def everything(threads: int) -> bytes:
    """The bits of 14 views; by numpy alone, as torch's own threads do not survive a fork."""
    torch.set_num_threads(threads)
    images = (np.arange(14 * 33 * 33 * 3) * 7919 % 256).astype(np.uint8).reshape(14, 33, 33, 3)
    table = Augment(size=33, solarise=0.4).draw(0, 0, np.arange(14), 1)
    names = ("factor", "order", "grey", "sigma", "solarise")
    by_row = {name: table[name][:, 0] for name in names}
    return colour_rows(images, np.arange(14)[::-1].copy(), by_row, 1, *AS_IT_IS).tobytes()


def test_views_are_the_same_bits_for_any_number_of_threads() -> None:
    one = everything(1)
    assert len(one) == 14 * 3 * 33 * 33 * 4
    for threads in (2, 3, 14, 50):
        assert everything(threads) == one


def _send_everything(connection: Any) -> None:
    connection.send((everything(3), torch.get_num_threads()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_makes_the_same_bits_after_its_parent_used_threads() -> None:
    own = everything(3)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send_everything, args=(sender,))
    child.start()
    try:
        assert receiver.poll(30), "the forked process hangs"
        assert receiver.recv() == (own, 3)
    finally:
        child.kill()
        child.join()


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


def test_importing_the_package_or_the_augmentation_imports_no_numba() -> None:
    imported = "print('numba' in sys.modules)"
    assert run(f"import sys, simclr_pl, simclr_pl.augment; {imported}") == "False"
    assert run(f"import sys, simclr_pl.image_kernels; {imported}") == "True"  # it can be seen


def test_a_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    code = """
import numpy as np
from simclr_pl import image_kernels
images = np.zeros((1, 8, 8, 3), np.uint8)
image_kernels.colour_rows(images, np.zeros(1, np.int64), {}, 1, np.zeros(3), np.ones(3))
stats = image_kernels._colour_rows.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)) == "0 1"
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)) == "1 0"
