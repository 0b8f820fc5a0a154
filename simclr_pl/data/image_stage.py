"""The device stage of images: from a batch of crops, or of places in a resident set, to views.

Symbols: B images of this rank's batch, V views, C channels, S side of a view.
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
from simclr_pl.image_operations import crop_resize, to_float


class ImageStage:
    """Makes views of what `ImageBatches` says; holds the resident sets that it moved to a device."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

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
        augment = views.augment
        assert isinstance(augment, Augment)
        pixels = group.get("images")  # (B, V, C, S, S) uint8
        if pixels is None:
            index = batch["index"]
            if "ids" in batch:
                index = batch["ids"][views.first : views.first + views.n_views].t()  # (B, V)
            pixels = self._crop(images, index, group["crops"], augment.size)
        if "table" in group:
            return augment.apply(pixels, with_floats(group["table"]))
        return augment.normalise(to_float(pixels[:, 0]))

    def _crop(self, images: Images, index: Tensor, crops: Tensor, size: int) -> Tensor:
        """Crops (B, V, C, S, S) of resident images; padding shows the first one.

        Args:
            images: the set.
            index: (B,) int64 positions, or (B, V).
            crops: (B, V, 5) int64.
            size: S.
        """
        if index.dim() == 2:
            views = self._crop(images, index.flatten(), crops.flatten(0, 1)[:, None], size)
            return views.view(*index.shape, *views.shape[2:])
        assert isinstance(images, ResidentImages)
        index = index.clamp(min=0)
        if index.device.type == "cpu" and is_small(size):
            pixels = images.pixels.permute(0, 2, 3, 1).numpy()  # (M, H, W, C)
            out = recycled((*crops.shape[:2], size, size, pixels.shape[3]), np.uint8)
            crop_rows(pixels, index.numpy(), crops.numpy(), out)
            return torch.from_numpy(out).permute(0, 1, 4, 2, 3)
        key = images.pixels.data_ptr()  # the bank may be the training set: moved once
        held = self._held.get(key)
        if held is None or held.device != index.device:
            held = self._held[key] = images.pixels.to(index.device)
        return crop_resize(held[index], crops, size)


def warm_up(all_views: Sequence[Views], channels: int, device: torch.device) -> None:
    """Compiles the CPU's kernels, or loads them, before the first step and before workers start.

    Args:
        all_views: of images, of each size.
        channels: C.
        device: of the device stage.
    """
    text = "Compiling the kernels for the CPU; later runs load them."
    late = Timer(2.0, rank_zero_info, [text])
    late.start()
    try:
        for views in all_views:
            assert isinstance(views.augment, Augment)
            size = views.augment.size
            images = np.zeros((1, views.n_views, size, size, channels), np.uint8)
            crops = np.array([[[0, 0, 2, 3, 0]]])
            crop_rows(np.zeros((1, 2, 3, channels), np.uint8), np.zeros(1, int), crops, images)
            resize(np.zeros((2, 3, channels), np.uint8), size, size, False, images[0, 0])
            if device.type == "cpu":
                table = to_tensors(views.augment.draw(0, 0, np.arange(1), views.n_views))
                views.augment.apply(torch.from_numpy(images).permute(0, 1, 4, 2, 3), table)
    finally:
        late.cancel()
