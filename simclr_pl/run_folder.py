"""The folder of a run that goes on in it: its checkpoint, its tables, its trackers."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from simclr_pl.checkpoint_io import damage, newest_valid
from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError
from simclr_pl.trackers import trackers_of

_CHECKPOINTS = "checkpoints"  # Lightning's name, within a run's folder


class Resumed(NamedTuple):
    """What a run goes on from.

    Attributes:
        checkpoint: the file.
        step: updates that were done when it was written; those after it are done again.
    """

    checkpoint: Path
    step: int

    @property
    def folder(self) -> Path:
        """The run's, ``<root>/<name>/version_<n>``."""
        return self.checkpoint.absolute().parents[1]


def find_resumed(resume: str, versions: Path) -> Resumed | None:
    """The run that ``--resume`` means.

    Args:
        resume: "auto" for the newest valid checkpoint of the newest version that has any, or a file in
            the folder ``checkpoints`` of its run.
        versions: the folder ``<root>/<name>``.

    Returns:
        None where "auto" finds nothing.

    Raises:
        InputError: there is no such file, it is in no run's folder, is damaged, or has weights alone.
    """
    if resume == "auto":
        checkpoint = _newest(versions)
        if checkpoint is None:
            return None
    else:
        checkpoint = Path(resume)
        if not checkpoint.is_file():
            raise InputError(
                f"`resume` must be auto or a checkpoint; got {resume!r}, where there is no file. Set "
                "`resume` to a file in the run's checkpoints/."
            )
        if checkpoint.absolute().parent.name != _CHECKPOINTS:
            raise InputError(
                f"`resume` must be a checkpoint in its run's {_CHECKPOINTS}/; got {resume!r}. Set "
                "`ckpt_path` instead, and the run goes on in a folder of its own."
            )
        if (reason := damage(checkpoint)) is not None:
            raise InputError(
                f"`resume` must be a whole checkpoint of plain values and tensors alone; got {resume!r}: "
                f"{reason} Set `resume` to auto for the newest that is."
            )
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    if "loops" not in content:
        raise InputError(
            f"`resume` must be a checkpoint of a whole run; got {str(checkpoint)!r}, which has the "
            "weights alone. Set `checkpoint.save_weights_only` to false in runs to be resumed."
        )
    return Resumed(checkpoint, int(content["global_step"]))


def _newest(versions: Path) -> Path | None:
    folders = [f for f in versions.glob("version_*") if f.name.removeprefix("version_").isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name.removeprefix("version_")), reverse=True):
        if (checkpoint := newest_valid(folder / _CHECKPOINTS)) is not None:
            return checkpoint
    return None


def loggers_of(
    trainer: dict[str, Any],
    name: str,
    track: Sequence[str],
    resumed: Resumed | None,
    track_checkpoint: bool = False,
) -> list[Logger]:
    """The loggers of a run: its table, those of the trainer's options, and the trackers.

    Args:
        trainer: options of the trainer.
        name: of the run.
        track: "tensorboard", "wandb" or "wandb-offline".
        resumed: where the run goes on: in the same folder, and in the tracker's same run.
        track_checkpoint: hand the checkpoint to wandb.

    Raises:
        InputError: ``track_checkpoint`` without wandb.
    """
    table = MetricsTable(trainer["default_root_dir"], name, resumed)
    given = trainer["logger"]
    if given is None or isinstance(given, bool):
        given = []
    given = given if isinstance(given, list) else [given]
    redone = None if resumed is None else resumed.step
    trackers = trackers_of(Path(table.log_dir), name, track, redone, track_checkpoint)
    return [table, *given, *trackers]


class MetricsTable(CSVLogger):
    """Lightning's CSVLogger that writes each row at once, and goes on with the table that is there.

    Lightning's own keeps up to 100 steps to itself, and deletes the table of a folder that it is given.

    Args:
        root: folder of the runs.
        name: of the run.
        resumed: where it goes on; rows of steps that are done again leave the table.
    """

    def __init__(self, root: str, name: str, resumed: Resumed | None = None) -> None:
        version = None
        if resumed is not None:
            folder = resumed.folder
            root, name, version = str(folder.parents[1]), folder.parent.name, folder.name
        super().__init__(root, name, version, flush_logs_every_n_steps=1)
        self._resumed = resumed

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the table."""
        if self._experiment is None:
            if self._resumed is not None:
                rewind(self._resumed.folder, self._resumed.step)
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Rows(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _Rows(ExperimentWriter):
    """Keeps the rows that are there, and leaves hparams.yaml alone, which Lightning writes with each."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        table = Path(self.metrics_file_path)
        if table.is_file():
            with table.open(newline="") as lines:
                self.metrics_keys = next(csv.reader(lines), [])

    def save(self) -> None:
        """Appends the new rows; `log_hparams` writes its file by itself."""
        super(ExperimentWriter, self).save()

    def _check_log_dir_exists(self) -> None:
        """Where Lightning's deletes the table."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """As Lightning's, but a kill leaves the old table or the new one."""
        table = Path(self.metrics_file_path)
        with table.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        _write_table(table, fieldnames, rows)


def rewind(folder: Path, step: int) -> None:
    """Drops what a run wrote of steps that are done again, and last lines that broke off.

    Args:
        folder: of the run.
        step: updates that are done; rows are numbered from 0.
    """
    for name, delimiter in (("metrics.csv", ","), ("bad_steps.tsv", "\t")):
        table = folder / name
        if table.is_file():
            with table.open(newline="", errors="surrogateescape") as file:  # names of images
                reader = csv.DictReader(file, delimiter=delimiter)
                rows = [r for r in reader if None not in r.values() and int(r["step"]) < step]
            if reader.fieldnames:
                _write_table(table, reader.fieldnames, rows, delimiter)
    histograms = folder / "histograms.jsonl"
    if histograms.is_file():
        lines = histograms.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) < step]
        _write(histograms, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # broken off
        return float("inf")


def _write_table(
    file: Path, keys: Iterable[str], rows: list[dict[str, Any]], delimiter: str = ","
) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(keys), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    _write(file, text.getvalue())


def _write(file: Path, text: str) -> None:
    temporary_of(file).write_text(text, newline="", errors="surrogateescape")
    publish(temporary_of(file), file)
