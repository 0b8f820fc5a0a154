"""Weighted kNN on clean views.

Symbols: n rows on this rank, E feature width.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.errors import InputError
from simclr_pl.neighbours import knn_predict


class KNNMonitor(Callback):
    """Classifies the query images by their neighbours in the bank, at every validation.

    Features are those of the clean view in evaluation mode. Exact under DDP: each rank keeps the bank
    rows that it encoded; see `simclr_pl.neighbours.knn_predict`. How often it runs is the trainer's
    ``check_val_every_n_epoch``.

    Logs ``knn/top1`` in [0, 1].

    Args:
        k: neighbours.
        temperature: of the votes, exp(cosine / temperature), > 0.

    Raises:
        InputError: k < 1 or temperature <= 0; at the first validation, if no image is labelled.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        if k < 1:
            raise InputError(f"`k` must be >= 1; got {k}. Set `knn.k`.")
        if not temperature > 0:
            raise InputError(
                f"`temperature` must be > 0; got {temperature}. Set `knn.temperature`."
            )
        self.k, self.temperature = k, temperature
        self._parts: tuple[list[dict[str, Tensor]], ...] = ([], [])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is something to vote with."""
        if stage != "predict" and not trainer.datamodule.num_classes:  # type: ignore[attr-defined]
            raise InputError(
                "the kNN monitor needs labelled images; got none. Set `knn` to null, or give the "
                "images class folders."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the previous features."""
        self._parts = ([], [])

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the features of labelled images."""
        self._parts[dataloader_idx].append(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Votes, and logs the accuracy over the queries of all ranks."""
        bank, query = (_labelled(parts) for parts in self._parts)
        self._parts = ([], [])
        num_classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        predicted = knn_predict(*bank, query[0], num_classes, self.k, self.temperature)
        truth = gather_uneven_rows(query[1])
        top1 = (predicted == truth).float().mean()
        pl_module.log("knn/top1", top1, prog_bar=True, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end


def _labelled(parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    features = torch.cat([part["features"].float() for part in parts])
    label = torch.cat([part["label"] for part in parts])
    return features[label >= 0], label[label >= 0]
