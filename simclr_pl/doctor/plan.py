"""What a run will do: steps, learning rate, time, disk.

Symbols: B samples of a rank's batch, V views.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import ModelCheckpoint

from simclr_pl.callbacks import EvaluationPace, RunSummary
from simclr_pl.callbacks.evaluation_pace import epochs_between
from simclr_pl.doctor.lines import Line, duration, number, size
from simclr_pl.optim import lr_factor

_OTHER_FILES = 64 * 2**20  # bytes for pictures, tables and the report
_FULL = 0.8  # of the free disk


class Length(NamedTuple):
    """How long a run is.

    Attributes:
        steps: updates in all; None where nothing ends the run.
        per_epoch: updates of an epoch.
        warmup: updates of the warm-up.
    """

    steps: int | None
    per_epoch: int
    warmup: int


def length_of(trainer: Any, model: Any, samples: int, global_batch_size: int) -> Length:
    """The length of a run on so many training samples, as Lightning and `SimCLR` count it."""
    batches = samples // global_batch_size
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    warmup = round(model.warmup_epochs * batches / trainer.accumulate_grad_batches)
    limits = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * per_epoch)
    return Length(min(limits, default=None), per_epoch, warmup)  # type: ignore[type-var]


def rate_line(length: Length, model: Any, per_update: int, about: dict[str, Any]) -> Line:
    """The learning rate after scaling, and its schedule.

    Args:
        length: of the run.
        model: the `SimCLR`.
        per_update: of all ranks and accumulated batches.
        about: ``optimizer`` and its base ``rate``, from `simclr_pl.doctor.step.measure`.
    """
    factor = lr_factor(model.lr_scaling, per_update)
    rate = about["rate"] * factor
    text = f"{about['optimizer']}, peak {rate:.4g}"
    if factor != 1:
        text += f" (base {about['rate']:.4g} x {factor:.4g}, {model.lr_scaling} in {per_update:,})"
    text += f"; {length.warmup:,} steps of warm-up"
    if length.steps is None:
        return Line(
            "error",
            "learning rate",
            f"{text}; the cosine after it needs an end of training",
            "Set --trainer.max_epochs or --trainer.max_steps.",
        )
    if length.warmup >= length.steps:
        return Line(
            "warning",
            "learning rate",
            f"{text} of {length.steps:,} in all: the peak is never reached",
            f"Set --model.warmup_epochs {0.1 * length.steps / length.per_epoch:.2g}, a tenth of the run.",
        )
    return Line("ok", "learning rate", f"{text}, then a cosine to 0")


def steps_line(length: Length, global_batch_size: int, ranks: int, unit: str) -> Line:
    """How many steps there are."""
    total = "no end" if length.steps is None else f"{length.steps:,} steps"
    epochs = "" if length.steps is None else f", {length.steps / length.per_epoch:,.3g} epochs"
    batch = f"a batch of {global_batch_size:,} {unit} on {ranks} rank(s)"
    return Line("ok", "steps", f"{total}{epochs} of {length.per_epoch:,}; {batch}")


class Speed(NamedTuple):
    """Seconds, of one rank.

    Attributes:
        step: encoder, head, loss and optimiser on a batch.
        loading: a batch's views in the loader, by one worker.
        staging: a batch's views on the CPU as the device; 0 for a GPU.
        workers: loader processes; 0 where the loader is in the training process.
        on_cpu: whether workers and model share the cores.
    """

    step: float
    loading: float
    staging: float
    workers: int
    on_cpu: bool

    @property
    def feeding(self) -> float:
        """Seconds from one batch of the loader to the next."""
        return self.loading / max(1, self.workers)

    @property
    def total(self) -> float:
        """Seconds of a step, with all it waits for."""
        busy = self.step + self.staging
        if self.workers == 0 or self.on_cpu:
            return busy + self.feeding
        return max(busy, self.feeding)


def loader_line(speed: Speed, batch: int, unit: str = "images") -> Line:
    """Whether the loader keeps up with the encoder.

    Args:
        speed: of a step.
        batch: B.
        unit: what samples are called.
    """
    busy = speed.step + speed.staging
    gives, takes = batch / max(speed.feeding, 1e-9), batch / busy
    where = f"{speed.workers} workers" if speed.workers else "no workers"
    text = f"{where}: {number(gives)} {unit}/s, the encoder takes {number(takes)}"
    if gives >= takes or (speed.on_cpu and speed.workers == 0):
        return Line("ok", "loader", text)
    return Line(
        "warning",
        "loader",
        f"{text}: it will wait for {unit}",
        ("Pack the set: simclr data pack; or give " if unit == "images" else "Give ")
        + "more cores, and --data.num_workers as many.",
    )


def evaluations(trainer: Any, data: Any, length: Length, evaluated: int) -> int:
    """How often a run scores the bank and the query, about.

    Args:
        trainer: of the run.
        data: its data module.
        length: of the run.
        evaluated: samples of an evaluation.
    """
    steps = length.steps or 0
    ends = 2 if any(isinstance(c, RunSummary) for c in trainer.callbacks) else 0
    if trainer.limit_val_batches == 0 or not evaluated:
        return ends
    every = trainer.check_val_every_n_epoch
    interval = trainer.val_check_interval
    if any(isinstance(c, EvaluationPace) for c in trainer.callbacks):
        trained = length.per_epoch * trainer.accumulate_grad_batches * data.global_batch_size
        every = epochs_between(evaluated, trained, data.n_views)
        return ends + max(1, math.ceil(steps / length.per_epoch / every))
    if every is None:
        batches = steps * trainer.accumulate_grad_batches
        return ends + (batches // interval if isinstance(interval, int) else 0)
    within = length.per_epoch / interval if isinstance(interval, int) else round(1 / interval)
    return ends + int(steps / length.per_epoch / every * max(1, within))


def time_line(seconds: float, steps: int, count: int, each: float) -> Line:
    """The forecast of time.

    Args:
        seconds: of a step.
        steps: of the run.
        count: evaluations.
        each: seconds of one.
    """
    text = (
        f"about {duration(seconds * steps + count * each)}: {steps:,} steps of {duration(seconds)}"
    )
    if count:
        text += f", {count} evaluations of {duration(each)}"
    return Line("ok", "time", text)


# The disk.


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.exists())


def write_line(root: Path) -> Line:
    """Whether a run can write into its folder: a megabyte is written, and is gone again."""
    place = existing(root)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Line(
            "error",
            "run folder",
            f"{root} cannot be written: {error.strerror}",
            "Make room or rights there, or set --trainer.default_root_dir.",
        )
    return Line("ok", "run folder", f"{root} can be written, {size(free)} free")


def disk_line(root: Path, trainer: Any, length: Length, checkpoint: int) -> Line:
    """Whether the checkpoints fit on the disk.

    Args:
        root: of the runs.
        trainer: of the run.
        length: of the run.
        checkpoint: bytes of one.
    """
    free = shutil.disk_usage(existing(root)).free
    count = _kept(trainer, length)
    needed = (count + 1) * checkpoint + _OTHER_FILES if count else _OTHER_FILES
    text = f"{count} checkpoints of {size(checkpoint)} are kept, one more while one is written: "
    text += f"{size(needed)} with the rest, of {size(free)} free"
    remedy = "Make room, set --trainer.default_root_dir, or keep fewer: --checkpoint.save_top_k 1."
    if needed > free:
        return Line("error", "disk", text, remedy)
    return (
        Line("warning", "disk", text, remedy) if needed > _FULL * free else Line("ok", "disk", text)
    )


def _kept(trainer: Any, length: Length) -> int:
    """Checkpoints that a run leaves at most."""
    total = 0
    for callback in trainer.callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        steps = length.steps or 0
        every = callback._every_n_train_steps or length.per_epoch * max(1, callback._every_n_epochs)
        written = max(1, math.ceil(steps / every))
        kept = written if callback.save_top_k < 0 else min(written, callback.save_top_k)
        total += kept + (callback.save_last is True)
    return total
