"""Stopping in good order when the machine is wanted back."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from simclr_pl.callbacks.checkpoint import step_goes_on
from simclr_pl.callbacks.delayed import DelayedReader
from simclr_pl.distributed import all_reduce_sum

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's; SLURM's `--signal=USR1@seconds`


class Preempted(SystemExit):
    """Ends a run that was asked to stop; its process's exit code is 85."""

    exit_code = 85

    def __init__(self) -> None:
        super().__init__(self.exit_code)


class Preemption(Checkpoint):
    """Saves and stops when the scheduler wants the machine back.

    SIGTERM or SIGUSR1, at one rank or at all, only leaves a mark. In every step the ranks sum their
    marks, so that all of them stop after the same step; they write `last.ckpt` into the run's folder of
    checkpoints, once, and end with exit code 85. `simclr fit --resume auto` goes on from there; where
    the disk is full and that file could not be written, from the one before. They never stop between
    accumulated batches, and finish a validation or an epoch's end first. On a GPU the sum is read four
    steps later, so that nothing waits for it. A run that is over anyway ends as usual.

    It takes the place of Lightning's own handlers, SLURM's automatic requeueing included: those save
    within whatever the signal interrupts, and wait forever when one rank is signalled.
    """

    def __init__(self) -> None:
        self._asked = self._agreed = self._saved = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._marks = DelayedReader(torch.device("cpu"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the signals."""
        if stage != "fit" or threading.current_thread() is not threading.main_thread():
            return  # only a main thread may
        self._asked = self._agreed = self._saved = False
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        # In every step it waits for the device, to spread the mark of a handler that is now never called.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        self._handlers = {number: signal.signal(number, self._mark) for number in _SIGNALS}

    def _mark(self, number: int, _: FrameType | None) -> None:
        self._asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for the device, which is known by now."""
        self._marks = DelayedReader(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a run that is saved: not before here, where the last step has reached the loggers."""
        if self._saved:
            if trainer.is_global_zero:
                _log.warning("asked to stop: ending after step %d with 85", trainer.global_step)
            # Its observer would kill this process as soon as another rank has ended with 85.
            getattr(trainer.strategy.launcher, "procs", []).clear()
            raise Preempted

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lets the ranks agree, and saves where the step is done."""
        mark = torch.full((1,), float(self._asked), device=pl_module.device)
        self._marks.push(all_reduce_sum(mark))
        self._agreed |= any(read.values[0] > 0 for read in self._marks.read())
        if not (trainer.fit_loop._should_accumulate() or step_goes_on(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where the step is done after an evaluation within an epoch."""
        loop = trainer.fit_loop.epoch_loop
        if not (loop._should_accumulate() or loop._num_ready_batches_reached()):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where the step was an epoch's last one."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._agreed:
            last = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt"
            # With a barrier at its end. Lightning mentions weights_only unless it is given.
            trainer.save_checkpoint(f"{_folder(trainer)}/{last}", weights_only=False)
            self._saved = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back; where it has stopped the run, no further one must change how."""
        if isinstance(exception, Preempted):
            # At once: in a moment of the old handlers a further signal would be the end.
            self._handlers = dict.fromkeys(self._handlers, signal.SIG_IGN)
        self._give_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        del trainer._signal_connector.register_signal_handlers
        del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor


def _nothing() -> None:
    """In the place of a method that must not act."""


def _folder(trainer: Trainer) -> str | Path:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return callback.dirpath
    return Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")  # collective
