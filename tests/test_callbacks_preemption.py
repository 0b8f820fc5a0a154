"""Signals only stop a run where it can go on exactly, on all ranks after the same step.

`SIMCLR_TEST_SIGNALS` sets how many are tried; `make soak` tries more.
"""

import csv
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks, processes_of
from tiny import tiny_data, tiny_model, tiny_trainer

from simclr_pl.callbacks import ExactCheckpoint, Preemption
from simclr_pl.callbacks.preemption import Preempted
from simclr_pl.checkpoint_io import SafeCheckpointIO, newest_valid

SIGNALS = int(os.environ.get("SIMCLR_TEST_SIGNALS", "20"))
LONG = 10**4  # epochs, more than any test waits for
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory .* is not empty"),
]


class Events(Callback):
    """What was done, in order, and a signal to this process when some of it is done."""

    def __init__(self, asks_at: str | None = None) -> None:
        self.done: list[str] = []
        self.losses: dict[int, str] = {}
        self.asks_at = asks_at

    def _note(self, event: str) -> None:
        self.done.append(event)
        if event == self.asks_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx + 1
        self.losses[batch] = float(outputs["loss"]).hex()
        self._note(f"batch {batch}")

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self._note(f"validation {trainer.global_step}")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._note(f"validated {trainer.global_step}")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._note(f"epoch {trainer.current_epoch}")


class Recorder(SafeCheckpointIO):
    """Notes which files are written."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.names.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


def build(folder: Path, events: Callback, *more: Callback, **options: Any) -> Trainer:
    """Four batches to an epoch, a validation after every second one, a checkpoint every third step."""
    ranks = 2 if "RANK" in os.environ else 1  # Lightning forgets WORLD_SIZE after a run
    defaults = {
        "max_epochs": 3,
        "check_val_every_n_epoch": 2,
        "num_sanity_val_steps": 0,
        "plugins": [Recorder()],
    }
    return tiny_trainer(
        [events, *more, Preemption()],
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=True,
        **{**defaults, **options},
    )


def checkpoints(folder: Path) -> ExactCheckpoint:
    return ExactCheckpoint(
        folder / "checkpoints",
        "{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last="link",
        every_n_train_steps=3,
        enable_version_counter=False,
    )


def fit(trainer: Trainer, ckpt_path: Path | None = None) -> bool:
    """Whether it was stopped."""
    try:
        trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=30), ckpt_path=ckpt_path)
    except Preempted:
        return True
    return False


def steps_of(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["global_step"])


def logged(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open() as lines:
        return [int(row["step"]) for row in csv.DictReader(lines) if row["train/loss"]]


def be_struck(folder: Path) -> dict[str, Any]:
    """A run on all ranks that is stopped again and again; what each rank saw of it."""
    chance, rank = random.Random(0), torch.distributed.get_rank()
    last, losses, rows = folder / "checkpoints/last.ckpt", {}, []
    for trial in range(SIGNALS):
        seconds, number = chance.uniform(0, 0.3), chance.choice([signal.SIGTERM, signal.SIGUSR1])
        struck = chance.choice([[0], [1], [0, 1]])
        events = Events()
        timer = Timer(seconds, os.kill, (os.getpid(), number))
        events.on_train_start = lambda *_, t=timer, s=struck: t.start() if rank in s else None  # type: ignore[method-assign]
        trainer = build(folder / str(trial), events, checkpoints(folder), max_epochs=LONG)
        assert fit(trainer, last if trial else None)
        losses.update(events.losses)
        assert steps_of(last) == max(events.losses) == trainer.global_step
        if rank == 0:
            names = trainer.strategy.checkpoint_io.names  # type: ignore[attr-defined]
            assert names.count("last.ckpt") == 1
            assert names[-1] == "last.ckpt"
            assert newest_valid(last.parent) == last
            rows += logged(folder / str(trial))
    return {"losses": losses, "rows": rows}


def run_whole(folder: Path, steps: int) -> dict[int, str]:
    events = Events(f"batch {steps}")
    assert fit(build(folder, events, max_epochs=LONG))
    return events.losses


@pytest.mark.timeout(60 + 5 * SIGNALS)
def test_signals_at_any_moment_stop_both_ranks_after_the_same_step_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    struck = on_ranks(2, be_struck, tmp_path, timeout=30 + 4 * SIGNALS)
    steps = max(struck[0]["losses"])
    assert struck[0]["rows"] == list(range(steps))
    assert max(struck[1]["losses"]) == steps
    whole = on_ranks(2, run_whole, tmp_path / "whole", steps)
    assert [rank["losses"] for rank in struck] == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_loader_workers_that_are_signalled_too_bring_what_the_step_needs(
    number: signal.Signals, tmp_path: Path
) -> None:
    class AllAsked(Events):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            if len(self.done) == 1:
                workers = multiprocessing.active_children()
                assert len(workers) >= 2
                for worker in workers:
                    os.kill(worker.pid, number)  # type: ignore[arg-type]
                os.kill(os.getpid(), number)

    events = AllAsked()
    trainer = build(tmp_path, events, accumulate_grad_batches=8, limit_train_batches=16)
    with pytest.raises(Preempted):
        trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=30, num_workers=2))
    assert events.done == [f"batch {n}" for n in range(1, 9)]


def test_a_run_that_was_stopped_never_has_the_old_handlers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    install = signal.signal

    def recorded(number: Any, handler: Any) -> Any:
        if number in (signal.SIGTERM, signal.SIGUSR1):
            given.append(handler)
        return install(number, handler)

    monkeypatch.setattr(signal, "signal", recorded)
    with pytest.raises(Preempted):
        build(tmp_path, Events("batch 2")).fit(tiny_model(), datamodule=tiny_data(bank_size=30))
    assert len(given) == 4
    assert given[2:] == [signal.SIG_IGN] * 2


def be_stopped(folder: Path) -> None:
    class Steps(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (folder / f"steps_{trainer.global_rank}").write_text(str(trainer.global_step))

    trainer = build(folder, Steps(), max_epochs=LONG)
    trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=30))


def test_stopped_ranks_end_with_85_whatever_else_they_are_sent(tmp_path: Path) -> None:
    ranks = processes_of(2, be_stopped, tmp_path, timeout=60)
    try:
        while not all((tmp_path / f"steps_{rank}").exists() for rank in (0, 1)):
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.01)
        os.kill(ranks[1].pid, signal.SIGTERM)
        while any(rank.is_alive() for rank in ranks):
            for rank in ranks:
                with suppress(ProcessLookupError):  # ended just now
                    os.kill(rank.pid, signal.SIGTERM)
                    os.kill(rank.pid, signal.SIGUSR1)
            time.sleep(0.001)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [85, 85]
    steps = [int((tmp_path / f"steps_{rank}").read_text()) for rank in (0, 1)]
    assert steps == [steps_of(tmp_path / "checkpoints/last.ckpt")] * 2


@pytest.mark.parametrize(
    ("options", "asks_at", "last", "steps"),
    [
        ({}, "batch 2", "batch 2", 2),
        ({}, "batch 4", "epoch 0", 4),  # an epoch's last
        ({}, "batch 8", "epoch 1", 8),  # a validation and the epoch's end follow
        ({}, "validation 8", "batch 9", 9),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, "batch 3", "validated 3", 3),
        ({"accumulate_grad_batches": 3}, "batch 1", "batch 3", 1),
        ({"accumulate_grad_batches": 3}, "batch 3", "batch 3", 1),
        (
            {
                "accumulate_grad_batches": 3,
                "val_check_interval": 2,
                "check_val_every_n_epoch": None,
            },
            "batch 2",
            "batch 3",
            1,
        ),
    ],
)
def test_a_run_stops_where_the_step_is_done_and_goes_on_as_if_it_had_not(
    options: dict[str, Any], asks_at: str, last: str, steps: int, tmp_path: Path
) -> None:
    whole, first, second = Events(), Events(asks_at), Events()
    assert not fit(build(tmp_path / "whole", whole, **options))
    struck = build(tmp_path / "struck", first, checkpoints(tmp_path), **options)
    assert fit(struck)
    assert first.done[-1] == last
    assert struck.strategy.checkpoint_io.names.count("last.ckpt") == 1  # type: ignore[attr-defined]
    file = tmp_path / "checkpoints/last.ckpt"
    assert steps_of(file) == steps
    assert not fit(build(tmp_path / "again", second, checkpoints(tmp_path), **options), file)
    assert first.done + second.done == whole.done
    assert first.losses | second.losses == whole.losses


@pytest.mark.parametrize(
    ("options", "asks_at"),
    [({}, "batch 12"), ({"max_steps": 6}, "batch 6"), ({"max_steps": 6}, "epoch 1")],
)
def test_a_run_that_is_over_anyway_ends_as_usual(
    options: dict[str, Any], asks_at: str, tmp_path: Path
) -> None:
    events = Events(asks_at)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert not fit(build(tmp_path, events, **options))
    assert asks_at in events.done
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


def test_the_newest_checkpoint_is_always_the_one_to_go_on_from(tmp_path: Path) -> None:
    folder, last = tmp_path / "checkpoints", tmp_path / "checkpoints/last.ckpt"
    assert fit(build(tmp_path / "0", Events("batch 5"), checkpoints(tmp_path)))
    assert not last.is_symlink()
    assert newest_valid(folder) == last
    assert steps_of(last) == 5
    trainer = build(tmp_path / "1", Events("batch 7"), checkpoints(tmp_path))
    assert fit(trainer, last)
    assert trainer.strategy.checkpoint_io.names == ["step=6.ckpt", "last.ckpt"]  # type: ignore[attr-defined]
    assert newest_valid(folder) == last
    assert steps_of(last) == 7
    assert not fit(build(tmp_path / "2", Events(), checkpoints(tmp_path)), last)
    assert last.is_symlink()
    assert newest_valid(folder) == last.resolve()
    assert sorted(f.name for f in folder.iterdir()) == ["last.ckpt", "step=12.ckpt", "step=9.ckpt"]


def test_a_run_without_a_checkpoint_callback_saves_in_its_folder(tmp_path: Path) -> None:
    assert fit(build(tmp_path, Events("batch 2")))
    assert steps_of(tmp_path / "checkpoints/last.ckpt") == 2


def test_a_run_stops_also_where_it_cannot_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/last.ckpt").mkdir(parents=True)  # nothing can take its place
    with pytest.warns(UserWarning, match="NOT SAVED"):
        assert fit(build(tmp_path, Events("batch 2")))
