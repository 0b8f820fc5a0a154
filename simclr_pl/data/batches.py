"""From the numbers of images to a batch of crops on the CPU.

Symbols: B images of this rank's batch, V views, C channels, S side of a view.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from simclr_pl.augment import Augment, Table
from simclr_pl.data.decode import Picture, UnreadableImage, cut_crops
from simclr_pl.data.sampler import Draw, KeyedSampler
from simclr_pl.data.slots import Slots
from simclr_pl.data.sources import Images, ResidentImages
from simclr_pl.data.workers import settle
from simclr_pl.errors import InputError

Batch = dict[str, Any]

_BLOCK = 32  # images opened together: their crops are drawn at once, at a thirtieth of the cost
_ATTEMPTS = 20  # spares that may be unreadable too, before the storage is to blame


class Views(NamedTuple):
    """Views of one size.

    Attributes:
        augment: how they are made.
        n_views: V; 0 asks for the one clean view.
        first: number of the first of them, part of the key of its random choices.
    """

    augment: Augment
    n_views: int
    first: int = 0

    def draw_crops(
        self, seed: int, epoch: int, index: np.ndarray, height: np.ndarray, width: np.ndarray
    ) -> np.ndarray:
        """The crops (B, V, 5) of images of these sizes."""
        if not self.n_views:
            return self.augment.clean_crops(height, width)
        return self.augment.draw_crops(seed, epoch, index, self.n_views, height, width, self.first)


class BatchDataset(Dataset[Batch]):
    """Maps a `Draw` to a batch.

    A batch holds ``label`` and ``index`` (B,) int64 and ``groups``, one for each size of views, of
    ``images`` (B, V, C, S, S) uint8 with the channels last in memory, or the ``crops`` (B, V, 5) to
    cut on the device; and ``table``, the parameters for the device stage, except for clean views.
    An image that cannot be read leaves its name and the reason in ``unreadable``, and its place to a
    spare, or, where there is no order to take spares from, to padding.

    Args:
        images: the set.
        views: the sizes of views wanted.
        seed: of the run.
        channels: C.
        order: of training, for the spares; None in evaluation.
        crop_on_device: leave resident pixels where they are.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[Views],
        seed: int,
        channels: int,
        order: KeyedSampler | None = None,
        crop_on_device: bool = False,
    ) -> None:
        self.images, self.views, self.seed = images, views, seed
        self.channels, self.order, self.crop_on_device = channels, order, crop_on_device
        self.slots: list[Slots] = []  # a pool for each size of views, while loaders are about

    def make_room(self, batch_size: int, workers: int) -> None:
        """Makes the memory for batches of ``batch_size`` images at most, before workers start."""
        if not self.crop_on_device:
            self.slots = [
                Slots(
                    (batch_size, max(1, v.n_views), v.augment.size, v.augment.size, self.channels),
                    workers,
                )
                for v in self.views
            ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Batch:
        """Makes one batch; a user's mistake travels in it, as ``error``, with its plain message."""
        try:
            return self._batch(draw)
        except InputError as error:
            return {"error": str(error)}

    def _batch(self, draw: Draw) -> Batch:
        places = _Places(self.images, draw, self.order, self.channels)
        if self.crop_on_device:
            assert isinstance(self.images, ResidentImages)
            if self.images.unreadable:
                for slot in range(len(draw.positions)):
                    places.open(slot)
            height, width = (np.full(len(draw.positions), n) for n in self.images.pixels.shape[2:])
            groups: list[Batch] = [
                {"crops": v.draw_crops(self.seed, draw.epoch, places.positions, height, width)}
                for v in self.views
            ]
        else:
            groups = [{"images": images} for images in self._decode(draw.epoch, places)]
        for group, views in zip(groups, self.views, strict=True):
            if views.n_views:
                group["table"] = self._table(views, draw.epoch, places.positions)
        index = places.positions
        label = np.where(index < 0, -1, self.images.labels[np.maximum(index, 0)])
        batch: Batch = to_tensors({"label": label, "index": index, "groups": groups})
        if places.unreadable:
            batch["unreadable"] = places.unreadable
        return batch

    def _table(self, views: Views, epoch: int, index: np.ndarray) -> Batch:
        table = views.augment.draw(self.seed, epoch, index, views.n_views, views.first)
        # Bits, not floats: Lightning's precisions 16-true to 64-true would convert these.
        return {
            name: value.view(np.int32) if getattr(value, "dtype", None) == np.float32 else value
            for name, value in table.items()
        }

    def _decode(self, epoch: int, places: "_Places") -> list[Any]:
        count = len(places.positions)
        if not self.slots:
            self.make_room(count, 0)
        rooms = [pool.take(count) for pool in self.slots]
        for start in range(0, count, _BLOCK):
            slots = range(start, min(count, start + _BLOCK))
            pictures = [places.open(slot) for slot in slots]
            all_crops = self._draw_crops(epoch, places.positions[start : slots.stop], pictures)
            for i, slot in enumerate(slots):
                crops = [c[i] for c in all_crops]
                while (pixels := places.pixels(slot, pictures[i])) is None:
                    pictures[i] = places.open(slot)  # a spare
                    index = places.positions[slot : slot + 1]
                    crops = [c[0] for c in self._draw_crops(epoch, index, [pictures[i]])]
                for views, crop, room in zip(self.views, crops, rooms, strict=True):
                    cut_crops(pixels, crop, views.augment.size, room.array[slot])
        return [room.tensor() for room in rooms]

    def _draw_crops(
        self, epoch: int, index: np.ndarray, pictures: Sequence[Picture]
    ) -> list[np.ndarray]:
        height, width = (np.array([p[axis] for p in pictures]) for axis in (0, 1))
        return [v.draw_crops(self.seed, epoch, index, height, width) for v in self.views]


class _Places:
    """The places of one batch, and who takes those of unreadable images."""

    def __init__(
        self, images: Images, draw: Draw, order: KeyedSampler | None, channels: int
    ) -> None:
        self.images, self.draw, self.order = images, draw, order
        self.positions = draw.positions.copy()
        self.unreadable: list[tuple[str, str]] = []  # name, reason
        self._attempts: dict[int, int] = {}
        self._blank = np.zeros((1, 1, channels), np.uint8)

    def open(self, slot: int) -> Picture:
        while self.positions[slot] >= 0:
            try:
                return self.images.open(int(self.positions[slot]))
            except UnreadableImage as error:
                self._replace(slot, error)
        return Picture(1, 1, lambda reuse=False: self._blank)

    def pixels(self, slot: int, picture: Picture) -> np.ndarray | None:
        """(H, W, C) uint8; None if they cannot be decoded, and then another picture is to be opened."""
        try:
            return picture.pixels(reuse=True)
        except UnreadableImage as error:
            self._replace(slot, error)
            return None

    def _replace(self, slot: int, error: UnreadableImage) -> None:
        name = self.images.name(int(self.positions[slot]))
        self.unreadable.append((name, str(error)))
        if self.order is None:
            self.positions[slot] = -1
            return
        attempt = self._attempts[slot] = self._attempts.get(slot, -1) + 1
        spare = self.order.spare(self.draw.epoch, self.draw.step, slot, attempt)
        if spare is None or attempt >= _ATTEMPTS:
            raise InputError(
                f"a batch must consist of readable images; got {len(self.unreadable)} that are not "
                f"and no other to take their place, last {name!r}: {error}. Check that the storage is "
                "there; `simclr data check` lists what is wrong."
            )
        self.positions[slot] = spare


def with_floats(table: Table) -> Table:
    """The table of a batch as `Augment.apply` takes it: bits become floats again."""
    return {
        name: value.view(torch.float32) if getattr(value, "dtype", None) == torch.int32 else value
        for name, value in table.items()
    }


def to_tensors(value: Any) -> Any:
    """Turns the arrays within dicts and lists of dicts into tensors that share their memory."""
    if isinstance(value, dict):
        return {name: to_tensors(item) for name, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [to_tensors(item) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


class Loader(DataLoader[Batch]):
    """A DataLoader of whole batches that knows where to start and how long it was waited for.

    Its iterator starts with the first batch that is asked for: Lightning makes it before the checkpoint
    that it resumes from is read.

    Args:
        dataset: maps a `Draw` to a batch.
        first_step: says how many steps of the epoch are done; of training only.
        options: of the DataLoader; ``sampler`` yields the draws. Lightning copies loaders by these.

    Attributes:
        seconds_waited: for batches so far, in the process that asked.
    """

    def __init__(
        self, dataset: BatchDataset, first_step: Callable[[], int] | None = None, **options: Any
    ) -> None:
        defaults = {
            "batch_size": None,  # the sampler yields whole batches
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": options.get("num_workers", 0) > 0,
            "worker_init_fn": settle,
            "collate_fn": _as_it_is,
        }
        super().__init__(dataset, **{**defaults, **options})
        self.first_step = first_step
        self.seconds_waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches.

        Raises:
            InputError: of the user's, from whatever process.
        """
        if self.first_step is not None:
            assert isinstance(self.sampler, KeyedSampler)
            self.sampler.first_step = self.first_step()
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - begin
            if batch is None:
                return
            if "error" in batch:
                raise InputError(batch["error"])
            yield batch

    # Lightning takes a loader for resumable if it has these two. The position is the trainer's own
    # progress: what Lightning keeps of a loader's state it gives back too late, or not at all.

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing up."""


def _as_it_is(batch: Batch) -> Batch:
    return batch
