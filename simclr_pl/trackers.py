"""The trackers of a run, so that all of them hold the same keys at the same steps."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from simclr_pl.checkpoint_io import newest_valid
from simclr_pl.errors import InputError
from simclr_pl.secrets import masked_arguments

_AXIS = "global_step"
_BEST = {  # what a run's summary holds beside the latest value
    "max": ("knn/top1", "knn/top5", "probe/top1", "probe/top5"),
    "min": ("train/loss",),
}
_COUNTED = (None, "step", "epoch")  # monitors that make the newest checkpoint the best one


def wandb_run(folder: Path) -> str | None:
    """The id of the last run that wandb wrote into a run's folder; None where there is none."""
    files = folder.glob("wandb/*run-*/run-*.wandb")
    # the folders' names hold the time: <"run" or "offline-run">-<date>_<time>-<id>
    last = max(files, key=lambda file: file.parent.name.partition("run-")[2], default=None)
    return None if last is None else last.stem.removeprefix("run-")


def trackers_of(
    folder: Path, project: str, track: Sequence[str], purge_step: int | None, checkpoint: bool
) -> list[Logger]:
    """The trackers of a run, which go on with what they wrote into its folder.

    Args:
        folder: of the run.
        project: its name in the dashboard.
        track: "tensorboard", "wandb" or "wandb-offline".
        purge_step: the first step that is done again; None where none is.
        checkpoint: hand the checkpoint to wandb as an artifact.

    Raises:
        InputError: ``checkpoint`` without wandb.
    """
    if checkpoint and not any(tracker.startswith("wandb") for tracker in track):
        raise InputError(
            f"`track_checkpoint` needs wandb or wandb-offline in `track`; got {list(track)}. Add one, "
            "or set `track_checkpoint` to false."
        )
    return [
        BoardTracker(folder, purge_step)
        if tracker == "tensorboard"
        else WandbTracker(folder, project, tracker == "wandb-offline", checkpoint)
        for tracker in track
    ]


class BoardTracker(TensorBoardLogger):
    """TensorBoard's files in a run's folder, without the scalar ``hp_metric`` that nobody measured.

    Args:
        folder: of the run.
        purge_step: the first step that is done again, whose values TensorBoard forgets.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        options: dict[str, Any] = {} if purge_step is None else {"purge_step": purge_step}
        super().__init__(folder, name="", version="", default_hp_metric=False, **options)


class WandbTracker(WandbLogger):
    """Weights & Biases in a run's folder; one that is there goes on.

    ``global_step`` is the x-axis of everything. The run's summary holds the latest value of each key,
    the highest accuracies and the lowest loss.

    Args:
        folder: of the run.
        project: in the dashboard.
        offline: write files alone, for ``wandb sync``.
        checkpoint: at the end, log the newest checkpoint as an artifact; where ``checkpoint.monitor``
            is a metric, also the one that it prefers, with the alias "best".
    """

    def __init__(
        self, folder: Path, project: str, offline: bool = False, checkpoint: bool = False
    ) -> None:
        # Else the second fit of a process would go on in the first one's run.
        options: dict[str, Any] = {"reinit": "finish_previous"}
        if offline:
            options["mode"] = "offline"
        super().__init__(project=project, save_dir=folder, id=wandb_run(folder), **options)
        del self._wandb_init["anonymous"]  # wandb warns of it
        self._logs_checkpoint = checkpoint
        self._saver: ModelCheckpoint | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, started at the first use."""
        if self._experiment is None:
            import wandb

            Path(str(self.save_dir)).mkdir(parents=True, exist_ok=True)  # else it takes another
            words = sys.argv
            sys.argv = masked_arguments(words)  # wandb keeps them
            try:
                self._experiment = wandb.init(**self._wandb_init)
            finally:
                sys.argv = words
            self._experiment.define_metric(_AXIS, hidden=True)
            self._experiment.define_metric("*", step_metric=_AXIS, step_sync=True)
            for best, keys in _BEST.items():
                for key in keys:
                    self._experiment.define_metric(key, step_metric=_AXIS, summary=f"{best},last")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers, or wandb's own objects, at an optimiser step."""
        self.experiment.log({**metrics, **({} if step is None else {_AXIS: step})})

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing: Lightning brings the options of model and data, and `log_config` has all of them."""

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """Logs the whole configuration.

        Args:
            config: without secrets.
        """
        self.experiment.config.update(config, allow_val_change=True)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Remembers where the checkpoints are."""
        self._saver = checkpoint_callback

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Logs the checkpoints, also where the run failed."""
        if not self._logs_checkpoint or self._saver is None:
            return
        saver, self._saver = self._saver, None  # each once
        newest = newest_valid(Path(str(saver.dirpath)))
        best = None if saver.monitor in _COUNTED else Path(saver.best_model_path).resolve()
        if best is not None and best.is_file() and (newest is None or best != newest.resolve()):
            self._log_file(best, ["best"], saver)
            best = None
        if newest is not None:  # the last one logged is "latest"
            self._log_file(newest, ["best"] if best is not None else [], saver)

    def _log_file(self, file: Path, aliases: list[str], saver: ModelCheckpoint) -> None:
        import wandb

        facts: dict[str, Any] = {"file": file.name}
        if "best" in aliases and saver.best_model_score is not None:
            facts[str(saver.monitor)] = float(saver.best_model_score)
        artifact = wandb.Artifact(f"checkpoint-{self.version}", type="model", metadata=facts)
        artifact.add_file(str(file), name="model.ckpt")
        self.experiment.log_artifact(artifact, aliases=aliases)
