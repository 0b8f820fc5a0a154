"""Distillation: a student learns a fine-tuned teacher's probabilities.

Symbols: B samples of this rank's batch, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.errors import InputError
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.finetune import Batch, Classification
from simclr_pl.optim import LARS, lr_factor, parameter_groups


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    temperature: float = 1.0,
    labelled_weight: float = 0.0,
) -> Tensor:
    """The distillation loss of SimCLRv2 (Chen et al. 2020, arXiv:2006.10029, section 2, eq. 2 and 3).

    With P(y) = softmax(logits / temperature), and a = 1 - labelled_weight,

        loss = - a / B * sum_i sum_y P_teacher(y | x_i) log P_student(y | x_i)
               - (1 - a) / B * sum_{i labelled} log softmax(student_i)[label_i]

    The paper's sums are divided by the batch, so that the mean over ranks is that of the whole batch.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits; no gradient reaches them.
        label: (B,) int64, -1 where there is none.
        temperature: > 0, of both.
        labelled_weight: of the labels, in [0, 1].

    Returns:
        The loss, a scalar.
    """
    target = F.softmax(teacher.detach() / temperature, 1)  # (B, K)
    loss = F.cross_entropy(student / temperature, target)
    if not labelled_weight:
        return loss
    known = F.cross_entropy(student, label, ignore_index=-1, reduction="sum") / len(label)
    return (1 - labelled_weight) * loss + labelled_weight * known


class Distill(Classification):
    """Trains a student on the probabilities that a teacher gives to the same views.

    The recipe of SimCLRv2 (section 3): that of its contrastive training, LARS with a learning rate of
    0.1 * sqrt(batch), a warm-up over 5 % of the steps, a cosine to 0, weight decay 1e-4; the views
    are cropped and flipped alone.

    Logs ``distill/loss`` of the step and ``distill/agreement``, the share of its views that both put
    into the same class.

    Args:
        student: trained in place.
        teacher: in evaluation mode, its parameters frozen.
        temperature: that divides the logits of both. The paper has 0.1 where the student is of the
            teacher's architecture, else 1, with little effect; short trainings want 1.
        labelled_weight: of the cross-entropy with the labels, where there are some.
        lr: learning rate, times the square root of the batch.
        batch_size: samples of a step over all ranks at most.
        seed: fixes dropout and the like.

    Raises:
        InputError: a number out of its range; teacher and student differ in their classes; at the start
            of training, a ``labelled_weight`` and no label.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        temperature: float = 1.0,
        labelled_weight: float = 0.0,
        lr: float = 0.1,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(student, batch_size, seed)
        for name, value in (("temperature", temperature), ("lr", lr)):
            if not value > 0:
                raise InputError(f"`{name}` must be > 0; got {value}. Set `--{name}`.")
        if not 0 <= labelled_weight <= 1:
            raise InputError(
                f"`labelled_weight` must be within [0, 1]; got {labelled_weight}. Set "
                "`--labelled_weight`."
            )
        classes = (student.head.out_features, teacher.head.out_features)
        if classes[0] != classes[1]:
            raise InputError(
                f"student and teacher must have the same classes; got {classes[0]} and {classes[1]}. "
                "Make the student's head as wide as the teacher's."
            )
        # In a tuple, it is no part of this module: not trained, not saved, not put into training mode.
        self._teacher = (teacher.requires_grad_(False),)
        self.temperature, self.labelled_weight, self.lr = temperature, labelled_weight, lr

    @property
    def teacher(self) -> Classifier:
        """The teacher."""
        return self._teacher[0]

    def on_fit_start(self) -> None:
        """Puts the teacher into evaluation mode, onto the student's device and into its precision."""
        super().on_fit_start()
        self.teacher.eval().to(self.classifier.head.weight)

    def setup(self, stage: str) -> None:
        """Checks that there are labels, if they are to count."""
        super().setup(stage)
        labelled = self.trainer.datamodule.train_is_labelled  # type: ignore[attr-defined]
        if stage == "fit" and self.labelled_weight and not labelled:
            raise InputError(
                f"`labelled_weight` needs labelled training samples; got {self.labelled_weight} and "
                "none. Set `--labelled_weight` to 0."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distillation loss of one view of each sample.

        Args:
            batch: ``views`` (B, ...) and ``label`` (B,), -1 where there is none.
            batch_idx: not used.
        """
        with torch.no_grad():
            target = self.teacher(batch["views"])  # (B, K)
        logits = self(batch["views"])
        loss = distillation_loss(
            logits, target, batch["label"], self.temperature, self.labelled_weight
        )
        agreement = (logits.detach().argmax(1) == target.argmax(1)).float().mean()
        self.log("distill/loss", loss.detach(), prog_bar=True)
        self.log("distill/agreement", agreement, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """LARS on the paper's parameter groups, its rate scaled with the batch, and the schedule."""
        batch = self.trainer.datamodule.global_batch_size  # type: ignore[attr-defined]
        groups, _ = parameter_groups(self.classifier)
        lr = self.lr * lr_factor("sqrt", batch)
        return self.scheduled(LARS(groups, lr=lr, weight_decay=1e-4), warmup=0.05)
