"""What survival costs in a step: the guard, the watchdog, preemption and checkpoints at their defaults.

    python benchmarks/survival.py                       about three minutes on 2 cores

The networks of configs/quickstart.yaml and ResNet-18 at a batch of 128 images of 32 pixels, on a CPU. The
steps of one run take turns, in random order: one with none of them, one with each, so that whatever else
the machine does meets all alike; their time is the process's own. "In turns" is the median of (step with
- step without) / step without; "in its hooks" is the time within the callbacks' own functions / step
without, which is surer, for it is hardly noise. There is one checkpoint after each epoch: its row is
a save / an epoch, by the clock.
"""

import argparse
import logging
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from simclr_pl import LARS, ConvEncoder, Encoder, Projector, SimCLR
from simclr_pl.callbacks import ExactCheckpoint, FiniteGuard, Preemption, Watchdog
from simclr_pl.checkpoint_io import SafeCheckpointIO

_IMAGES = 128  # of a batch
_WARM_UP = 2  # rounds
_SAVES = 5
_HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class InTurns(SimCLR):
    """Trains a step with no callback, one with each, and so on."""

    parts: dict[str, list[Callback]]

    def on_train_start(self) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)  # seconds
        self.hooks: dict[str, list[float]] = defaultdict(list)
        self.order: list[str] = []
        self.all = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        for callback in self.all:
            for name in _HOOKS:
                setattr(callback, name, self._timed(getattr(callback, name)))
        self._next()

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            begin = time.process_time()
            hook(*args)
            self.spent += time.process_time() - begin

        return call

    def _next(self) -> None:
        self.order = self.order or random.sample(list(self.parts), len(self.parts))
        self.turn = self.order.pop()
        self.trainer.callbacks[:] = self.parts[self.turn]  # type: ignore[attr-defined]
        self.spent, self.since = 0.0, time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps[self.turn].append(time.process_time() - self.since)
        self.hooks[self.turn].append(self.spent)
        self._next()

    def on_train_end(self) -> None:
        self.trainer.callbacks[:] = self.all  # type: ignore[attr-defined]


def train(model: InTurns, channels: int, rounds: int, folder: Path) -> float:
    """Returns the seconds of a save."""
    guard = FiniteGuard()
    others = [Watchdog(), Preemption(), ExactCheckpoint(folder, every_n_train_steps=10**9)]
    model.parts = {"none": [], "guard": [guard], "rest": others}
    batch = {
        "views": torch.randn(2 * _IMAGES, channels, 32, 32),
        "label": torch.zeros(_IMAGES, dtype=torch.int64),
        "index": torch.arange(_IMAGES),
    }
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[guard, *others],
        plugins=SafeCheckpointIO(),
        default_root_dir=folder,
        log_every_n_steps=10,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    steps = len(model.parts) * (rounds + _WARM_UP)
    trainer.fit(model, DataLoader([batch] * steps, batch_size=None))
    seconds = []
    for number in range(_SAVES):
        begin = time.perf_counter()
        trainer.save_checkpoint(folder / f"{number}.ckpt")
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def report(name: str, model: InTurns, save: float, epoch: int) -> Table:
    """Args: save: seconds; epoch: steps."""
    steps, hooks = ({k: v[_WARM_UP:] for k, v in x.items()} for x in (model.steps, model.hooks))
    step = median(steps["none"])
    table = Table(title=f"{name}: {1000 * step:.1f} ms a step")
    for heading in ("", "in turns", "in its hooks"):
        table.add_column(heading, justify="right" if heading else "left")
    for key, label in (("guard", "guard"), ("rest", "watchdog, preemption, checkpoint")):
        pairs = zip(steps[key], steps["none"], strict=True)
        turns = median((a - b) / b for a, b in pairs)
        table.add_row(label, f"{turns:.2%}", f"{median(hooks[key]) / step:.3%}")
    share = save / (epoch * step)
    table.add_row(f"a save, {1000 * save:.0f} ms, an epoch of {epoch} steps", "", f"{share:.2%}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="of ResNet-18 a tenth as many")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    small = partial(Projector, hidden_features=256, out_features=128)
    cases: dict[str, tuple[nn.Module, Any, Any, int, int]] = {
        "quick start": (ConvEncoder(16, in_channels=1), small, AdamW, 1, 11),
        "ResNet-18": (Encoder("resnet18"), Projector, LARS, 3, 390),
    }
    for name, (encoder, projector, optimizer, channels, epoch) in cases.items():
        seed_everything(0)
        model = InTurns(encoder, projector, optimizer=optimizer, lr_scaling="none")
        rounds = given.rounds if channels == 1 else max(1, given.rounds // 10)
        with tempfile.TemporaryDirectory() as folder:
            save = train(model, channels, rounds, Path(folder))
        Console(width=100).print(report(name, model, save, epoch))
