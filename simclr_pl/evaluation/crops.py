"""The linear protocol on fresh crops: as the papers train their linear classifiers.

Symbols: B samples of a batch on this rank, M training samples, E feature width, K classes, G options.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from simclr_pl.distributed import all_reduce_sum
from simclr_pl.errors import InputError
from simclr_pl.evaluation.finetune import even_batch
from simclr_pl.evaluation.linear import LinearResult, Share, hold_out
from simclr_pl.heads import LinearHeads
from simclr_pl.optim import warmup_cosine

Batch = dict[str, Tensor]
_BANK, _QUERY = 0, 1  # the validation's loaders


class LinearOnCrops(LightningModule):
    """Trains linear heads on frozen encoders, which see fresh views of the samples in every epoch.

    Chen et al. 2020 (arXiv:2002.05709, appendix B.6): SGD with momentum on random crops and flips; here
    with a grid of options at once, features standardised by running statistics, and a cosine. A tenth of
    the training samples is held out as in `simclr_pl.evaluation.linear.linear_protocol`. In the same pass
    every option is trained twice, without these, to choose by them, and with them, to be reported; so the
    encoders see every view once. The trainer validates once, after the last epoch.

    Args:
        encoders: by name, each maps views (n, ...) to features (n, E); kept in evaluation mode.
        lr: learning rates tried, > 0.
        weight_decay: tried with each of them, >= 0.
        batch_size: samples of a step over all ranks at most; smaller sets are taken in equal steps.
        seed: of the choice of held-out samples.

    Raises:
        InputError: an option out of its range.

    Attributes:
        results: by the encoders' names, after the last epoch; the same on every rank.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        lr: Sequence[float],
        weight_decay: Sequence[float],
        batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not lr or not min(lr) > 0 or not weight_decay or not min(weight_decay) >= 0:
            raise InputError(
                f"`lr` must be numbers > 0 and `weight_decay` >= 0; got {list(lr)} and "
                f"{list(weight_decay)}. Set `lr` or `weight_decay`."
            )
        self.automatic_optimization = False
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False)
        self.anchor = nn.Parameter(torch.zeros(()))  # DDP wants something that could be trained
        self.options = [
            {"lr": rate, "weight_decay": decay} for rate in lr for decay in weight_decay
        ]
        self.batch_size, self.seed = batch_size, seed
        self.results: dict[str, LinearResult] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that is never stepped: the heads are their own."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def setup(self, stage: str) -> None:
        """Sets the data module's global batch to one that the samples fill."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.samples("train"))
        data.global_batch_size = even_batch(count, self.batch_size, self.trainer.world_size)

    def on_fit_start(self) -> None:
        """Chooses the held-out samples."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        labels = torch.from_numpy(data.samples("train").labels)
        held = torch.zeros(len(labels), dtype=torch.bool)
        held[torch.from_numpy(hold_out(labels, self.seed))] = True
        self._held = held.to(self.device)  # (M,)
        self._classes = data.num_classes
        self._heads: dict[str, tuple[LinearHeads, LinearHeads]] = {}

    def on_train_epoch_start(self) -> None:
        """Freezes batch norm's statistics, too; not before, for Lightning would warn of it."""
        self.encoders.eval()

    def _heads_of(self, name: str, features: Tensor) -> tuple[LinearHeads, LinearHeads]:
        """The heads that choose, and those that are reported."""
        if name not in self._heads:
            rates = [option["lr"] for option in self.options]
            decays = [option["weight_decay"] for option in self.options]
            width, device = features.shape[1], features.device
            first, second = (
                LinearHeads(width, self._classes, rates, decays, online=True, device=device)
                for _ in range(2)
            )
            self._heads[name] = first, second
        return self._heads[name]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of all heads on the views of a batch."""
        label = batch["label"]  # (B,)
        without_held = torch.where(self._held[batch["index"]], -1, label)
        total = self.trainer.estimated_stepping_batches
        factor = warmup_cosine(self.trainer.fit_loop.total_batch_idx, 0, int(total))
        for name, encoder in self.encoders.items():
            with torch.no_grad():
                features = encoder(batch["views"]).float()  # (B, E)
            choosing, reported = self._heads_of(name, features)
            choosing.update(features, without_held, factor)
            reported.update(features, label, factor)

    def on_validation_epoch_start(self) -> None:
        """Forgets the counts."""
        counts = torch.zeros(len(self.options), 3, dtype=torch.int64, device=self.device)
        self._counts = {
            (name, loader): counts.clone() for name in self.encoders for loader in (_BANK, _QUERY)
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts every head's hits on clean views: of the held-out samples, then of the query."""
        index, label = batch["index"], batch["label"]
        known = (index >= 0) & (label >= 0)
        if dataloader_idx == _BANK:
            known &= self._held[index.clamp(min=0)]
        if not known.any():
            return
        views, label = batch["views"][known], label[known]
        for name, encoder in self.encoders.items():
            features = encoder(views).float()
            logits = self._heads_of(name, features)[dataloader_idx].logits(features)  # (G, n, K)
            named = logits.topk(min(5, logits.shape[-1])).indices == label[:, None]  # (G, n, 5)
            top1, top5 = named[..., 0].sum(1), named.sum((1, 2))
            rows = torch.full_like(top1, len(label))
            self._counts[name, dataloader_idx] += torch.stack([top1, top5, rows], 1)

    def on_validation_epoch_end(self) -> None:
        """Chooses, on the held-out samples, and reports, on the query."""
        for name in self.encoders:
            held, query = (all_reduce_sum(self._counts[name, i]).tolist() for i in (_BANK, _QUERY))
            accuracy = [top1 / max(1, count) for top1, _, count in held]
            best = max(range(len(accuracy)), key=accuracy.__getitem__)
            top1, top5, total = (int(n) for n in query[best])
            self.results[name] = LinearResult(
                Share.of(top1, total),
                Share.of(top5, total) if self._classes > 5 else None,
                self.options[best],
                [{**o, "held_out": a} for o, a in zip(self.options, accuracy, strict=True)],
                len(self._held),
                int(held[best][2]),
                total,
            )
