"""Writes what `simclr predict` computes.

Symbols: M images on all ranks, E feature width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.distributed import gather_uneven_rows


class FeatureWriter(Callback):
    """Writes ``features.npz`` into the run's folder at the end of a prediction.

    It holds ``features`` (M, E) float32, ``label`` (M,) and ``index`` (M,) int64, ordered by index.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps one batch's features."""
        self._parts.append({name: value.cpu() for name, value in outputs.items()})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the ranks' features and writes them."""
        table = {}
        for name in self._parts[0]:
            value = torch.cat([part[name] for part in self._parts]).to(pl_module.device)
            table[name] = gather_uneven_rows(value).cpu()
        self._parts = []
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            order = table["index"].argsort()
            table["features"] = table["features"].float()
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "features.npz"
            arrays: dict[str, Any] = {n: value[order].numpy() for n, value in table.items()}
            np.savez(path, **arrays)
            print(f"{len(order):,} features in {path}")
