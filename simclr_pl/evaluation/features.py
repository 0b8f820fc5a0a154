"""Features of clean views, encoded outside the trainer's loops.

Symbols: n images of this rank, N images of all ranks, C channels, S side of a view, E feature width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

_PIXEL_SIDE = 32  # larger views are averaged down to this before pixels are compared


class Labelled(NamedTuple):
    """Features and labels of the labelled images of this rank.

    Attributes:
        features: (n, E) float32.
        labels: (n,) int64, >= 0.
    """

    features: Tensor
    labels: Tensor


def encode_clean_views(
    trainer: Trainer, module: LightningModule, pixels: bool = False
) -> dict[str, tuple[Labelled, Labelled | None]]:
    """Encodes the clean views of the data module's bank and query, outside the trainer's loops.

    Weights, batch-norm statistics and torch's random state are left as they are.

    Args:
        trainer: attached, with a `ContrastiveDataModule`.
        module: maps views (n, C, S, S) to features (n, E); on its device.
        pixels: also return the raw pixels, (n, C * s * s) with s at most 32.

    Returns:
        For "bank" and "query" the features, and the pixels or None, of this rank's labelled images.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    training = module.training
    module.eval()
    result = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, loader in zip(("bank", "query"), data.val_dataloader(), strict=True):
            features, raw, labels = [], [], []
            for batch in loader:
                batch = data.make_views(move_data_to_device(batch, module.device), name)
                keep = (batch["index"] >= 0) & (batch["label"] >= 0)
                with trainer.precision_plugin.val_step_context():
                    features.append(module(batch["views"])[keep].float())
                if pixels:
                    raw.append(_small(batch["views"][keep]))
                labels.append(batch["label"][keep])
            all_labels = torch.cat(labels)
            result[name] = (
                Labelled(torch.cat(features), all_labels),
                Labelled(torch.cat(raw), all_labels) if pixels else None,
            )
    module.train(training)
    return result


def _small(views: Tensor) -> Tensor:
    """(n, C, S, S) -> (n, C*s*s) with s at most 32."""
    if views.shape[-1] > _PIXEL_SIDE:
        views = F.adaptive_avg_pool2d(views, _PIXEL_SIDE)
    return views.flatten(1).float()
