"""The LightningDataModule: paired views for training, clean views for evaluation.

Symbols: B samples of this rank's batch, V views, C channels, S side of a view.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.crop_kernels import is_small
from simclr_pl.data.batches import (
    Batch,
    BatchDataset,
    SampleBatches,
    Views,
    stages,
    with_floats,
)
from simclr_pl.data.image_batches import ImageBatches, largest_side
from simclr_pl.data.image_stage import ImageStage, warm_up
from simclr_pl.data.labels import labelled_part
from simclr_pl.data.loader import Loader
from simclr_pl.data.position import check_order, next_position, steps_done
from simclr_pl.data.resident import fits_on_device, hold
from simclr_pl.data.sampler import EvaluationSampler, KeyedSampler
from simclr_pl.data.sources import Images, ResidentImages, Source, as_source
from simclr_pl.data.unreadable import note, say_converted
from simclr_pl.data.workers import cores
from simclr_pl.errors import InputError


class ContrastiveDataModule(LightningDataModule):
    """Paired augmented views of one source, and clean views for evaluation.

    Training batches are ``views`` (V*B, ...), all of view 0 first, ``label`` (B,) and ``index`` (B,);
    with small views also ``small_views``, of their own size. Views of images are (V*B, C, S, S) float;
    those of other samples are what their augmentation makes. Every view is a pure function of
    (seed, epoch, index, view), whatever the number of ranks and workers. Validation has two loaders of
    clean views (B, ...), ``bank`` and ``query``; there, rows with index -1 are padding.

    A sample that cannot be read is reported once, with its path. In training another one takes its
    place, one that is not in the global batch; in evaluation it is left out.

    Args:
        source: where the samples come from, e.g. `Digits`, `CIFAR10`, `ImageFolder` or `Shards`; from
            Python also any `Dataset` of images with a length.
        global_batch_size: samples (not views) of one step over all ranks.
        n_views: views of each sample; contrastive training needs two or more.
        n_small_views: further, smaller views of each image (multi-crop).
        augment: the augmentation; by default the source's own.
        small_augment: that of the small views; by default `Augment.small` of ``augment``.
        augment_until: other augmentations for the first epochs, each by the epoch, from 0, before which
            it ends: {30: A, 60: B} is A in epochs 0 to 29, B in 30 to 59, ``augment`` after. One of a
            smaller ``size`` is progressive resolution. All have the ``mean`` and ``std`` of ``augment``.
            Small views, clean views and all that is evaluated keep to theirs.
        replace_probability: simulated data: probability that the second view of a sample shows
            another sample of the same global batch, augmented in a way of its own. Batches then hold
            ``ids`` (V, B), the sample that each view shows, and the loss takes views of one sample for
            positives, wherever they stand, and leaves out those that have none.
        seed: fixes the order of the samples and every random choice about them.
        num_workers: loader processes on each rank; by default one for each core that the rank has,
            none for sets that live in memory.
        resident: of images: "memory" decodes the set once and keeps it there, "device" on the
            accelerator, "none" reads each image when it is needed; "auto" keeps a set that takes less
            than a quarter of the free memory, on the accelerator if less than a quarter of its own, and
            where images differ in size at most 2 GiB, for photographs take long to decode.
        bank_size: labelled training samples in the bank at most.
        eval_batch_size: samples of an evaluation batch on each rank.
        max_bad_fraction: share of samples that cannot be read, above which the run stops.

    Raises:
        InputError: see `setup`; a number out of its range; ``augment_until`` does not fit ``augment``;
            too many unreadable samples.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int = 256,
        n_views: int = 2,
        n_small_views: int = 0,
        augment: Augmentation | None = None,
        small_augment: Augmentation | None = None,
        augment_until: dict[int, Augmentation] | None = None,
        replace_probability: float = 0.0,
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
        self.small_augment = small_augment or (
            self.augment.small() if n_small_views else self.augment
        )
        self.augment_until = augment_until
        self.replace_probability = replace_probability
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
        if not 0 <= replace_probability <= 1 or (
            replace_probability and min(n_views, global_batch_size) < 2
        ):
            raise InputError(
                "`replace_probability` must be within [0, 1], and 0 where there are less than two views "
                f"or samples; got {replace_probability} for {n_views} views of {global_batch_size} "
                "samples. Set `data.replace_probability`."
            )
        stages(augment_until, self.augment)
        self.unreadable: dict[str, str] = {}  # name and reason, each reported once
        self._sets: dict[str, Images] = {}
        self._image_stage = ImageStage()

    # Opening the source.

    def prepare_data(self) -> None:
        """Downloads what is missing, on one rank."""
        self.source.prepare()

    def setup(self, stage: str = "fit") -> None:
        """Opens the source and checks it against the batch and the ranks.

        Raises:
            InputError: the source cannot be opened, the global batch does not divide by the ranks,
                or the set has fewer samples than one global batch.
        """
        if not self._sets:
            if self._is_of_images:
                warm_up(self._views("train"), self.source.channels, self._device)
            self.source.open()
            self._check_augment()
            sets = {name: getattr(self.source, name) for name in ("train", "bank", "query")}
            held = sets
            if self._is_of_images and self.resident != "none":
                held = hold(
                    sets,
                    self.resident != "auto",
                    self.source.channels,
                    self._ranks_here,
                    self._cores,
                    quiet=self._rank > 0,
                )
            self._sets = {**held, "bank": labelled_part(held["bank"], self.bank_size, self.seed)}
            if self._rank == 0:
                say_converted(self.source.converted)
            self._note(self.source.left_out, quiet=self._rank > 0)  # the same on every rank
        if self.global_batch_size % self._world_size:
            raise InputError(
                f"`global_batch_size` must divide by the number of ranks; got "
                f"{self.global_batch_size} for {self._world_size} ranks. Set `data.global_batch_size` to "
                f"{-(-self.global_batch_size // self._world_size) * self._world_size}."
            )
        count = len(self.samples("train"))
        if stage == "fit" and count < self.global_batch_size:
            unit = self.source.unit
            raise InputError(
                f"the training set must hold at least one global batch; got {count} {unit} for "
                f"`global_batch_size` {self.global_batch_size}. Set `data.global_batch_size` to at most "
                f"{count}, or give more {unit}."
            )
        epochs = getattr(self.trainer, "max_epochs", None) or -1
        if stage == "fit" and 0 < epochs <= (end := max(self.augment_until or (0,))):
            rank_zero_warn(
                f"`data.augment` comes after epoch {end}, and the run ends after {epochs}: it will never "
                "be trained on. Set `data.augment_until` to end sooner."
            )

    def _check_augment(self) -> None:
        own = self.source.default_augment()
        if self._is_of_images and not isinstance(own, Augment):
            raise InputError(
                f"`augment` must make views of {self.source.unit}; got {type(self.augment).__name__}, "
                f"which is for images. Set `data.augment` to null, for {type(own).__name__}."
            )

    @property
    def _is_of_images(self) -> bool:
        return isinstance(self.augment, Augment)

    def _note(self, found: Iterable[tuple[str, str]], quiet: bool = False) -> None:
        """Reports what cannot be read, as a share of all that the source has."""
        total = sum(len(self.samples(name)) for name in ("train", "query"))
        total += len(self.source.left_out)
        note(self.unreadable, found, total, self.max_bad_fraction, quiet)

    def samples(self, name: str) -> Images:
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
        return bool((self.samples("train").labels >= 0).any())

    def describe(self) -> str:
        """One line on the samples, for the start of a run. After `setup`."""
        parts = [f"{len(images):,} {name}" for name, images in self._sets.items()]
        train = self.samples("train")
        workers = self._workers("train")
        where = f"read by {workers} workers" if workers else "read as they are needed"
        if isinstance(train, ResidentImages):
            place = f"on {self._device}" if self._crops_on_device(train) else "in memory"
            where = f"{train.flat.nbytes / 2**20:,.0f} MiB resident {place}"
        return f"{type(self.source).__name__}: {', '.join(parts)} {self.source.unit}, {where}"

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
            len(self.samples("train")),
            self.global_batch_size,
            self.seed,
            self._rank,
            self._world_size,
        )
        return self._loader("train", sampler, lambda: steps_done(self.trainer))

    def val_dataloader(self) -> list[Loader]:
        """The clean views of the bank and of the query."""
        return [self._clean_loader("bank"), self._clean_loader("query")]

    def test_dataloader(self) -> list[Loader]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        """The clean views of the query."""
        return self._clean_loader("query")

    def _clean_loader(self, name: str) -> Loader:
        sampler = EvaluationSampler(
            len(self.samples(name)), self.eval_batch_size, self._rank, self._world_size
        )
        return self._loader(name, sampler)

    def _loader(
        self,
        name: str,
        sampler: KeyedSampler | EvaluationSampler,
        first_step: Callable[[], int] | None = None,
    ) -> Loader:
        images, order = self.samples(name), sampler if isinstance(sampler, KeyedSampler) else None
        p = self.replace_probability if order else 0.0
        dataset: BatchDataset
        if self._is_of_images:
            on_device = self._crops_on_device(images)
            dataset = ImageBatches(
                images, self._views(name), self.seed, self.source.channels, order, on_device, p
            )
        else:
            dataset = SampleBatches(images, self._views(name), self.seed, order, p)
        workers = self._workers(name)
        dataset.make_room(sampler.batch_size, workers)
        return Loader(dataset, first_step, sampler=sampler, num_workers=workers)

    def augment_at(self, epoch: int) -> Augmentation:
        """The augmentation of training views in an epoch, from 0."""
        return self._views("train")[0].at(epoch)

    def _views(self, name: str) -> list[Views]:
        if name != "train":
            return [Views(self.augment, 0)]
        views = [Views(self.augment, self.n_views, until=stages(self.augment_until, self.augment))]
        if self.n_small_views:
            views.append(Views(self.small_augment, self.n_small_views, self.n_views))
        return views

    def _crops_on_device(self, images: Images) -> bool:
        """Whether the loader leaves resident pixels to the device stage."""
        if not isinstance(images, ResidentImages):
            return False
        if self._device.type == "cpu":  # larger views are cut one by one, by the loader
            return all(is_small(largest_side(v.augments)) for v in self._views("train"))
        return self.resident == "device" or (
            self.resident == "auto" and fits_on_device(images, self._device)
        )

    def _workers(self, name: str) -> int:
        if self.num_workers is not None:
            return self.num_workers
        images = self.samples(name)
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
            ``views`` (V*B, ...), of images (V*B, C, S, S) float32, ``label`` (B,) and ``index`` (B,)
            int64; with small views also ``small_views``; where views may be replaced also ``ids``
            (V, B) and ``row_label`` (V*B,) int64, of the views of all sizes.

        Raises:
            InputError: more than ``max_bad_fraction`` of the samples cannot be read.
        """
        self._note(batch.get("unreadable", ()))
        result: Batch = {
            key: batch[key] for key in ("label", "index", "ids", "row_label") if key in batch
        }
        groups = zip(("views", "small_views"), batch["groups"], self._views(name), strict=False)
        for key, group, views in groups:
            if isinstance(views.augment, Augment):
                result[key] = self._image_stage(self.samples(name), batch, group, views)
            else:
                result[key] = views.at(batch["epoch"]).finish(with_floats(group))
        return result

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
        # (`images` is what checkpoints call the number of samples)
        return {
            "images": len(self.samples("train")),
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
        }
