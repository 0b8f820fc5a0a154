"""Pictures, histograms and tables for the trackers that show them, at the steps of the numbers.

Steps are counted as in metrics.csv: the first update is 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def log_picture(
    loggers: Iterable[Logger], key: str, picture: np.ndarray, file: Path, step: int
) -> None:
    """A picture, to wandb and TensorBoard.

    Args:
        loggers: of the trainer.
        key: e.g. "pictures/map".
        picture: (H, W, 3) uint8.
        file: where it is written already.
        step: as in metrics.csv.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(file)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, picture, step, dataformats="HWC")


def log_histogram(loggers: Iterable[Logger], key: str, counts: list[int], step: int) -> None:
    """A histogram over [-1, 1], to wandb and TensorBoard.

    Args:
        loggers: of the trainer.
        key: e.g. "collapse/positives".
        counts: in equal bins.
        step: as in metrics.csv.
    """
    edges = np.linspace(-1, 1, len(counts) + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            histogram = wandb.Histogram(np_histogram=(np.array(counts), edges))
            logger.log_metrics({key: histogram}, step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram_raw(
                key,
                min=-1,
                max=1,
                num=sum(counts),
                sum=float(counts @ middle),
                sum_squares=float(counts @ middle**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts,
                global_step=step,
            )


def log_table(
    loggers: Iterable[Logger], key: str, columns: Mapping[str, Sequence[Any]], step: int
) -> None:
    """A table to sort and filter, to wandb alone.

    Args:
        loggers: of the trainer.
        key: e.g. "pictures/queries".
        columns: plain values by heading, all of one length.
        step: as in metrics.csv.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            logger.log_table(key, list(columns), rows, step=step)
