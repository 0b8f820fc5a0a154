"""The numbers of training steps on their way to callbacks, loggers and progress bar."""

import time
from collections.abc import Mapping
from contextlib import suppress
from numbers import Number
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl.callbacks.delayed import DelayedReader

_BAR_SECONDS = 0.1  # from one refresh of the bar's numbers to the next: an eye is no quicker
_PATIENCE = 5.0  # seconds for the last numbers of a run that ends with an error

Value = Tensor | float  # of one element, on any device


class _Row(NamedTuple):
    """Numbers that belong together.

    Attributes:
        values: by name.
        step: of which, from 0; None for the bar, which shows the newest ones.
        epoch: of which.
    """

    values: Mapping[str, Value]
    step: int | None
    epoch: int


class StepLog(Callback):
    """Brings what a training step logs to where it is wanted, without waiting for the device.

    Lightning fetches each number from the device by itself: those of the progress bar after every step,
    those for the loggers at every logging step, and the host waits each time until the device has caught
    up. Here a step's numbers travel together, in one copy, and are written four steps later, at the step
    and the epoch that they belong to, in the same order; on a CPU they are written at once. Whatever is
    on its way is written before an evaluation, an epoch's end, a checkpoint and the end of a run, also
    one that ends with an error. A logging step's row holds the newest value of each name of the epoch,
    as Lightning's.

    `SimCLR.log` hands over here whatever it is called for within a step, by a callback, too: numbers, not
    averaged over an epoch or over ranks, which go Lightning's way. `simclr fit` has this callback as the
    first, so that others find the table complete when a run fails; else `SimCLR` adds it.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._reader = DelayedReader(self._device)
        self._is_within_step = False
        self._step = 0  # optimiser steps done at the last look
        self._rows: list[_Row] = []  # of this step
        self._newest: dict[str, Value] = {}  # of this epoch, for the loggers
        self._shown: dict[str, Value] = {}  # on the bar, what it does not know yet
        self._shown_at = float("-inf")  # seconds

    @classmethod
    def of(cls, trainer: Trainer) -> "StepLog":
        """The trainer's; where it has none, one that writes at once."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, cls)), None) or cls()

    # What comes in.

    def take(
        self,
        trainer: Trainer,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        sync_dist: bool = False,
        **_: Any,
    ) -> bool:
        """Takes a number that is logged.

        Args:
            trainer: the trainer.
            name: of the number.
            value: a number, or a tensor of one element on any device.
            prog_bar: show it.
            logger: False keeps it from the loggers.
            on_step: as Lightning's; False is left to it.
            on_epoch: as Lightning's; True is left to it.
            sync_dist: as Lightning's; True is left to it.

        Returns:
            Whether it was taken; else it is Lightning's.
        """
        is_one = isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)
        if not (self._is_within_step and is_one) or on_step is False or on_epoch or sync_dist:
            return False
        if isinstance(value, Tensor):
            value = tensor = value.detach().clone().reshape(())
            if value.device != self._device:
                value = value.item()
        else:
            tensor = torch.tensor(float(value))  # on the host: a GPU would have to be waited for
        trainer.callback_metrics[name] = tensor
        if logger is not False:
            self._newest[name] = value
        if prog_bar:
            self._shown[name] = value
        return True

    def write(self, trainer: Trainer, values: Mapping[str, Value], step: int) -> None:
        """Adds a row of its own for the loggers, after those that are on their way.

        Args:
            trainer: the trainer.
            values: by name.
            step: from 0, as Lightning numbers train/loss.
        """
        self._rows.append(_Row(values, step, trainer.current_epoch))
        if not self._is_within_step:
            self.flush(trainer)

    # Steps.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for the device, which is known by now."""
        self._device = pl_module.device
        self._reader = DelayedReader(self._device)
        self._is_within_step, self._step = False, trainer.global_step
        self._rows, self._newest, self._shown = [], {}, {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on what is logged is a step's."""
        self.end_step(trainer)  # where a module has a hook of its own in the place of SimCLR's
        self._is_within_step = True

    def end_step(self, trainer: Trainer) -> None:
        """Sends off what a step has logged, when all callbacks are done; writes what has arrived."""
        if not self._is_within_step:
            return  # sent off already, before a checkpoint
        self._is_within_step = False
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        step, self._step = self._step, trainer.global_step  # equal while gradients are accumulated
        is_due = every and step != self._step and (self._step % every == 0 or trainer.should_stop)
        if is_due and self._newest:
            seen = trainer.callback_metrics
            trainer.logged_metrics.update({name: seen[name] for name in self._newest})
            self._rows.append(_Row(dict(self._newest), self._step - 1, trainer.current_epoch))
        if self._shown and (is_due or time.monotonic() - self._shown_at > _BAR_SECONDS):
            self._show(trainer)
        self._send()
        self._deliver(trainer)

    def _show(self, trainer: Trainer) -> None:
        self._rows.append(_Row(self._shown, None, trainer.current_epoch))
        self._shown, self._shown_at = {}, time.monotonic()

    def _send(self) -> None:
        """One copy to the host, however many numbers there are; where there are none, the step counts."""
        rows, self._rows = self._rows, []
        tensors = [v for row in rows for v in row.values.values() if isinstance(v, Tensor)]
        self._reader.push(torch.stack(tensors) if tensors else None, rows)

    def _deliver(self, trainer: Trainer, everything: bool = False) -> None:
        for read in self._reader.read(everything):
            numbers = iter(read.values)
            for row in read.note:
                values = {
                    name: next(numbers) if isinstance(value, Tensor) else value
                    for name, value in row.values.items()
                }
                if row.step is None:
                    trainer.progress_bar_metrics.update(values)
                elif trainer.is_global_zero:
                    for logger in trainer.loggers:
                        logger.log_metrics({**values, "epoch": row.epoch}, row.step)
                        logger.save()

    # Nothing is left behind.

    def flush(self, trainer: Trainer) -> None:
        """Writes what is on its way; waits for the device."""
        self.end_step(trainer)
        if self._shown:
            self._show(trainer)
        self._send()
        self._deliver(trainer, everything=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is on its way."""
        self.flush(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is on its way; the next epoch's rows are its own."""
        self.flush(trainer)
        self._newest = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes what is on its way: where a kill follows, a resumed run would not write it again."""
        self.flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is on its way."""
        self.flush(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes what still arrives, of the steps that were done."""
        self._is_within_step = False
        with suppress(RuntimeError):  # the device itself has failed, and the exception says so
            self._send()
            if self._reader.arrives_within(_PATIENCE):
                self.flush(trainer)
