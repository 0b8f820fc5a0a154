"""Weighted kNN on clean views.

Symbols: n rows of a batch, M bank samples of this rank, Q queries of this rank, E feature width.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.distributed import all_reduce_sum, gather_uneven_rows
from simclr_pl.errors import InputError
from simclr_pl.neighbours import BANK_CHUNK, find_neighbours, hits, normalised_half, vote


class KNNMonitor(Callback):
    """Classifies the query by its neighbours in the bank, at every validation.

    Features are those of the clean view in evaluation mode, kept in half precision. Exact under DDP: each
    rank keeps the part of the bank that it encoded; see `simclr_pl.neighbours.find_neighbours`. How often
    it runs is the trainer's ``check_val_every_n_epoch``, or its ``val_check_interval`` with
    ``check_val_every_n_epoch`` null for steps. The size of the bank is ``data.bank_size``.

    Logs ``knn/top1`` and, where there are more than 5 classes, ``knn/top5`` of the first k, and
    ``knn/k200/top1`` and the like of the others, in [0, 1]. At the first validation one line says what
    memory it takes.

    Args:
        k: neighbours that vote, or several such numbers; the bank where it is smaller.
        temperature: of the votes, exp(cosine / temperature), > 0.
        chunk: queries that are compared with 1,024 bank samples at a time.

    Raises:
        InputError: k < 1, no k, temperature <= 0 or chunk < 1; at the start, if nothing of the bank or
            of the query is labelled.
    """

    def __init__(
        self, k: int | list[int] = 20, temperature: float = 0.07, chunk: int = 1024
    ) -> None:
        self.k = [k] if isinstance(k, int) else list(dict.fromkeys(k))
        if not self.k or min(self.k) < 1:
            raise InputError(f"`k` must be >= 1; got {k}. Set `knn.k` to a number or a list.")
        if not temperature > 0:
            raise InputError(
                f"`temperature` must be > 0; got {temperature}. Set `knn.temperature`."
            )
        if chunk < 1:
            raise InputError(f"`chunk` must be >= 1; got {chunk}. Set `knn.chunk`.")
        self.temperature, self.chunk = temperature, chunk
        self._bank, self._query = _Shard(), _Shard()
        self._said = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is something to vote with."""
        if stage == "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not data.num_classes or not (data.samples("query").labels >= 0).any():
            raise InputError(
                f"the kNN monitor needs labelled {data.source.unit}; got none. Set `knn` to null, or "
                "give both sets labels, images by class folders."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets features of a validation that broke off."""
        self._bank, self._query = _Shard(), _Shard()

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the features of labelled samples."""
        (self._bank, self._query)[dataloader_idx].add(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Votes, and logs the accuracy over the queries of all ranks."""
        (bank, labels), (query, own_truth) = self._bank.taken(), self._query.taken()
        truth = gather_uneven_rows(own_truth)
        if not self._said and not trainer.sanity_checking:
            self._say_memory(trainer, bank)
        neighbours = find_neighbours(bank, labels, query, max(self.k), self.chunk)
        num_classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        for i, k in enumerate(self.k):
            scores = vote(neighbours, num_classes, k, self.temperature)
            name = f"knn/k{k}/top1" if i else "knn/top1"
            top1 = hits(scores, truth, 1).float().mean()
            pl_module.log(name, top1, prog_bar=not i, sync_dist=True)
            if num_classes > 5 and not i:
                pl_module.log("knn/top5", hits(scores, truth, 5).float().mean(), sync_dist=True)

    def _say_memory(self, trainer: Trainer, bank: Tensor) -> None:
        self._said = True
        rows = int(all_reduce_sum(torch.tensor(len(bank), device=bank.device)))  # collective
        if trainer.is_global_zero:
            unit = trainer.datamodule.source.unit  # type: ignore[attr-defined]
            print(
                f"kNN bank of {rows:,} {unit} x {bank.shape[1]:,} features: "
                f"{bank.nbytes / 2**20:.1f} MiB on each rank in half precision, "
                f"{self.chunk * BANK_CHUNK * 4 / 2**20:.1f} MiB for similarities"
            )

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end


class _Shard:
    """Features and labels of this rank's labelled samples, batch by batch."""

    def __init__(self) -> None:
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, outputs: dict[str, Tensor]) -> None:
        labelled = outputs["label"] >= 0
        self._features.append(normalised_half(outputs["features"][labelled]))
        self._labels.append(outputs["label"][labelled])

    def taken(self) -> tuple[Tensor, Tensor]:
        """Features (M, E) and labels (M,); the batches' memory is given back while it is copied."""
        labels = torch.cat(self._labels)
        whole = self._features[0].new_empty(len(labels), self._features[0].shape[1])
        last = len(labels)
        while self._features:
            part = self._features.pop()
            whole[last - len(part) : last] = part
            last -= len(part)
        self._labels = []
        return whole, labels
