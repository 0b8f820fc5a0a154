"""What the host does in a step beside the network: all default monitors against Lightning's bare loop.

    python benchmarks/host.py                           about a minute on one core

An encoder that costs next to nothing and a batch of 16 digits, so that a step is what the host makes of
it: the time that a GPU would have to be busy for to hide it. "Bare" is the same module without its log
calls, in a Trainer without loggers, callbacks or a bar; "ours" has the callbacks, the table and the bar
of `simclr fit`, the bar on a terminal of its own, and not the summary, the report and the pictures,
which have nothing to do in a step. Both train in turns, on one thread; the numbers are
the medians of the rounds, in the process's own time, "in hooks" that within each callback's functions.
"""

import argparse
import io
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD

from simclr_pl import ContrastiveDataModule, Projector, SimCLR
from simclr_pl.callbacks import StepLog
from simclr_pl.checkpoint_io import SafeCheckpointIO
from simclr_pl.data import Digits
from simclr_pl.run_folder import MetricsTable
from simclr_pl.training_cli import _MONITORS, _TRAINER_DEFAULTS, _ProgressBar

_WARM_UP = 50  # steps
_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Silent(SimCLR):
    """Logs nothing."""

    def log(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Stopwatch(Callback):
    """Takes the time of each step, from batch to batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.process_time())

    def milliseconds(self) -> float:
        """Of a step, the mean."""
        first, last = self.times[_WARM_UP], self.times[-1]
        return 1000 * (last - first) / (len(self.times) - 1 - _WARM_UP)


def train(cls: type[SimCLR], callbacks: list[Callback], steps: int, **options: Any) -> Trainer:
    seed_everything(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 8))
    encoder.num_features = 8  # type: ignore[assignment]
    projector = partial(Projector, hidden_features=8, out_features=8)
    model = cls(encoder, projector, optimizer=partial(SGD, lr=0.1), lr_scaling="none")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        limit_val_batches=0,
        **{**_TRAINER_DEFAULTS, "check_val_every_n_epoch": 1, **options},
    )
    trainer.fit(model, ContrastiveDataModule(Digits(), global_batch_size=16))
    return trainer


def bare(steps: int) -> float:
    """Milliseconds a step."""
    watch = Stopwatch()
    off = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    train(Silent, [watch], steps, **off)
    return watch.milliseconds()


def ours(steps: int, spent: dict[str, list[float]]) -> float:
    """Milliseconds a step; adds those of each callback to ``spent``."""
    watch = Stopwatch()
    unneeded = ("summary", "report", "pictures")  # at the start and the end, not in steps
    kept = {key: value for key, value in _MONITORS.items() if key not in unneeded}
    terminal = {"file": io.StringIO(), "force_terminal": True, "width": 120}
    callbacks = [cls(**options) for cls, options, _ in kept.values()]
    callbacks = [StepLog(), _ProgressBar(console_kwargs=terminal), *callbacks]
    seconds: dict[str, float] = defaultdict(float)
    for callback in callbacks:
        name = type(callback).__name__.strip("_")
        for hook in _HOOKS:
            if getattr(type(callback), hook) is not getattr(Callback, hook):
                setattr(callback, hook, _timed(getattr(callback, hook), seconds, name))
    with tempfile.TemporaryDirectory() as folder:
        options = {"logger": MetricsTable(folder, "host"), "default_root_dir": folder}
        train(SimCLR, [watch, *callbacks], steps, plugins=SafeCheckpointIO(), **options)
    for name, total in seconds.items():
        spent[name].append(1000 * total / steps)
    return watch.milliseconds()


def _timed(hook: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., None]:
    def call(*args: Any) -> None:
        begin = time.process_time()
        hook(*args)
        seconds[name] += time.process_time() - begin

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spent: dict[str, list[float]] = defaultdict(list)
    pairs = [(bare(given.steps), ours(given.steps, spent)) for _ in range(given.rounds)]
    table = Table(title="Milliseconds a step, on the host")
    for heading in ("", "median"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("bare", f"{median(b for b, _ in pairs):.2f}")
    table.add_row("ours", f"{median(o for _, o in pairs):.2f}")
    table.add_row("ours - bare", f"{median(o - b for b, o in pairs):.2f}", end_section=True)
    for name, values in sorted(spent.items(), key=lambda item: -median(item[1])):
        table.add_row(f"in hooks: {name}", f"{median(values):.3f}")
    Console(width=100).print(table)
    print(f"ours / bare: {median(o / b for b, o in pairs):.2f}")
