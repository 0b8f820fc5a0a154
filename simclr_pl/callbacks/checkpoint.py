"""Checkpoints that a run can be resumed from as if it had never stopped."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.utilities import _is_max_limit_reached

from simclr_pl.checkpoint_io import SafeModelCheckpoint

_LOG_STEP = "update_train_step_metrics"  # of Lightning's, at the end of each step


class ExactCheckpoint(SafeModelCheckpoint):
    """ModelCheckpoint at the places from which Lightning goes on exactly, with the same options.

    A checkpoint that is due after a step is written when all that belongs to the step is done: where a
    validation follows, after it; at the last batch of an epoch, in ``on_train_epoch_end``. (Lightning
    2.6 writes it before, and the resumed run leaves out that validation and the epoch's end.) None falls
    between the batches of one accumulated step, whose gradients a checkpoint does not hold. The last
    step of a run is always due.

    A run that is resumed at an epoch's end starts the next epoch, with ``max_steps``, too. (Lightning
    would go on with the finished epoch: run its end again, or a batch and a validation too many.)
    """

    _is_due = _puts_off = _is_within_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves a finished epoch behind."""
        super().on_train_start(trainer, pl_module)
        vars(trainer._logger_connector).pop(_LOG_STEP, None)  # where a save was broken off
        fit_loop = trainer.fit_loop
        if fit_loop.restarted_on_epoch_end:  # only with `max_steps`: else Lightning does the same
            fit_loop.epoch_progress.increment_completed()
            fit_loop.reset_restart_stage()
            fit_loop._restarting = False  # its setter says True wherever `max_steps` is given
            fit_loop.epoch_loop.restarting = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves what is due, or puts it off to where the step ends."""
        if trainer.fit_loop._should_accumulate():
            return
        self._puts_off, self._is_within_step = step_goes_on(trainer), True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._puts_off = self._is_within_step = False

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._is_within_step:
            _log_step(trainer)
        super()._save_checkpoint(trainer, filepath)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was put off within an epoch."""
        super().on_validation_end(trainer, pl_module)
        if self._is_due and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save_both(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was put off to here, or is due here."""
        if self._is_due or (_is_over(trainer) and not self._should_skip_saving_checkpoint(trainer)):
            self._save_both(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_both(self, trainer: Trainer) -> None:
        self._is_due = False
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._puts_off:
            self._is_due = True
        else:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if not self._puts_off:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # Lightning keeps what it resumed from: a file more for each time that a run is resumed.
        inside = Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents
        return inside and previous != current

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best and the last one of the same folder, by whatever path it is called now."""
        assert self.dirpath is not None
        state = _renamed(state_dict, Path(self.dirpath))
        super().load_state_dict(state)
        # The first checkpoint of a run does not know the link that was made after it: without this the
        # resumed run would leave last.ckpt as it is, and go on with last-v1.ckpt.
        if self.save_last and self.dirpath == state["dirpath"]:
            self.last_model_path = self.last_model_path or self.format_checkpoint_name(
                {}, self.CHECKPOINT_NAME_LAST
            )


def _renamed(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state with its paths in ``folder``, where its files are there: a run may have been moved."""

    def here(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    if not Path(here(state["best_model_path"])).is_file():
        return state
    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        **{key: here(state[key]) for key in paths},
        "dirpath": str(folder),
        "best_k_models": {here(path): score for path, score in state["best_k_models"].items()},
    }


def _log_step(trainer: Trainer) -> None:
    """Logs a step now, not right after it is saved, where a kill would lose its row for good."""
    connector = trainer._logger_connector
    if _LOG_STEP not in vars(connector):
        connector.update_train_step_metrics()
        setattr(connector, _LOG_STEP, lambda: delattr(connector, _LOG_STEP))  # the next call, alone


def step_goes_on(trainer: Trainer) -> bool:
    """Whether a validation or the epoch's end still belongs to the step; in ``on_train_batch_end``."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)


def _is_over(trainer: Trainer) -> bool:
    """Whether no epoch follows; in ``on_train_epoch_end``."""
    loop = trainer.fit_loop  # whose own `done` would say so to the user, too
    epochs: Any = loop.epoch_progress.current
    return (
        trainer.should_stop
        or _is_max_limit_reached(loop.epoch_loop.global_step, loop.max_steps)
        or _is_max_limit_reached(epochs.processed, loop.max_epochs or -1)
    )
