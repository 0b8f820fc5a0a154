"""A linear classifier that is trained beside the encoder and never touches it.

Symbols: N = V*B rows of a step on this rank, E feature width, K classes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from simclr_pl.distributed import all_reduce_sum, is_distributed
from simclr_pl.errors import InputError


class OnlineLinearProbe(Callback):
    """Trains a linear head on the step's detached features and reports its accuracy.

    The head and its optimiser (SGD with momentum, float32) live here, not in the LightningModule, so
    DDP, clipping and the encoder's weights are as without it. Its gradient is that of the mean
    cross-entropy over the labelled rows of all ranks; a non-finite gradient on any rank skips the
    update on all. Rows with label -1 are ignored.

    Logs ``probe/loss`` and ``probe/train_top1`` on the training views of the step, ``probe/top1`` on the
    clean query images, in [0, 1].

    Args:
        lr: learning rate of the head.
        momentum: of the head's updates.
        weight_decay: of the head's weights.

    Raises:
        InputError: at the start of training, if no image is labelled.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.head: nn.Linear | None = None
        self._buffers: list[Tensor] = []
        self._stashed: dict[str, Any] | None = None
        self._top1: MulticlassAccuracy | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is something to learn."""
        if stage == "fit" and not trainer.datamodule.num_classes:  # type: ignore[attr-defined]
            raise InputError(
                "the online probe needs labelled images; got none. Set `probe` to null, or give the "
                "images class folders."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the head, the same on all ranks."""
        num_classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        self._build(pl_module.num_features, num_classes, pl_module.device)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a trained head from the checkpoint, where nothing is trained now."""
        if self.head is None and self._stashed is not None:
            num_classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
            self._build(pl_module.num_features, num_classes, pl_module.device)  # type: ignore[arg-type]

    def _build(self, num_features: int, num_classes: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # the encoder's random numbers stay as without us
            torch.manual_seed(0)
            self.head = nn.Linear(num_features, num_classes).to(device)
        self._buffers = [torch.zeros_like(p) for p in self.head.parameters()]
        self._top1 = MulticlassAccuracy(num_classes, average="micro").to(device)
        if self._stashed is not None:
            self._check_stashed()
            self.head.load_state_dict(self._stashed["head"])
            for buffer, saved in zip(self._buffers, self._stashed["buffers"], strict=True):
                buffer.copy_(saved)
            self._stashed = None
        if is_distributed():
            for tensor in [*self.head.parameters(), *self._buffers]:
                dist.broadcast(tensor.data, 0)

    def _check_stashed(self) -> None:
        assert self._stashed is not None
        assert self.head is not None
        theirs, ours = self._stashed["head"]["weight"].shape, self.head.weight.shape
        if theirs != ours:
            raise InputError(
                f"a checkpoint's probe must fit the features and classes; got {tuple(theirs)} in the "
                f"checkpoint for {tuple(ours)}. Set `data.source` and `model.encoder` as in its run."
            )

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """One update of the head."""
        features = outputs["features"].float()  # (N, E)
        label = outputs["label"].repeat(len(features) // len(outputs["label"]))  # (N,)
        # Lightning leaves autocast before this hook today; the head is float32 in any case.
        with torch.autocast(features.device.type, enabled=False):
            stats = self._update(features, label)
        loss, top1 = stats[:2] / stats[2].clamp(min=1)
        pl_module.log("probe/loss", loss)
        pl_module.log("probe/train_top1", top1, prog_bar=True)

    def _update(self, features: Tensor, label: Tensor) -> Tensor:
        """Returns summed loss, number correct and number labelled, over all ranks."""
        assert self.head is not None
        params = list(self.head.parameters())
        with torch.enable_grad():
            logits = F.linear(features, params[0], params[1])
            loss = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
            grads = torch.autograd.grad(loss, params)
        labelled = label >= 0
        correct = ((logits.argmax(1) == label) & labelled).sum()
        stats = torch.stack([loss.detach(), correct.to(loss), labelled.sum().to(loss)])
        # One collective; any rank's NaN or infinity makes the sum non-finite on every rank.
        flat = all_reduce_sum(torch.cat([*(g.reshape(-1) for g in grads), stats]))
        finite = flat.isfinite().all()
        with torch.no_grad():
            mean = flat[:-3] / flat[-1].clamp(min=1)
            parts = mean.split([p.numel() for p in params])
            for p, buffer, part in zip(params, self._buffers, parts, strict=True):
                step = part.view_as(p) + self.weight_decay * p
                # `where`, not `if`: the device is not waited for
                buffer.copy_(torch.where(finite, self.momentum * buffer + step, buffer))
                p.sub_(torch.where(finite, self.lr * buffer, torch.zeros_like(buffer)))
        return flat[-3:]

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the head's hits on the clean query images."""
        if self.head is None or self._top1 is None or dataloader_idx != 1:
            return
        labelled = outputs["label"] >= 0
        logits = self.head(outputs["features"].float()[labelled])
        self._top1.update(logits.detach(), outputs["label"][labelled])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the accuracy on the query images of all ranks."""
        if self._top1 is None:
            return
        top1 = self._top1.compute()
        self._top1.reset()
        pl_module.log("probe/top1", top1, prog_bar=True, sync_dist=True)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Head and momentum, for the checkpoint."""
        if self.head is None:
            return {}
        return {"head": self.head.state_dict(), "buffers": self._buffers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the head is built."""
        self._stashed = state_dict or None
