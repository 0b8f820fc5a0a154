"""From the numbers of samples to a batch on the CPU.

Symbols: B samples of this rank's batch, V views.
"""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation, Rows, Table
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.places import Places
from simclr_pl.data.sampler import Draw, KeyedSampler
from simclr_pl.data.sources import Images
from simclr_pl.errors import InputError

Batch = dict[str, Any]


class Views(NamedTuple):
    """Views of one size.

    Attributes:
        augment: how they are made.
        n_views: V; 0 asks for the one clean view.
        first: number of the first of them, part of the key of its random choices.
        until: other augmentations for the first epochs: pairs of one and the epoch, from 0, before
            which it ends, in this order.
    """

    augment: Augmentation
    n_views: int
    first: int = 0
    until: tuple[tuple[int, Augmentation], ...] = ()

    def at(self, epoch: int) -> Augmentation:
        """The augmentation of an epoch, from 0."""
        return next((other for end, other in self.until if epoch < end), self.augment)

    @property
    def augments(self) -> list[Augmentation]:
        """Those of all epochs, in their order."""
        return [*(other for _, other in self.until), self.augment]


def stages(
    until: Mapping[int, Augmentation] | None, augment: Augmentation
) -> tuple[tuple[int, Augmentation], ...]:
    """Checks and sorts the augmentations of the first epochs; all normalise as ``augment`` does.

    Args:
        until: by the epoch, from 0, before which each ends.
        augment: what follows them.

    Raises:
        InputError: an end < 1, or an augmentation of another kind of samples.
    """
    pairs = []
    for end, other in sorted((until or {}).items()):
        if end < 1:
            raise InputError(
                f"the epochs before which augmentations end must be >= 1; got {end}. Set "
                "`data.augment_until`."
            )
        if isinstance(other, Augment) != isinstance(augment, Augment):
            raise InputError(
                f"`augment_until` must make views of what `augment` does; got {type(other).__name__} "
                f"until epoch {end}, then {type(augment).__name__}. Set `data.augment_until`."
            )
        for name in ("mean", "std"):
            ours = getattr(augment, name, None)
            if not np.array_equal(getattr(other, name, None), ours):  # type: ignore[arg-type]
                other = copy.copy(other)
                setattr(other, name, ours)
        pairs.append((end, other))
    return tuple(pairs)


class BatchDataset(Dataset[Batch]):
    """Maps a `Draw` to a batch.

    A batch holds ``label`` and ``index`` (B,) int64, ``epoch``, an int that stays on the host, and
    ``groups``, one for each size of views, what `Augmentation.prepare` says, with the views of a
    sample beside each other or not. A sample that cannot be read leaves its name and the reason in
    ``unreadable``, and its place to a spare, or, where there is no order to take spares from, to
    padding. Where views may be replaced, the batch also holds ``ids`` (V, B) int64, the sample that each
    view shows, views of all sizes.

    Args:
        images: the set.
        views: the sizes of views wanted.
        seed: of the run.
        order: of training, for the spares; None in evaluation.
        replace_probability: of a second view that shows another sample of the global batch.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[Views],
        seed: int,
        order: KeyedSampler | None = None,
        replace_probability: float = 0.0,
    ) -> None:
        self.images, self.views, self.seed = images, views, seed
        self.order, self.replace_probability = order, replace_probability

    def make_room(self, batch_size: int, workers: int) -> None:
        """Makes the memory for batches of ``batch_size`` samples at most, before workers start."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Batch:
        """Makes one batch; a user's mistake travels in it, as ``error``, with its plain message."""
        try:
            return self._batch(draw)
        except InputError as error:
            return {"error": str(error)}

    def _batch(self, draw: Draw) -> Batch:
        places = Places(
            self.images,
            draw,
            self._blank,
            self.order,
            self.replace_probability,
            sum(v.n_views for v in self.views),
        )
        groups = self._groups(draw.epoch, places)
        index = places.positions
        labels = self.images.labels
        content: Batch = {"label": np.where(index < 0, -1, labels[np.maximum(index, 0)])}
        content |= {"index": index, "groups": groups, "epoch": draw.epoch}
        if self.replace_probability and self.order is not None:
            shown = [places.views(v.n_views, v.first)[0].T for v in self.views]
            content["ids"] = np.concatenate(shown)
            content["row_label"] = labels[content["ids"]].ravel()
        batch: Batch = to_tensors(content)
        if places.unreadable:
            batch["unreadable"] = places.unreadable
        return batch

    @abstractmethod
    def _groups(self, epoch: int, places: Places) -> list[Batch]:
        """What the device stage gets, for each size of views."""

    @abstractmethod
    def _blank(self) -> Any:
        """What stands in the place of padding."""


class SampleBatches(BatchDataset):
    """Batches of samples of any kind: each group is what its `Augmentation.prepare` makes."""

    def _groups(self, epoch: int, places: Places) -> list[Batch]:
        count = len(places.positions)
        samples = [places.open(slot) for slot in range(count)]
        given = {slot: places.open_giver(slot) for slot in places.given()}
        try:
            return [guarded(t) for t in self._prepared(epoch, places, samples, given, range(count))]
        except UnreadableSample:  # of one of them, whose content was not read until now
            self._settle(epoch, places, samples, given)
        return [guarded(t) for t in self._prepared(epoch, places, samples, given, range(count))]

    def _prepared(
        self,
        epoch: int,
        places: Places,
        samples: Sequence[Any],
        given: dict[int, Any],
        slots: Sequence[int],
    ) -> list[Table]:
        """The groups of the places ``slots`` alone."""
        groups = []
        for views in self.views:
            augment, n_views, first = views.at(epoch), views.n_views, views.first
            if not n_views:
                groups.append(augment.prepare([samples[slot] for slot in slots], None))
                continue
            index, number = (part[list(slots)].T for part in places.views(n_views, first))  # (V, B)
            shown = [
                given[slot] if v + first == 1 and places.givers[slot] >= 0 else samples[slot]
                for v in range(n_views)
                for slot in slots
            ]
            rows = Rows(self.seed, epoch, index.ravel(), number.ravel())
            groups.append(augment.prepare(shown, rows))
        return groups

    def _settle(
        self, epoch: int, places: Places, samples: list[Any], given: dict[int, Any]
    ) -> None:
        """Replaces every sample whose content cannot be read, one place after the other."""
        for slot in range(len(samples)):
            while True:
                giver, places.givers[slot] = places.givers[slot], -1
                try:
                    self._prepared(epoch, places, samples, given, [slot])
                except UnreadableSample as error:
                    places.givers[slot] = giver
                    places.replace(slot, error)
                    samples[slot] = places.open(slot)
                    continue
                places.givers[slot] = giver
                break
            if places.givers[slot] >= 0:
                try:
                    self._prepared(epoch, places, samples, given, [slot])
                except UnreadableSample as error:
                    places.drop_giver(slot, error)

    def _blank(self) -> Any:
        for i in range(len(self.images)):
            try:
                sample = self.images.open(i)
                for views in self.views:
                    views.augment.prepare([sample], None)
            except UnreadableSample:
                continue
            return sample
        raise InputError(
            f"a set must hold readable samples; got none of {len(self.images):,}. Check the data."
        )


def guarded(table: Table) -> Table:
    """A table whose float arrays travel as bits.

    Lightning's precisions 16-true to 64-true would convert floats.
    """
    result = {}
    for name, value in table.items():
        if isinstance(value, dict):
            value = guarded(value)
        elif getattr(value, "dtype", None) in (np.float32, np.float64):
            value = {"bits": value.astype(np.float32, copy=False).view(np.int32)}
        result[name] = value
    return result


def with_floats(table: Table) -> Table:
    """A guarded table as the augmentations take it: bits become floats again."""
    result = {}
    for name, value in table.items():
        if isinstance(value, dict):
            bits = value.keys() == {"bits"}
            value = value["bits"].view(torch.float32) if bits else with_floats(value)
        result[name] = value
    return result


def to_tensors(value: Any) -> Any:
    """Turns the arrays within dicts and lists of dicts into tensors that share their memory."""
    if isinstance(value, dict):
        return {name: to_tensors(item) for name, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [to_tensors(item) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
