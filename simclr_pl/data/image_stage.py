"""The device stage of images: from a batch of crops, or of places in a resident set, to views.

Symbols: M images and P pixels of a set, B images of this rank's batch, V views, C channels, S side of a
view.
"""

from collections.abc import Sequence
from threading import Timer

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simclr_pl.augment import Augment
from simclr_pl.cpu import recycled
from simclr_pl.crop_kernels import crop_rows, is_small, resize
from simclr_pl.data.batches import Batch, Views, to_tensors, with_floats
from simclr_pl.data.sources import Images, ResidentImages
from simclr_pl.gpu import triton_serves
from simclr_pl.image_operations import crop_resize, crop_resize_mixed, to_float


class ImageStage:
    """Makes views of what `ImageBatches` says; holds the resident sets that it moved to a device."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, images: Images, batch: Batch, group: Batch, views: Views) -> Tensor:
        """The views of one size, all of view 0 first.

        Args:
            images: the set.
            batch: on any device.
            group: the part of it that these views are made of.
            views: which they are.

        Returns:
            (V*B, C, S, S) float32.
        """
        augment = views.at(batch["epoch"])
        assert isinstance(augment, Augment)
        pixels = group.get("images")  # (B, V, C, S, S) uint8
        if pixels is None:
            index = batch["index"]
            if "ids" in batch:
                index = batch["ids"][views.first : views.first + views.n_views].t()  # (B, V)
            pixels = self._crop(images, index, group["crops"], augment.size, group.get("largest"))
        if "table" in group:
            return augment.apply(pixels, with_floats(group["table"]))
        return augment.normalise(to_float(pixels[:, 0]))

    def _crop(
        self,
        images: Images,
        index: Tensor,
        crops: Tensor,
        size: int,
        largest: tuple[int, int] | None = None,
    ) -> Tensor:
        """Crops (B, V, C, S, S) of resident images; padding shows the first one.

        Args:
            images: the set.
            index: (B,) int64 positions, or (B, V).
            crops: (B, V, 5) int64.
            size: S.
            largest: height and width of the largest crop, of a set of mixed sizes.
        """
        if index.dim() == 2:
            rows = index.flatten(), crops.flatten(0, 1)[:, None]
            views = self._crop(images, *rows, size, largest)
            return views.view(*index.shape, *views.shape[2:])
        assert isinstance(images, ResidentImages)
        index = index.clamp(min=0)
        if index.device.type == "cpu" and is_small(size):
            pixels = images.flat.numpy()
            out = recycled((*crops.shape[:2], size, size, pixels.shape[1]), np.uint8)
            crop_rows(pixels, images.start, images.sides, index.numpy(), crops.numpy(), out)
            return torch.from_numpy(out).permute(0, 1, 4, 2, 3)
        flat, start, width = self._on(index.device, images)
        if images.one_size is None:
            assert largest is not None
            return _crop_mixed(flat, start[index], width[index], crops, size, largest)
        held = images.shaped(flat)
        if triton_serves(index.device):
            from simclr_pl.view_kernels import crop_rows_on_gpu  # triton is not everywhere

            return crop_rows_on_gpu(held, index, crops, size)
        return crop_resize(held[index], crops, size)

    def _on(self, device: torch.device, images: ResidentImages) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (P, C), start (M,) and width (M,) of a set, on a device."""
        key = images.flat.data_ptr()  # the bank may be the training set: moved once
        held = self._held.get(key)
        if held is None or held[0].device != device:
            start, width = (torch.from_numpy(x) for x in (images.start, images.sides[:, 1]))
            held = images.flat.to(device), start.to(device), width.to(device)
            self._held[key] = held
        return held


def _crop_mixed(
    flat: Tensor,
    start: Tensor,
    width: Tensor,
    crops: Tensor,
    size: int,
    largest: tuple[int, int],
) -> Tensor:
    """`crop_resize_mixed`, by whatever is quickest on the device."""
    channels, n_views = flat.shape[1], crops.shape[1]
    if not triton_serves(flat.device):
        return crop_resize_mixed(flat, start, width, crops, size, largest)
    from simclr_pl.view_kernels import crop_flat  # triton is not everywhere

    first, stride = ((x * channels).repeat_interleave(n_views) for x in (start, width))
    rows = crop_flat(flat, first, crops.flatten(0, 1), size, channels, stride, channels)
    return rows.view(*crops.shape[:2], *rows.shape[1:])


def warm_up(all_views: Sequence[Views], channels: int, device: torch.device) -> None:
    """Compiles the CPU's kernels, or loads them, before the first step and before workers start.

    Args:
        all_views: of images, of each size, in all epochs.
        channels: C.
        device: of the device stage.
    """
    text = "Compiling the kernels for the CPU; later runs load them."
    late = Timer(2.0, rank_zero_info, [text])
    late.start()
    try:
        for augment, n_views in [(a, views.n_views) for views in all_views for a in views.augments]:
            assert isinstance(augment, Augment)
            size = augment.size
            images = np.zeros((1, n_views, size, size, channels), np.uint8)
            crops = np.array([[[0, 0, 2, 3, 0]]])
            zero, sides = np.zeros(1, int), np.array([[2, 3]])
            crop_rows(np.zeros((6, channels), np.uint8), zero, sides, zero, crops, images)
            resize(np.zeros((2, 3, channels), np.uint8), size, size, False, images[0, 0])
            if device.type == "cpu":
                table = to_tensors(augment.draw(0, 0, np.arange(1), n_views))
                augment.apply(torch.from_numpy(images).permute(0, 1, 4, 2, 3), table)
    finally:
        late.cancel()
