"""Linear classifiers that are trained beside the encoder and never touch it.

Symbols: N = V*B rows of a step on this rank, n rows on this rank, E feature width, K classes, G heads.
"""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from simclr_pl.errors import InputError
from simclr_pl.heads import LinearHeads
from simclr_pl.linear import Deal, train_heads

_BANK_PASSES = 10  # over a separate labelled set
_BANK_BATCH = 256  # rows of a step there, over all ranks


class OnlineLinearProbe(Callback):
    """Trains linear heads on the step's detached features and reports the best one's accuracy.

    The heads, one for each learning rate, and their optimiser (SGD with momentum, float32) live here,
    not in the LightningModule, so DDP, clipping and the encoder's weights are as without them. The
    gradient is that of the mean cross-entropy over the labelled rows of all ranks; where it is not
    finite on some rank, the head is left as it is on all. Rows with label -1 are ignored. The input is
    standardised by running statistics, and the answers come from a running average of the weights: see
    `simclr_pl.heads.LinearHeads`.

    Where no training sample is labelled, but a separate set is (as STL-10's), the heads are trained
    anew at each validation, on the clean views of the bank.

    Logs ``probe/loss`` and ``probe/train_top1`` on the training views of the step, of the head that hits
    most of them; on the clean query ``probe/top1``, ``probe/top5`` (more than five classes) and
    ``probe/best_lr``, of the head that hits most of these, and ``probe/lr_<lr>/top1`` of each rate where
    there are several. The best is chosen on the query itself, so it is a little optimistic then.

    Args:
        lr: learning rate, or several to choose from.
        momentum: of the heads' updates, in [0, 1).
        weight_decay: of the heads' weights.
        hidden_features: width of a hidden layer with ReLU; null for a linear head.

    Raises:
        InputError: an option out of its range; at the start of training, if nothing is labelled; a
            checkpoint's heads are others.
    """

    def __init__(
        self,
        lr: float | list[float] = [0.01, 0.1, 1.0],  # noqa: B006  as --help shows it
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        hidden_features: int | None = None,
    ) -> None:
        self.lr = list(lr) if isinstance(lr, (list, tuple)) else [lr]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.hidden_features = hidden_features
        self._check_options()
        self.heads: LinearHeads | None = None
        self._stashed: dict[str, Tensor] | None = None
        self._from_bank = False  # where the training samples have no labels
        self._metrics: list[MulticlassAccuracy] = []  # for each head: top-1, top-5 of > 5 classes
        self._bank: list[tuple[Tensor, Tensor]] = []

    def _check_options(self) -> None:
        if not self.lr or min(self.lr) <= 0 or len(set(self.lr)) < len(self.lr):
            raise InputError(
                f"`lr` must be > 0, or different numbers > 0; got {self.lr}. Set `probe.lr`."
            )
        if not 0 <= self.momentum < 1:
            raise InputError(
                f"`momentum` must be within [0, 1); got {self.momentum}. Set `probe.momentum`."
            )
        if self.weight_decay < 0:
            raise InputError(
                f"`weight_decay` must be >= 0; got {self.weight_decay}. Set `probe.weight_decay`."
            )
        if self.hidden_features is not None and self.hidden_features < 1:
            raise InputError(
                f"`hidden_features` must be >= 1; got {self.hidden_features}. Set "
                "`probe.hidden_features`, or null."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is something to learn, and where."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._from_bank = stage != "predict" and not data.train_is_labelled
        if stage == "fit" and not data.num_classes:
            raise InputError(
                f"the online probe needs labelled {data.source.unit}; got none. Set `probe` to null, or "
                "give labels, images by class folders."
            )

    # The heads.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the heads, the same on all ranks."""
        num_classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        self._build(pl_module.num_features, num_classes, pl_module.device)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes trained heads from the checkpoint, where nothing is trained now."""
        self._bank = []
        if self.heads is None and self._stashed is not None:
            self.on_fit_start(trainer, pl_module)

    def _build(self, num_features: int, num_classes: int, device: torch.device) -> None:
        self.heads = LinearHeads(
            num_features,
            num_classes,
            self.lr,
            [self.weight_decay] * len(self.lr),
            self.momentum,
            self.hidden_features,
            online=True,
            device=device,
        )
        top_k = (1, 5) if num_classes > 5 else (1,)
        self._metrics = [
            MulticlassAccuracy(num_classes, top_k=k, average="micro").to(device)
            for _ in self.lr
            for k in top_k
        ]
        if self._stashed is not None:
            try:
                self.heads.load_state_dict(self._stashed)
            except ValueError as error:
                raise InputError(
                    f"a checkpoint's probe must fit the features, the classes and `probe`; {error}. "
                    "Set `data.source`, `model.encoder` and `probe` as in its run."
                ) from error
            self._stashed = None

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """One update of the heads."""
        assert self.heads is not None
        if self._from_bank:
            return
        stats = self.heads.update(
            outputs["features"], outputs["row_label"]
        )  # (N, E), (N,) -> (G, 3)
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return  # a value that no logger takes costs as much as the update
        # `index_select`: an index in brackets would be fetched from the device
        best = stats.index_select(0, stats[:, 1].argmax(0, keepdim=True))[0]
        loss, top1 = best[:2] / best[2].clamp(min=1)
        pl_module.log("probe/loss", loss)
        pl_module.log("probe/train_top1", top1, prog_bar=True)

    # The clean views.

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the bank where it is what the heads learn from; counts hits on the query."""
        if self.heads is None:
            return
        labelled = outputs["label"] >= 0
        features, label = outputs["features"][labelled].detach(), outputs["label"][labelled]
        if dataloader_idx == 0:
            if self._from_bank:
                self._bank.append((features.half(), label))  # half the memory
            return
        if self._bank:
            self._train_on_bank(trainer.datamodule.seed)  # type: ignore[attr-defined]
        logits = self.heads.logits(features)  # (G, n, K)
        per_head = len(self._metrics) // len(logits)
        for i, metric in enumerate(self._metrics):
            metric.update(logits[i // per_head], label)

    def _train_on_bank(self, seed: int) -> None:
        """From the start, so that the accuracy is a function of the encoder alone."""
        assert self.heads is not None
        features, label = (torch.cat(part) for part in zip(*self._bank, strict=True))
        self._bank = []
        self.heads.reset()
        deal = Deal(len(label), label.device)
        places = np.arange(deal.total)
        train_heads(self.heads, features, label, deal, places, _BANK_PASSES, _BANK_BATCH, seed)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the accuracy on the query of all ranks."""
        if self.heads is None:
            return
        values = torch.stack([metric.compute() for metric in self._metrics])
        for metric in self._metrics:
            metric.reset()
        values = values.view(len(self.lr), -1)  # (G, 1 or 2)
        best = values[:, 0].argmax()
        result = dict(zip(("probe/top1", "probe/top5"), values[best], strict=False))
        pl_module.log("probe/top1", result.pop("probe/top1"), prog_bar=True, sync_dist=True)
        result["probe/best_lr"] = self.heads.lr[best]
        if len(self.lr) > 1:
            result |= {
                f"probe/lr_{lr:g}/top1": v for lr, v in zip(self.lr, values[:, 0], strict=True)
            }
        pl_module.log_dict(result, sync_dist=True)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """The heads, for the checkpoint."""
        return self.heads.state_dict() if self.heads is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the heads are built."""
        self._stashed = state_dict or None
