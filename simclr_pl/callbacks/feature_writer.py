"""Writes features to disk while the trainer predicts.

Symbols: n samples of a batch on all ranks, M in all, E feature width, K neighbours.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.errors import InputError
from simclr_pl.evaluation.tables import TableWriter, table_writer, writer_class
from simclr_pl.neighbours import find_neighbours


class FeatureWriter(Callback):
    """Writes the features of a prediction, in constant memory, as one table in the samples' order.

    Its columns are ``features`` (M, E) float32, ``label`` (M,) int64 (-1 where there is none), ``index``
    (M,) int64, the sample's number, and ``path`` (M,), what the source calls it. Samples that cannot be
    read are left out. The file appears when it is whole.

    With ``neighbours`` a second table, NAME.neighbours.SUFFIX, follows: ``index`` (M,), ``neighbour``
    (M, K) int64, the numbers of the samples with the most similar features, the sample itself left out,
    and ``similarity`` (M, K) float32, their cosines. For that search, which is exact, each rank keeps its
    share of the features, 4 * M * E / W bytes on W ranks.

    Args:
        path: of the file; .parquet or .npz is its format. By default features.npz in the run's folder.
        neighbours: of each sample, K.

    Raises:
        InputError: the suffix is another, or ``neighbours`` < 0.
    """

    def __init__(self, path: str | None = None, neighbours: int = 0) -> None:
        if neighbours < 0:
            raise InputError(f"`neighbours` must be >= 0; got {neighbours}. Set `neighbours`.")
        if path is not None:
            writer_class(Path(path))
        self.path, self.neighbours = path, neighbours
        self._writer: TableWriter | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []  # features and index of each batch

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file, on rank 0."""
        folder = trainer.log_dir or trainer.default_root_dir  # collective
        self._file = Path(folder, "features.npz") if self.path is None else Path(self.path)
        self._writer, self._kept = None, []
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._writer = table_writer(self._file)

    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Brings one batch of all ranks together and writes it."""
        features = outputs["features"].float()
        if self.neighbours:
            self._kept.append((features, outputs["index"]))
        everything = (features, outputs["label"], outputs["index"])
        # The sampler deals the samples out to the ranks one by one: together they are a whole stretch.
        features, label, index = (gather_uneven_rows(part).cpu() for part in everything)
        if self._writer is None or not len(index):
            return
        order = index.argsort()
        images = trainer.datamodule.source.query  # type: ignore[attr-defined]
        block = {
            "features": features[order].numpy(),
            "label": label[order].numpy(),
            "index": index[order].numpy(),
            "path": [_path(images, i) for i in index[order].tolist()],
        }
        self._writer.write(block)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finishes the file, and looks for the neighbours: below the progress bar."""
        if self._writer is not None:
            self._writer.close()
            _say(f"{self._writer.rows:,} features in {self._file}")
        if self.neighbours and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write_neighbours(trainer)
        self._writer, self._kept = None, []

    def _write_neighbours(self, trainer: Trainer) -> None:
        file = self._file.with_suffix(f".neighbours{self._file.suffix}")
        if self._writer is not None:
            self._writer = table_writer(file)
        bank, numbers = (torch.cat(part) for part in zip(*self._kept, strict=True))
        console = Console(stderr=True)
        hidden = not (trainer.is_global_zero and console.is_terminal)
        bar = track(self._kept, "Neighbours", console=console, transient=True, disable=hidden)
        for query, index in bar:
            found = find_neighbours(bank, numbers, query, self.neighbours + 1)
            index = gather_uneven_rows(index)  # (n,)
            similarity, neighbour = without_self(found.similarity, found.payload, index)
            if self._writer is not None and len(index):
                order = index.argsort()
                columns = {"index": index, "neighbour": neighbour, "similarity": similarity}
                self._writer.write({k: v[order].cpu().numpy() for k, v in columns.items()})
        if self._writer is not None:
            self._writer.close()
            _say(f"{self._writer.rows:,} rows of neighbours in {file}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves no half a file."""
        if self._writer is not None:
            self._writer.discard()
        self._writer, self._kept = None, []


def without_self(similarity: Tensor, neighbour: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves each sample out of its own neighbours.

    Args:
        similarity: (n, K + 1), from the nearest on.
        neighbour: (n, K + 1) numbers of the neighbours.
        index: (n,) numbers of the samples.

    Returns:
        Both, (n, K): without the sample itself, or, where K + 1 copies are as near, without the last.
    """
    itself = neighbour == index[:, None]
    itself[:, -1] |= ~itself.any(1)
    kept = (~itself).nonzero()[:, 1].view(len(index), -1)
    return similarity.gather(1, kept), neighbour.gather(1, kept)


def _path(images: Any, i: int) -> str:
    """What the source calls a sample, as valid Unicode, also where the file system's is not."""
    reader: Any = getattr(images, "reader", None)
    # a packed image's name says its shard, too
    name = reader.path(images.number(i)) if hasattr(reader, "path") else images.name(i)
    return str(name).encode(errors="surrogateescape").decode(errors="replace")


def _say(line: str) -> None:
    Console(highlight=False, markup=False, emoji=False).print(line, soft_wrap=True)
