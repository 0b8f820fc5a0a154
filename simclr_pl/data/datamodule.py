"""The LightningDataModule: paired views for training, clean views for evaluation.

Symbols: B images of this rank's batch, V views, C channels, S side of a view.
"""

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simclr_pl.augment import Augment
from simclr_pl.data.decode import cut_crops
from simclr_pl.data.sampler import Draw, EvaluationSampler, KeyedSampler
from simclr_pl.data.sources import Images, ResidentImages, Source, as_source
from simclr_pl.errors import InputError
from simclr_pl.image_operations import crop_resize, to_float
from simclr_pl.keyed_random import Stream, permutation

Batch = dict[str, Any]


class _ViewDataset(Dataset[Batch]):
    """Maps a `Draw` to a batch on the CPU; ``n_views`` 0 asks for the clean view."""

    def __init__(
        self, images: Images, augment: Augment, seed: int, n_views: int, channels: int
    ) -> None:
        self.images, self.augment, self.seed = images, augment, seed
        self.n_views, self.channels = n_views, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Batch:
        position = np.maximum(draw.positions, 0)  # padding shows image 0, without label or index
        label = np.where(draw.positions < 0, -1, self.images.labels[position])
        batch: Batch = {"label": label, "index": draw.positions}
        if self.n_views:
            table = self.augment.draw(self.seed, draw.epoch, draw.positions, self.n_views)
            # Bits, not floats: Lightning's precisions 16-true to 64-true would convert these.
            bits = {n: v.view(np.int32) for n, v in table.items() if v.dtype == np.float32}
            batch["table"] = table | bits
        if isinstance(self.images, ResidentImages):
            height, width = (np.full(len(position), s) for s in self.images.pixels.shape[2:])
            batch["crops"] = self._crops(draw.epoch, draw.positions, height, width)
        else:
            batch["images"] = self._decode(self.images.read, draw.epoch, draw.positions)
        batch = _to_tensors(batch)
        return batch

    def _crops(
        self, epoch: int, index: np.ndarray, height: np.ndarray, width: np.ndarray
    ) -> np.ndarray:
        if not self.n_views:
            return self.augment.clean_crops(height, width)
        return self.augment.draw_crops(self.seed, epoch, index, self.n_views, height, width)

    def _decode(self, read: Any, epoch: int, index: np.ndarray) -> np.ndarray:
        size = self.augment.size
        shape = (len(index), max(1, self.n_views), self.channels, size, size)
        images = np.empty(shape, np.uint8)
        for slot, i in enumerate(index):
            pixels = read(max(0, int(i)))  # (H, W, C)
            height, width = np.array([pixels.shape[0]]), np.array([pixels.shape[1]])
            crops = self._crops(epoch, index[slot : slot + 1], height, width)
            cut_crops(pixels, crops[0], size, images[slot])
        return images


def _to_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_tensors(item) for name, item in value.items()}
    return torch.from_numpy(value)


class ContrastiveDataModule(LightningDataModule):
    """Paired augmented views of one source, and clean views for evaluation.

    Training batches are ``views`` (V*B, C, S, S) float, all of view 0 first, ``label`` (B,) and ``index``
    (B,). Every view is a pure function of (seed, epoch, index, view), whatever the number of ranks
    and workers. Validation has two loaders of clean views (B, C, S, S), ``bank`` and ``query``; there,
    rows with index -1 are padding.

    Args:
        source: where the images come from, e.g. `Digits`, `CIFAR10` or `ImageFolder`; from Python also
            any `Dataset` with a length.
        global_batch_size: images (not views) of one step over all ranks.
        n_views: views of each image.
        augment: the augmentation; by default the source's own.
        seed: fixes the order of the images and every random choice about them.
        num_workers: loader processes on each rank; by default one for each core that the rank has,
            none for sets that live in memory.
        bank_size: labelled training images in the bank at most.
        eval_batch_size: images of an evaluation batch on each rank.

    Raises:
        InputError: see `setup`; or a number below 1.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int = 256,
        n_views: int = 2,
        augment: Augment | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        bank_size: int = 50_000,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.source = as_source(source)
        self.global_batch_size = global_batch_size
        self.n_views = n_views
        self.augment = augment or self.source.default_augment()
        self.seed = seed
        self.num_workers = num_workers
        self.bank_size = bank_size
        self.eval_batch_size = eval_batch_size
        for name in ("global_batch_size", "n_views", "bank_size", "eval_batch_size"):
            if getattr(self, name) < (2 if name == "n_views" else 1):
                raise InputError(
                    f"`{name}` must be >= {2 if name == 'n_views' else 1}; got "
                    f"{getattr(self, name)}. Set `data.{name}`."
                )
        self._sets: dict[str, Images] = {}
        self._on_device: dict[str, Tensor] = {}

    # Opening the source.

    def prepare_data(self) -> None:
        """Downloads what is missing, on one rank."""
        self.source.prepare()

    def setup(self, stage: str = "fit") -> None:
        """Opens the source and checks it against the batch and the ranks.

        Raises:
            InputError: the source cannot be opened, the global batch does not divide by the ranks,
                or the set has fewer images than one global batch.
        """
        if not self._sets:
            self.source.open()
            bank = self.source.bank
            labelled = np.flatnonzero((bank.labels >= 0) | (bank.labels.max(initial=-1) < 0))
            order = permutation(len(labelled), self.seed, Stream.SPLIT)
            bank = bank.subset(labelled[np.sort(order[: self.bank_size])])
            self._sets = {"train": self.source.train, "bank": bank, "query": self.source.query}
        if self.global_batch_size % self._world_size:
            raise InputError(
                f"`global_batch_size` must divide by the number of ranks; got "
                f"{self.global_batch_size} for {self._world_size} ranks. Set `data.global_batch_size` to "
                f"{-(-self.global_batch_size // self._world_size) * self._world_size}."
            )
        count = len(self._sets["train"])
        if stage == "fit" and count < self.global_batch_size:
            raise InputError(
                f"the training set must hold at least one global batch; got {count} images for "
                f"`global_batch_size` {self.global_batch_size}. Set `data.global_batch_size` to at most "
                f"{count}, or give more images."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes in the bank; 0 where nothing is labelled. After `setup`."""
        labels = self._sets["bank"].labels
        return int(labels.max()) + 1 if len(labels) else 0

    def describe(self) -> str:
        """One line on the images, for the start of a run. After `setup`."""
        parts = [f"{len(images):,} {name}" for name, images in self._sets.items()]
        resident = isinstance(self._sets["train"], ResidentImages)
        kind = "in memory" if resident else f"read by {self._workers('train')} workers"
        return f"{type(self.source).__name__}: {', '.join(parts)} images, {kind}"

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    # Loaders.

    def train_dataloader(self) -> DataLoader[Batch]:
        """Global batches in the keyed order, this rank's slice of each."""
        sampler = KeyedSampler(
            len(self._sets["train"]),
            self.global_batch_size,
            self.seed,
            self._rank,
            self._world_size,
        )
        return self._loader("train", sampler, self.n_views)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The clean views of the bank and of the query images."""
        return [self._clean_loader("bank"), self._clean_loader("query")]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The clean views of the query images."""
        return self._clean_loader("query")

    def _clean_loader(self, name: str) -> DataLoader[Batch]:
        sampler = EvaluationSampler(
            len(self._sets[name]), self.eval_batch_size, self._rank, self._world_size
        )
        return self._loader(name, sampler, 0)

    def _loader(self, name: str, sampler: Any, n_views: int) -> DataLoader[Batch]:
        images = self._sets[name]
        workers = self._workers(name)
        return DataLoader(
            _ViewDataset(images, self.augment, self.seed, n_views, self.source.channels),
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def _workers(self, name: str) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if isinstance(self._sets[name], ResidentImages):
            return 0
        ranks_here = self.trainer.num_devices if self.trainer else 1
        on_linux = hasattr(os, "sched_getaffinity")  # elsewhere a process may use every core
        cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
        return max(1, cores // ranks_here)

    # The device stage.

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turns a transferred batch into normalised float views, on its device."""
        trainer = self.trainer
        if trainer is None or trainer.training:
            name = "train"
        else:
            name = "query" if trainer.predicting else ("bank", "query")[dataloader_idx]
        return self.make_views(batch, name)

    def make_views(self, batch: Batch, name: str) -> Batch:
        """The device stage for a batch of the set ``name``.

        Args:
            batch: from that set's loader, on any device.
            name: "train", "bank" or "query".

        Returns:
            ``views`` (V*B, C, S, S) float32, ``label`` (B,) and ``index`` (B,) int64.
        """
        images = batch.get("images")  # (B, V, C, S, S) uint8
        if images is None:
            pixels = self._pixels(name, batch["index"].device)[batch["index"].clamp(min=0)]
            images = crop_resize(pixels, batch["crops"], self.augment.size)
        if "table" in batch:
            table = {
                name: value.view(torch.float32) if value.dtype == torch.int32 else value
                for name, value in batch["table"].items()
            }
            views = self.augment.apply(images, table)
        else:
            views = self.augment.normalise(to_float(images[:, 0]))
        return {"views": views, "label": batch["label"], "index": batch["index"]}

    def _pixels(self, name: str, device: torch.device) -> Tensor:
        """The resident pixels of a set, moved to the device once."""
        held = self._on_device.get(name)
        if held is None or held.device != device:
            images = self._sets[name]
            assert isinstance(images, ResidentImages)
            held = self._on_device[name] = images.pixels.to(device)
        return held
