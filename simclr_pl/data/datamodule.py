"""The LightningDataModule: paired views for training, clean views for evaluation.

Symbols: B images of this rank's batch, V views, C channels, S side of a view.
"""

from collections.abc import Callable
from threading import Timer
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from simclr_pl.augment import Augment
from simclr_pl.cpu import recycled
from simclr_pl.crop_kernels import crop_rows, is_small, resize
from simclr_pl.data.batches import Batch, BatchDataset, Loader, Views, to_tensors, with_floats
from simclr_pl.data.labels import labelled_part
from simclr_pl.data.position import check_order, next_position, steps_done
from simclr_pl.data.resident import fits_on_device, hold
from simclr_pl.data.sampler import EvaluationSampler, KeyedSampler
from simclr_pl.data.sources import Images, ResidentImages, Source, as_source
from simclr_pl.data.unreadable import note
from simclr_pl.data.workers import cores
from simclr_pl.errors import InputError
from simclr_pl.image_operations import crop_resize, to_float


class ContrastiveDataModule(LightningDataModule):
    """Paired augmented views of one source, and clean views for evaluation.

    Training batches are ``views`` (V*B, C, S, S) float, all of view 0 first, ``label`` (B,) and ``index``
    (B,); with small views also ``small_views``, of their own size. Every view is a pure function of
    (seed, epoch, index, view), whatever the number of ranks and workers. Validation has two loaders of
    clean views (B, C, S, S), ``bank`` and ``query``; there, rows with index -1 are padding.

    An image that cannot be read is reported once, with its path. In training another image takes its
    place, one that is not in the global batch; in evaluation it is left out.

    Args:
        source: where the images come from, e.g. `Digits`, `CIFAR10`, `ImageFolder` or `Shards`; from
            Python also any `Dataset` with a length.
        global_batch_size: images (not views) of one step over all ranks.
        n_views: views of each image; contrastive training needs two or more.
        n_small_views: further, smaller views of each image (multi-crop).
        augment: the augmentation; by default the source's own.
        small_augment: that of the small views; by default `Augment.small` of ``augment``.
        seed: fixes the order of the images and every random choice about them.
        num_workers: loader processes on each rank; by default one for each core that the rank has,
            none for sets that live in memory.
        resident: "memory" decodes the set once and keeps it there, "device" on the accelerator, "none"
            reads each image when it is needed; "auto" keeps images of one size that take less than a
            quarter of the free memory, on the accelerator if less than a quarter of its own.
        bank_size: labelled training images in the bank at most.
        eval_batch_size: images of an evaluation batch on each rank.
        max_bad_fraction: share of images that cannot be read, above which the run stops.

    Raises:
        InputError: see `setup`; a number out of its range; too many unreadable images.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int = 256,
        n_views: int = 2,
        n_small_views: int = 0,
        augment: Augment | None = None,
        small_augment: Augment | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        resident: Literal["auto", "memory", "device", "none"] = "auto",
        bank_size: int = 50_000,
        eval_batch_size: int = 256,
        max_bad_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        self.source = as_source(source)
        self.global_batch_size = global_batch_size
        self.n_views = n_views
        self.n_small_views = n_small_views
        self.augment = augment or self.source.default_augment()
        self.small_augment = small_augment or self.augment.small()
        self.seed = seed
        self.num_workers = num_workers
        self.resident = resident
        self.bank_size = bank_size
        self.eval_batch_size = eval_batch_size
        self.max_bad_fraction = max_bad_fraction
        lowest = {"global_batch_size": 1, "n_views": 1, "n_small_views": 0, "max_bad_fraction": 0}
        for name, least in {**lowest, "bank_size": 1, "eval_batch_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(
                    f"`{name}` must be >= {least}; got {getattr(self, name)}. Set `data.{name}`."
                )
        self.unreadable: dict[str, str] = {}  # name and reason, each reported once
        self._sets: dict[str, Images] = {}
        self._on_device: dict[int, Tensor] = {}

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
            self._warm_up()
            self.source.open()
            sets = {name: getattr(self.source, name) for name in ("train", "bank", "query")}
            held = sets
            if self.resident != "none":
                held = hold(
                    sets,
                    self.resident != "auto",
                    self.source.channels,
                    self._ranks_here,
                    self._cores,
                    quiet=self._rank > 0,
                )
            self._sets = {**held, "bank": labelled_part(held["bank"], self.bank_size, self.seed)}
        if self.global_batch_size % self._world_size:
            raise InputError(
                f"`global_batch_size` must divide by the number of ranks; got "
                f"{self.global_batch_size} for {self._world_size} ranks. Set `data.global_batch_size` to "
                f"{-(-self.global_batch_size // self._world_size) * self._world_size}."
            )
        count = len(self.images("train"))
        if stage == "fit" and count < self.global_batch_size:
            raise InputError(
                f"the training set must hold at least one global batch; got {count} images for "
                f"`global_batch_size` {self.global_batch_size}. Set `data.global_batch_size` to at most "
                f"{count}, or give more images."
            )

    def _warm_up(self) -> None:
        """Compiles the CPU's kernels, or loads them, before the first step and before workers start."""
        text = "Compiling the kernels for the CPU; later runs load them."
        late = Timer(2.0, rank_zero_info, [text])
        late.start()
        try:
            for views in self._views("train"):
                size, channels = views.augment.size, self.source.channels
                images = np.zeros((1, views.n_views, size, size, channels), np.uint8)
                crops = np.array([[[0, 0, 2, 3, 0]]])
                crop_rows(np.zeros((1, 2, 3, channels), np.uint8), np.zeros(1, int), crops, images)
                resize(np.zeros((2, 3, channels), np.uint8), size, size, False, images[0, 0])
                if self._device.type == "cpu":
                    table = to_tensors(views.augment.draw(0, 0, np.arange(1), views.n_views))
                    views.augment.apply(torch.from_numpy(images).permute(0, 1, 4, 2, 3), table)
        finally:
            late.cancel()

    def images(self, name: str) -> Images:
        """The open set "train", "bank" or "query". After `setup`."""
        return self._sets[name]

    @property
    def num_classes(self) -> int:
        """Number of classes of all three sets; 0 where the bank has no label. After `setup`."""
        highest = {n: int(images.labels.max(initial=-1)) for n, images in self._sets.items()}
        return max(highest.values()) + 1 if highest["bank"] >= 0 else 0

    @property
    def train_is_labelled(self) -> bool:
        """Whether any training image has a label. After `setup`."""
        return bool((self.images("train").labels >= 0).any())

    def describe(self) -> str:
        """One line on the images, for the start of a run. After `setup`."""
        parts = [f"{len(images):,} {name}" for name, images in self._sets.items()]
        train = self.images("train")
        workers = self._workers("train")
        where = f"read by {workers} workers" if workers else "read as they are needed"
        if isinstance(train, ResidentImages):
            place = f"on {self._device}" if self._crops_on_device(train) else "in memory"
            where = f"{train.pixels.nbytes / 2**20:,.0f} MiB resident {place}"
        return f"{type(self.source).__name__}: {', '.join(parts)} images, {where}"

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _ranks_here(self) -> int:
        return self.trainer.num_devices if self.trainer else 1

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def _cores(self) -> int:
        """Cores for each rank on this machine."""
        return max(1, cores() // self._ranks_here)

    # Loaders.

    def train_dataloader(self) -> Loader:
        """Global batches in the keyed order, this rank's slice of each."""
        sampler = KeyedSampler(
            len(self.images("train")),
            self.global_batch_size,
            self.seed,
            self._rank,
            self._world_size,
        )
        return self._loader("train", sampler, lambda: steps_done(self.trainer))

    def val_dataloader(self) -> list[Loader]:
        """The clean views of the bank and of the query images."""
        return [self._clean_loader("bank"), self._clean_loader("query")]

    def test_dataloader(self) -> list[Loader]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        """The clean views of the query images."""
        return self._clean_loader("query")

    def _clean_loader(self, name: str) -> Loader:
        sampler = EvaluationSampler(
            len(self.images(name)), self.eval_batch_size, self._rank, self._world_size
        )
        return self._loader(name, sampler)

    def _loader(
        self,
        name: str,
        sampler: KeyedSampler | EvaluationSampler,
        first_step: Callable[[], int] | None = None,
    ) -> Loader:
        images = self.images(name)
        dataset = BatchDataset(
            images,
            self._views(name),
            self.seed,
            self.source.channels,
            sampler if isinstance(sampler, KeyedSampler) else None,
            self._crops_on_device(images),
        )
        workers = self._workers(name)
        dataset.make_room(sampler.batch_size, workers)
        return Loader(dataset, first_step, sampler=sampler, num_workers=workers)

    def _views(self, name: str) -> list[Views]:
        if name != "train":
            return [Views(self.augment, 0)]
        views = [Views(self.augment, self.n_views)]
        if self.n_small_views:
            views.append(Views(self.small_augment, self.n_small_views, self.n_views))
        return views

    def _crops_on_device(self, images: Images) -> bool:
        """Whether the loader leaves resident pixels to the device stage."""
        if not isinstance(images, ResidentImages):
            return False
        if self._device.type == "cpu":  # larger views are cut one by one, by the loader
            return all(is_small(views.augment.size) for views in self._views("train"))
        return self.resident == "device" or (
            self.resident == "auto" and fits_on_device(images, self._device)
        )

    def _workers(self, name: str) -> int:
        if self.num_workers is not None:
            return self.num_workers
        images = self.images(name)
        # Sets in memory are quick to crop; on the CPU workers would only take the model's cores.
        if self._crops_on_device(images) or (
            isinstance(images, ResidentImages) and self._device.type == "cpu"
        ):
            return 0
        return self._cores

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
            ``views`` (V*B, C, S, S) float32, ``label`` (B,) and ``index`` (B,) int64; with small views
            also ``small_views``.

        Raises:
            InputError: more than ``max_bad_fraction`` of the images cannot be read.
        """
        total = len(self.images("train")) + len(self.images("query"))
        note(self.unreadable, batch.get("unreadable", ()), total, self.max_bad_fraction)
        result = {"label": batch["label"], "index": batch["index"]}
        groups = zip(("views", "small_views"), batch["groups"], self._views(name), strict=False)
        for key, group, views in groups:
            images = group.get("images")  # (B, V, C, S, S) uint8
            if images is None:
                images = self._crop(name, batch["index"], group["crops"], views.augment.size)
            if "table" in group:
                result[key] = views.augment.apply(images, with_floats(group["table"]))
            else:
                result[key] = views.augment.normalise(to_float(images[:, 0]))
        return result

    def _crop(self, name: str, index: Tensor, crops: Tensor, size: int) -> Tensor:
        """Crops (B, V, C, S, S) of resident images; padding shows the first one."""
        images = self.images(name)
        assert isinstance(images, ResidentImages)
        index = index.clamp(min=0)
        if index.device.type == "cpu" and is_small(size):
            pixels = images.pixels.permute(0, 2, 3, 1).numpy()  # (M, H, W, C)
            out = recycled((*crops.shape[:2], size, size, pixels.shape[3]), np.uint8)
            crop_rows(pixels, index.numpy(), crops.numpy(), out)
            return torch.from_numpy(out).permute(0, 1, 4, 2, 3)
        key = images.pixels.data_ptr()  # the bank may be the training set: moved once
        held = self._on_device.get(key)
        if held is None or held.device != index.device:
            held = self._on_device[key] = images.pixels.to(index.device)
        return crop_resize(held[index], crops, size)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The place in the order of the images, and what was reported, not to be repeated."""
        reported = {"unreadable": dict(self.unreadable)}
        if self.trainer is None:
            return reported
        return {**reported, "order": self._order, **next_position(self.trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again.

        Raises:
            InputError: the checkpoint is of the middle of an epoch that has another order here.
        """
        self.unreadable.update(state_dict["unreadable"])
        if self.trainer is not None and self.trainer.state.fn == "fit":
            check_order(state_dict, self._order)

    @property
    def _order(self) -> dict[str, int]:
        """What fixes the global batches of an epoch, whatever the number of ranks."""
        return {
            "images": len(self.images("train")),
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
        }
