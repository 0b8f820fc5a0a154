"""Batches of images, quicker than by the general way.

Symbols: B images of this rank's batch, V views, C channels, S side of a view.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.data.batches import Batch, BatchDataset, Views, guarded
from simclr_pl.data.decode import Picture, UnreadableSample, cut_crops
from simclr_pl.data.places import Places
from simclr_pl.data.sampler import KeyedSampler
from simclr_pl.data.slots import Slots
from simclr_pl.data.sources import Images, ResidentImages

_BLOCK = 32  # images opened together: their crops are drawn at once, at a thirtieth of the cost


class ImageBatches(BatchDataset):
    """Batches of images: one decode serves all views of an image.

    A group holds ``images`` (B, V, C, S, S) uint8 with the channels last in memory, or the ``crops``
    (B, V, 5) to cut on the device, where images differ in size with the height and width of the
    ``largest`` crop, two ints that stay on the host; and ``table``, the parameters for the device stage,
    except for clean views.

    Args:
        images: the set.
        views: the sizes of views wanted, each by an `Augment`.
        seed: of the run.
        channels: C.
        order: as for `BatchDataset`.
        crop_on_device: leave resident pixels where they are.
        replace_probability: as for `BatchDataset`.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[Views],
        seed: int,
        channels: int,
        order: KeyedSampler | None = None,
        crop_on_device: bool = False,
        replace_probability: float = 0.0,
    ) -> None:
        super().__init__(images, views, seed, order, replace_probability)
        self.channels, self.crop_on_device = channels, crop_on_device
        self.slots: list[Slots] = []  # a pool for each size of views, while loaders are about

    def make_room(self, batch_size: int, workers: int) -> None:
        """Makes the memory for batches of ``batch_size`` images at most, before workers start."""
        if not self.crop_on_device:
            sizes = [(max(1, v.n_views), largest_side(v.augments)) for v in self.views]
            self.slots = [
                Slots((batch_size, n_views, size, size, self.channels), workers)
                for n_views, size in sizes
            ]

    def _blank(self) -> Picture:
        blank = np.zeros((1, 1, self.channels), np.uint8)
        return Picture(1, 1, lambda reuse=False: blank)

    def _groups(self, epoch: int, places: Places) -> list[Batch]:
        if self.crop_on_device:
            assert isinstance(self.images, ResidentImages)
            if self.images.unreadable:
                for slot in range(len(places.positions)):
                    places.open(slot)
                for slot in places.given():
                    places.open_giver(slot)
            groups = [self._drawn_crops(v, epoch, places) for v in self.views]
        else:
            groups = [{"images": images} for images in self._decode(epoch, places)]
        for group, views in zip(groups, self.views, strict=True):
            if views.n_views:
                index, first = self._keys(views, places)
                table = _augment_of(views, epoch).draw(
                    self.seed, epoch, index, views.n_views, first
                )
                group["table"] = guarded(table)
        return groups

    def _drawn_crops(self, views: Views, epoch: int, places: Places) -> Batch:
        assert isinstance(self.images, ResidentImages)
        index, first = self._keys(views, places)
        sides = self.images.sides[np.maximum(index, 0)]  # padding shows the first image
        crops = self._crops(views, epoch, index, first, sides[..., 0], sides[..., 1])
        if self.images.one_size:
            return {"crops": crops}
        return {"crops": crops, "largest": tuple(crops[..., 2:4].max((0, 1)).tolist())}

    def _keys(self, views: Views, places: Places) -> tuple[np.ndarray, int | np.ndarray]:
        """Samples and first number of views, as `Augment.draw` takes them."""
        if not self.replace_probability or not views.n_views:
            return places.positions, views.first
        index, number = places.views(views.n_views, views.first)
        return index, number - np.arange(views.n_views)

    def _crops(
        self,
        views: Views,
        epoch: int,
        index: np.ndarray,
        first: int | np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
    ) -> np.ndarray:
        augment = _augment_of(views, epoch)
        if not views.n_views:
            return augment.clean_crops(height, width)
        return augment.draw_crops(self.seed, epoch, index, views.n_views, height, width, first)

    def _decode(self, epoch: int, places: Places) -> list[Any]:
        count = len(places.positions)
        if not self.slots:
            self.make_room(count, 0)
        sides = [_augment_of(views, epoch).size for views in self.views]
        rooms = [pool.take(count, side) for pool, side in zip(self.slots, sides, strict=True)]
        for start in range(0, count, _BLOCK):
            slots = range(start, min(count, start + _BLOCK))
            pictures = [places.open(slot) for slot in slots]
            all_crops = self._own_crops(epoch, places.positions[start : slots.stop], pictures)
            for i, slot in enumerate(slots):
                crops = [c[i] for c in all_crops]
                while (pixels := _pixels(pictures[i], places.replace, slot)) is None:
                    pictures[i] = places.open(slot)  # a spare
                    index = places.positions[slot : slot + 1]
                    crops = [c[0] for c in self._own_crops(epoch, index, [pictures[i]])]
                for side, crop, room in zip(sides, crops, rooms, strict=True):
                    cut_crops(pixels, crop, side, room.array[slot])
            if self.replace_probability:
                self._cut_given(epoch, places, slots, rooms[0].array)
        return [room.tensor() for room in rooms]

    def _own_crops(
        self, epoch: int, index: np.ndarray, pictures: Sequence[Picture]
    ) -> list[np.ndarray]:
        sides = [np.array([p[axis] for p in pictures]) for axis in (0, 1)]
        return [self._crops(v, epoch, index, v.first, *sides) for v in self.views]

    def _cut_given(self, epoch: int, places: Places, slots: range, room: np.ndarray) -> None:
        """Puts views of other images in the place of second views (B, V, S, S, C)."""
        opened = {s: places.open_giver(s) for s in slots if places.givers[s] >= 0}
        opened = {slot: picture for slot, picture in opened.items() if picture is not None}
        if not opened:
            return
        views = self.views[0]
        index, number = (p[list(opened), 1] for p in places.views(views.n_views, views.first))
        sides = [np.array([p[axis] for p in opened.values()]) for axis in (0, 1)]
        one = views._replace(n_views=1)
        crops = self._crops(one, epoch, index, number[:, None], *sides)
        for crop, (slot, picture) in zip(crops, opened.items(), strict=True):
            pixels = _pixels(picture, places.drop_giver, slot)
            if pixels is not None:
                cut_crops(pixels, crop, _augment_of(views, epoch).size, room[slot, 1:2])


def largest_side(augments: Sequence[Augmentation]) -> int:
    """S of the largest views that augmentations of images make, in pixels."""
    return max(augment.size for augment in augments if isinstance(augment, Augment))


def _augment_of(views: Views, epoch: int) -> Augment:
    augment = views.at(epoch)
    assert isinstance(augment, Augment)
    return augment


def _pixels(picture: Picture, replace: Callable[..., None], slot: int) -> np.ndarray | None:
    """(H, W, C) uint8; None if they cannot be decoded, and then ``replace`` has been told."""
    try:
        return picture.pixels(reuse=True)
    except UnreadableSample as error:
        replace(slot, error)
        return None
