"""Fine-tuning: encoder and a new linear head, trained on labels.

Symbols: B samples of this rank's batch, n rows, K classes.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.distributed import all_reduce_sum, is_distributed
from simclr_pl.errors import InputError
from simclr_pl.evaluation.classifier import Classifier, rates_by_depth
from simclr_pl.keyed_random import Stream, keys
from simclr_pl.optim import lr_factor, warmup_cosine

Batch = dict[str, Tensor]
MakesClassifier = Classifier | Callable[[int], Classifier]


class Accuracy(NamedTuple):
    """How many of the labelled query samples are classified right.

    Attributes:
        top1: share whose class has the largest logit.
        top5: share whose class is among the five largest; all, where there are no more classes.
        total: labelled query samples.
    """

    top1: float
    top5: float
    total: int


class Classification(LightningModule):
    """What every training of a `Classifier` shares: batches, the schedule, and the accuracy.

    `Trainer.predict` on a `ContrastiveDataModule` measures the accuracy on its query samples.

    Args:
        classifier: trained in place; or a callable that makes it from the number of classes that the data
            module has.
        batch_size: samples of a step over all ranks at most. Smaller sets are taken in as few steps of
            equal size as that allows, so that an epoch leaves out less than one sample for each rank and
            step.
        seed: fixes dropout and the like.

    Attributes:
        accuracy: of the last prediction.
        epochs: that it was trained for.
    """

    accuracy: Accuracy
    epochs: int = 0

    classifier: Classifier

    def __init__(self, classifier: MakesClassifier, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"`batch_size` must be >= 1; got {batch_size}. Set `--batch_size`.")
        self.batch_size, self.seed = batch_size, seed
        self._make = None if isinstance(classifier, Classifier) else classifier
        if isinstance(classifier, Classifier):
            self._take(classifier)

    def _take(self, classifier: Classifier) -> None:
        self.classifier = classifier
        k = classifier.head.out_features
        options: dict[str, Any] = {"average": "micro", "ignore_index": -1, "validate_args": False}
        self.top1 = MulticlassAccuracy(k, **options)
        self.top5 = MulticlassAccuracy(k, top_k=min(5, k), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Maps views (n, ...) to logits (n, K)."""
        return self.classifier(x)  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Makes the classifier, and sets the data module's global batch to one that the samples fill.

        Raises:
            InputError: there are fewer samples than ranks, or more classes than the classifier's.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        labels = np.concatenate([data.samples(name).labels for name in ("train", "query")])
        classes = max(int(labels.max(initial=-1)) + 1, len(data.source.classes))
        if self._make is not None:
            self._take(self._make(classes))
            self._make = None
        k = self.classifier.head.out_features
        if classes > k:
            raise InputError(
                f"the data must be of the classifier's classes; got {classes} classes for {k}. Give "
                "the data set that it was fine-tuned on as `--dataset`."
            )
        if stage == "fit":
            count = len(data.samples("train"))
            data.global_batch_size = even_batch(count, self.batch_size, self.trainer.world_size)

    def on_fit_start(self) -> None:
        """Puts batch norm and dropout into training mode, whatever the encoder was used for before."""
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds torch for this step, as `SimCLR` does."""
        step = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(int(keys(self.seed, Stream.STEP, step, self.global_rank) >> 1))

    def on_train_end(self) -> None:
        """Gives every rank the first one's batch-norm statistics: all are to predict the same."""
        self.epochs = self.trainer.current_epoch
        if is_distributed():
            for buffer in self.classifier.buffers():
                dist.broadcast(buffer, 0)

    def scheduled(self, optimizer: torch.optim.Optimizer, warmup: float = 0.0) -> Any:
        """An optimiser with a linear warm-up over a share of the steps and a cosine to 0 after it."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(warmup * total)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Logits of clean views, without the sampler's padding.

        Returns:
            ``logits`` (n, K), ``label`` (n,), ``index`` (n,), where n <= B.
        """
        real = batch["index"] >= 0
        answers = {"logits": self(batch["views"]), "label": batch["label"], "index": batch["index"]}
        return {name: value[real] for name, value in answers.items()}

    def on_predict_start(self) -> None:
        """Forgets the counts of an earlier prediction."""
        self.top1.reset()
        self.top5.reset()
        self._total = torch.zeros((), dtype=torch.long, device=self.device)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """The same as `validation_step`, and counts what is right."""
        answers = self.validation_step(batch, batch_idx, dataloader_idx)
        if len(answers["label"]):  # a batch may be all padding, which the metrics refuse
            for metric in (self.top1, self.top5):
                metric.update(answers["logits"], answers["label"])
        self._total += (answers["label"] >= 0).sum()
        return answers

    def on_predict_epoch_end(self) -> None:
        """Brings the ranks' counts together.

        Raises:
            InputError: no query sample is labelled.
        """
        total = int(all_reduce_sum(self._total))
        if not total:
            raise InputError(
                "accuracy needs labelled query samples; got none. Give a data set with labels, such as "
                "class folders, as `--dataset`."
            )
        self.accuracy = Accuracy(float(self.top1.compute()), float(self.top5.compute()), total)


class FineTune(Classification):
    """Trains a classifier on the labels of the training samples.

    The recipe of SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix B.5): SGD with Nesterov momentum
    0.9, learning rate 0.05 * batch / 256, no warm-up, no weight decay. The schedule is the authors'
    code's, a cosine to 0. SimCLRv2 has LARS with 0.005 * sqrt(batch) in its place. Batch norm is in
    training mode.

    Logs ``finetune/loss`` and ``finetune/train_top1`` of the step.

    Args:
        classifier: trained in place; or a callable that makes it from the number of classes.
        lr: learning rate of the head for a batch of 256.
        lr_decay: factor of the rate from each layer to the one below, in (0, 1].
        batch_size: samples of a step over all ranks at most.
        least_steps: train for further epochs than the trainer's, where those make fewer steps. The
            paper's epochs are for ImageNet, where 1 % of the labels are 12,811 images.
        seed: fixes dropout and the like.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self,
        classifier: MakesClassifier,
        lr: float = 0.05,
        lr_decay: float = 1.0,
        batch_size: int = 256,
        least_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(classifier, batch_size, seed)
        if not lr > 0:
            raise InputError(f"`lr` must be > 0; got {lr}. Set `--lr`.")
        if not 0 < lr_decay <= 1:
            raise InputError(
                f"`lr_decay` must be within (0, 1]; got {lr_decay}. Set `--lr_decay`, e.g. to 0.8."
            )
        self.lr, self.lr_decay, self.least_steps = lr, lr_decay, least_steps

    def setup(self, stage: str) -> None:
        """Lengthens the training to the least steps."""
        super().setup(stage)
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            steps = len(data.samples("train")) // data.global_batch_size
            loop = self.trainer.fit_loop
            loop.max_epochs = max(loop.max_epochs or 1, math.ceil(self.least_steps / steps))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The cross-entropy of one view of each sample.

        Args:
            batch: ``views`` (B, ...) and ``label`` (B,).
            batch_idx: not used.
        """
        logits = self(batch["views"])  # (B, K)
        loss = F.cross_entropy(logits, batch["label"])
        right = (logits.detach().argmax(1) == batch["label"]).float().mean()
        self.log("finetune/loss", loss.detach(), prog_bar=True)
        self.log("finetune/train_top1", right, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD, its rate scaled with the batch and by depth, and the schedule by step."""
        lr = self.lr * lr_factor("linear", self.trainer.datamodule.global_batch_size)  # type: ignore[attr-defined]
        groups = rates_by_depth(self.classifier, lr, self.lr_decay)
        return self.scheduled(SGD(groups, lr=lr, momentum=0.9, nesterov=True))


def even_batch(count: int, most: int, ranks: int) -> int:
    """The batch that takes ``count`` samples in as few steps of equal size as ``most`` allows.

    Args:
        count: samples.
        most: samples of a step over all ranks.
        ranks: the batch is a multiple of it.

    Raises:
        InputError: ``count`` or ``most`` are less than ``ranks``.
    """
    if min(count, most) < ranks:
        raise InputError(
            f"each rank needs a sample of every step; got {count} samples and a batch of {most} for "
            f"{ranks} ranks. Set `--devices` to less, or give more."
        )
    batch = count // math.ceil(count / most)
    return max(ranks, batch - batch % ranks)


def crop_and_flip(augment: Augmentation) -> Augmentation:
    """The random crops and flips of images alone, as the papers fine-tune; of other samples, all."""
    if not isinstance(augment, Augment):
        return augment
    plain = copy.copy(augment)
    plain.rotation = plain.shift = plain.jitter = plain.grey = plain.blur = plain.solarise = 0.0
    return plain
