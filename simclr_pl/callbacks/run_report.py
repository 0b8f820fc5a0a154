"""`environment.json` at the start of a run, `report.html` at its end."""

import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from simclr_pl.durable import publish, temporary_of
from simclr_pl.environment import environment

_log = logging.getLogger(__name__)


class RunReport(Callback):
    """Writes down what a run ran on, and a page that shows what came of it.

    ``environment.json`` in the run's folder, at the start: versions, devices, the command, the state of
    git; if the run is stopped by a signal or an error, also by which, and at which step. ``report.html``,
    at the end, also of a run that was stopped once it had begun to train: one file with everything that
    the run's folder holds, as `simclr report` makes it. A failure to write either is a warning.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None  # on rank 0, of a fit
        self._found: dict[str, Any] = {}
        self._has_trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
        is_wanted = stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._folder = folder if is_wanted and trainer.is_global_zero else None
        self._has_trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what the run runs on."""
        if self._folder is not None:
            self._found = environment()
            self._write_environment(self._folder)

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes that there is something to report."""
        self._has_trained = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes what has stopped the run, and the page; waits for no other rank."""
        if self._folder is not None and self._found:
            reason = f"{type(exception).__name__}: {exception}".removesuffix(": ")
            self._found["stopped"] = {"step": trainer.global_step, "reason": reason}
            self._write_environment(self._folder)
            self._report()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the page, when the summary is there."""
        self._report()

    def _write_environment(self, folder: Path) -> None:
        file = folder / "environment.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary_of(file).write_text(json.dumps(self._found, indent=2) + "\n")
            publish(temporary_of(file), file)
        except OSError as error:
            _log.warning("environment.json is not written: %s", error)

    def _report(self) -> None:
        folder, self._folder = self._folder, None
        if folder is None or not self._has_trained:
            return
        try:
            from simclr_pl.report import write_report  # jinja2, for the end only

            file = write_report([folder], folder / "report.html")
        except Exception as error:  # whatever it is: the run is done
            _log.warning("the report is not written: %s: %s", type(error).__name__, error)
        else:
            print(f"report: {file}")
