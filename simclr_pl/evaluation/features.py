"""Features of clean views, from the trainer's validation or beside its other loops.

Symbols: n samples of this rank, E feature width.
"""

from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.augmentation import Augmentation
from simclr_pl.errors import InputError

_NAMES = ("bank", "query")  # the validation's loaders, in order


class Labelled(NamedTuple):
    """Features and labels of the labelled samples of this rank.

    Attributes:
        features: (n, E) float32.
        labels: (n,) int64, >= 0.
    """

    features: Tensor
    labels: Tensor


class Collected:
    """The features of the labelled samples of both sets, batch by batch.

    Args:
        raw: also keep the features that this augmentation has without an encoder, raw pixels of images.
    """

    def __init__(self, raw: Augmentation | None = None) -> None:
        self.raw = raw
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in _NAMES}

    def add(self, name: str, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Keeps what a validation step said of a batch.

        Args:
            name: "bank" or "query".
            outputs: ``features`` (n, E) and ``label`` (n,), without padding.
            batch: ``views`` (B, ...) and ``index`` (B,), n of which are >= 0.
        """
        labelled = outputs["label"] >= 0
        raw = outputs["features"].new_empty(0)
        if self.raw is not None:
            raw = self.raw.raw(batch["views"][batch["index"] >= 0][labelled])
        label = outputs["label"][labelled]
        self._parts[name].append((outputs["features"][labelled].float(), raw, label))

    def take(self, name: str) -> tuple[Labelled, Labelled | None]:
        """A set's features, and those without an encoder or None; forgets both."""
        features, raw, label = (torch.cat(part) for part in zip(*self._parts[name], strict=True))
        self._parts[name] = []
        return Labelled(features, label), Labelled(raw, label) if self.raw else None


class CleanViews(Callback):
    """Collects the features of the labelled samples while the trainer validates.

    Args:
        raw: also collect those without an encoder, see `Augmentation.raw`.

    Attributes:
        collected: by this rank, of the last validation.

    Raises:
        InputError: at the start, if the bank or the query has no labelled sample.
    """

    def __init__(self, raw: bool = False) -> None:
        self.raw = raw
        self.collected = Collected()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are labels to judge by."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        for name in _NAMES:
            if not (data.samples(name).labels >= 0).any():
                raise InputError(
                    f"features are judged by the labels of their {data.source.unit}; got none in the "
                    f"{name} set. Give labels, images by class folders, or another `dataset`."
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the previous features."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.collected = Collected(data.augment if self.raw else None)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps one batch."""
        self.collected.add(_NAMES[dataloader_idx], outputs, batch)


def encode_clean_views(
    trainer: Trainer, module: LightningModule, raw: bool = False
) -> dict[str, tuple[Labelled, Labelled | None]]:
    """Encodes the clean views of the data module's bank and query, outside the trainer's loops.

    Weights, batch-norm statistics and torch's random state are left as they are.

    Args:
        trainer: attached, with a `ContrastiveDataModule`.
        module: its validation step returns features (n, E) and labels (n,); on its device.
        raw: also return the features without an encoder, see `Augmentation.raw`.

    Returns:
        For "bank" and "query" the features, and those without an encoder or None, of this rank's labelled
        samples.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    training = module.training
    module.eval()
    collected = Collected(data.augment if raw else None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for i, (name, loader) in enumerate(zip(_NAMES, data.val_dataloader(), strict=True)):
            for number, batch in enumerate(loader):
                batch = data.make_views(move_data_to_device(batch, module.device), name)
                with trainer.precision_plugin.val_step_context():
                    outputs: Any = module.validation_step(batch, number, i)
                collected.add(name, outputs, batch)
    module.train(training)
    return {name: collected.take(name) for name in _NAMES}
