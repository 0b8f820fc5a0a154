"""How often a run is evaluated, where nobody has said it."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

_SHARE = 0.01  # of the encoder's work


class EvaluationPace(Callback):
    """Evaluates as often as keeps evaluation within 1 % of the encoder's work, and after the last step.

    Work is counted in forward passes of an image: one for each image of the bank and the query, three
    for each view that is trained on, forward and backward. Where a run ends within an epoch, its last
    evaluation comes there, too.

    Attributes:
        every_n_epochs: the pace; known once training starts.
    """

    def __init__(self) -> None:
        self.every_n_epochs = 1
        self._last_epoch = 0
        self._last_batches = 0  # of the last epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the pace from the sizes of the sets and of the run."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        batches = int(trainer.num_training_batches)  # of an epoch
        evaluated = len(data.samples("bank")) + len(data.samples("query"))
        self.every_n_epochs = epochs_between(
            evaluated, batches * data.global_batch_size, data.n_views
        )
        accumulated = trainer.accumulate_grad_batches
        steps, in_epoch = int(trainer.estimated_stepping_batches), math.ceil(batches / accumulated)
        self._last_epoch = max(0, math.ceil(steps / in_epoch) - 1)
        self._last_batches = min(batches, (steps - self._last_epoch * in_epoch) * accumulated)
        self.on_train_epoch_start(trainer, pl_module)  # an epoch that is resumed has no such hook

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the trainer's pace for this epoch."""
        is_last = trainer.current_epoch == self._last_epoch
        trainer.check_val_every_n_epoch = 1 if is_last else self.every_n_epochs
        if is_last:
            trainer.val_check_batch = self._last_batches


def epochs_between(evaluated: int, trained: int, views: int) -> int:
    """Epochs from one evaluation to the next, >= 1.

    Args:
        evaluated: samples of an evaluation.
        trained: samples of an epoch.
        views: of each image that is trained on.
    """
    return max(1, math.ceil(evaluated / (3 * views * trained * _SHARE)))
