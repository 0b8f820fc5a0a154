"""Features of clean views, from the trainer's validation or beside its other loops.

Symbols: n images of this rank, C channels, S side of a view, E feature width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.errors import InputError

_PIXEL_SIDE = 32  # larger views are averaged down to this before pixels are compared
_NAMES = ("bank", "query")  # the validation's loaders, in order


class Labelled(NamedTuple):
    """Features and labels of the labelled images of this rank.

    Attributes:
        features: (n, E) float32.
        labels: (n,) int64, >= 0.
    """

    features: Tensor
    labels: Tensor


def raw_pixels(views: Tensor) -> Tensor:
    """Views (n, C, S, S) as features (n, C * s * s) float32, averaged down to a side s of at most 32."""
    if views.shape[-1] > _PIXEL_SIDE:
        views = F.adaptive_avg_pool2d(views, _PIXEL_SIDE)
    return views.flatten(1).float()


class Collected:
    """The features of the labelled images of both sets, batch by batch.

    Args:
        pixels: keep the raw pixels, too.
    """

    def __init__(self, pixels: bool = False) -> None:
        self.pixels = pixels
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in _NAMES}

    def add(self, name: str, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Keeps what a validation step said of a batch.

        Args:
            name: "bank" or "query".
            outputs: ``features`` (n, E) and ``label`` (n,), without padding.
            batch: ``views`` (B, C, S, S) and ``index`` (B,), n of which are >= 0.
        """
        labelled = outputs["label"] >= 0
        raw = outputs["features"].new_empty(0)
        if self.pixels:
            raw = raw_pixels(batch["views"][batch["index"] >= 0][labelled])
        label = outputs["label"][labelled]
        self._parts[name].append((outputs["features"][labelled].float(), raw, label))

    def take(self, name: str) -> tuple[Labelled, Labelled | None]:
        """A set's features, and its pixels (n, C * s * s) with s at most 32, or None; forgets both."""
        features, raw, label = (torch.cat(part) for part in zip(*self._parts[name], strict=True))
        self._parts[name] = []
        return Labelled(features, label), Labelled(raw, label) if self.pixels else None


class CleanViews(Callback):
    """Collects the features of the labelled images while the trainer validates.

    Args:
        pixels: collect the raw pixels, too.

    Attributes:
        collected: by this rank, of the last validation.

    Raises:
        InputError: at the start, if the bank or the query has no labelled image.
    """

    def __init__(self, pixels: bool = False) -> None:
        self.pixels = pixels
        self.collected = Collected(pixels)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are labels to judge by."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        for name in _NAMES:
            if not (data.images(name).labels >= 0).any():
                raise InputError(
                    f"features are judged by the labels of their images; got none in the {name} set. "
                    "Give the images class folders, or another `dataset`."
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the previous features."""
        self.collected = Collected(self.pixels)

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
    trainer: Trainer, module: LightningModule, pixels: bool = False
) -> dict[str, tuple[Labelled, Labelled | None]]:
    """Encodes the clean views of the data module's bank and query, outside the trainer's loops.

    Weights, batch-norm statistics and torch's random state are left as they are.

    Args:
        trainer: attached, with a `ContrastiveDataModule`.
        module: its validation step returns features (n, E) and labels (n,); on its device.
        pixels: also return the raw pixels, (n, C * s * s) with s at most 32.

    Returns:
        For "bank" and "query" the features, and the pixels or None, of this rank's labelled images.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    training = module.training
    module.eval()
    collected = Collected(pixels)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for i, (name, loader) in enumerate(zip(_NAMES, data.val_dataloader(), strict=True)):
            for number, batch in enumerate(loader):
                batch = data.make_views(move_data_to_device(batch, module.device), name)
                with trainer.precision_plugin.val_step_context():
                    outputs: Any = module.validation_step(batch, number, i)
                collected.add(name, outputs, batch)
    module.train(training)
    return {name: collected.take(name) for name in _NAMES}
