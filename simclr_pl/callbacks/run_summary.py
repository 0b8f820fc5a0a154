"""The start-up lines, the final table and `summary.json`.

Symbols: M images of this rank, C channels, S side of a view.
"""

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import simclr_pl
from simclr_pl.callbacks.knn import KNNMonitor
from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.metrics import knn_predict, linear_predict
from simclr_pl.optim import parameter_groups

_PIXEL_SIDE = 32  # larger views are averaged down to this before pixels are compared

Features = tuple[Tensor, Tensor]


class RunSummary(Callback):
    """Says what is about to run, and at the end what came of it.

    With a `KNNMonitor` in the run it scores, by kNN and by logistic regression on frozen features of
    clean views, three encoders by the same rule: the trained one, the one at initialisation, and none at
    all (raw pixels). The latter two are scored in Lightning's sanity check, so they need
    ``trainer.num_sanity_val_steps=-1``. The numbers go to a table on the terminal and to
    ``summary.json`` in the run's folder.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self._pixels: tuple[list[Features], ...] = ([], [])
        self._seconds = 0.0
        self._images = 0
        self._tick: float | None = None
        self._console = Console()

    # Start of the run.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the model, the data and the effective learning rate."""
        if not trainer.is_global_zero:
            return
        for line in _start_lines(trainer, pl_module):
            self._console.print(line, highlight=False)

    # Baselines, in the sanity check before training.

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the pixels of labelled images."""
        if trainer.sanity_checking:
            labelled = batch["label"] >= 0
            pixels = _small(batch["views"][labelled])
            self._pixels[dataloader_idx].append((pixels, batch["label"][labelled]))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the encoder at initialisation and raw pixels."""
        monitor = _knn_monitor(trainer)
        if monitor is None or monitor.bank is None or monitor.query is None:
            return
        self._score("_init", monitor, monitor.bank, monitor.query, trainer)
        bank, query = (
            (torch.cat([p for p, _ in parts]), torch.cat([label for _, label in parts]))
            for parts in self._pixels
        )
        self._pixels = ([], [])
        self._score("_pixels", monitor, bank, query, trainer)

    def _score(
        self, suffix: str, monitor: KNNMonitor, bank: Features, query: Features, trainer: Trainer
    ) -> None:
        """Adds ``knn_top1`` and ``linear_top1`` with the suffix; collective."""
        num_classes: int = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        with torch.autocast(bank[0].device.type, enabled=False), torch.inference_mode(False):
            truth = gather_uneven_rows(query[1])
            predicted = knn_predict(*bank, query[0], num_classes, monitor.k, monitor.temperature)
            self.scores["knn_top1" + suffix] = _share(predicted, truth)
            features, labels = gather_uneven_rows(bank[0]), gather_uneven_rows(bank[1])
            queries = gather_uneven_rows(query[0])
            if trainer.is_global_zero:
                predicted = linear_predict(
                    features.clone(), labels.clone(), queries.clone(), num_classes
                )
                self.scores["linear_top1" + suffix] = _share(predicted, truth)
        trainer.strategy.barrier()

    # Throughput: the time inside training epochs that is not validation.

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._tick = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._stop_clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again."""
        if not trainer.sanity_checking:
            self._tick = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._tick is not None:
            self._seconds += time.perf_counter() - self._tick
            self._tick = None

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the images of all ranks."""
        self._images += len(outputs["index"]) * trainer.world_size

    # End of the run.

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the trained encoder, writes `summary.json` and prints the table."""
        monitor = _knn_monitor(trainer)
        if monitor is not None and monitor.bank is not None and monitor.query is not None:
            self._score("", monitor, monitor.bank, monitor.query, trainer)
        summary = self._summary(trainer)
        folder = trainer.log_dir or trainer.default_root_dir  # collective
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams({f"summary/{key}": value for key, value in summary.items()})
        self._print_table(summary, folder)

    def _summary(self, trainer: Trainer) -> dict[str, Any]:
        probe = trainer.callback_metrics.get("probe/top1")
        return {
            **{key: round(value, 6) for key, value in sorted(self.scores.items())},
            **({"probe_top1": round(float(probe), 6)} if probe is not None else {}),
            "images_per_second": round(self._images / max(self._seconds, 1e-9), 2),
            "steps": trainer.global_step,
            "seconds": round(self._seconds, 3),
            "global_batch_size": getattr(trainer.datamodule, "global_batch_size", None),  # type: ignore[attr-defined]
            "world_size": trainer.world_size,
            "version": simclr_pl.__version__,
        }

    def _print_table(self, summary: dict[str, Any], folder: str) -> None:
        if any(key.startswith("knn_top1") for key in summary):
            table = Table(title="Accuracy on the query images, %")
            for heading in ("", "trained", "at initialisation", "raw pixels"):
                table.add_column(heading, justify="right")
            for name, key in (("kNN", "knn_top1"), ("linear", "linear_top1")):
                cells = [summary.get(key + suffix) for suffix in ("", "_init", "_pixels")]
                table.add_row(name, *("-" if c is None else f"{100 * c:.1f}" for c in cells))
            self._console.print(table)
        self._console.print(
            f"{summary['steps']:,} steps in {summary['seconds']:.1f} s, "
            f"{summary['images_per_second']:,.0f} images per second; files in {folder}",
            highlight=False,
            soft_wrap=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Scores and clock, so that a resumed run keeps its baselines."""
        return {"scores": self.scores, "seconds": self._seconds, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self.scores = dict(state_dict["scores"])
        self._seconds, self._images = state_dict["seconds"], state_dict["images"]


def _knn_monitor(trainer: Trainer) -> KNNMonitor | None:
    return next((c for c in trainer.callbacks if isinstance(c, KNNMonitor)), None)  # type: ignore[attr-defined]


def _share(predicted: Tensor, truth: Tensor) -> float:
    return (predicted == truth).float().mean().item()


def _small(views: Tensor) -> Tensor:
    """(M, C, S, S) -> (M, C*s*s) with s at most 32."""
    if views.shape[-1] > _PIXEL_SIDE:
        views = F.adaptive_avg_pool2d(views, _PIXEL_SIDE)
    return views.flatten(1).float()


def _start_lines(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    model = sum(p.numel() for p in pl_module.parameters())
    encoder = sum(p.numel() for p in cast(nn.Module, pl_module.encoder).parameters())
    _, exempt = parameter_groups(pl_module)
    optimizer = trainer.optimizers[0]
    data = trainer.datamodule  # type: ignore[attr-defined]
    lines = [
        f"{encoder / 1e6:.2f} M encoder parameters, {(model - encoder) / 1e6:.2f} M in the head; "
        f"features of width {pl_module.num_features}",
        f"{type(optimizer).__name__}, effective peak learning rate "
        f"{optimizer.param_groups[0]['initial_lr']:.4g}; {len(exempt)} tensors exempt from "
        f"decay and adaptation: {_shorten(exempt)}",
    ]
    if hasattr(data, "describe"):
        lines.insert(0, data.describe())
        lines.append(
            f"global batch {data.global_batch_size} on {trainer.world_size} rank(s); "
            f"{trainer.estimated_stepping_batches:,} steps; precision {trainer.precision}"
        )
    return lines


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
