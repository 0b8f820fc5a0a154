"""The rows of a run are Lightning's, at once or late, and none is lost or doubled.

A CPU whose numbers are read late stands for a GPU: `late` sets after how many steps.
"""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from tiny import tiny_data, tiny_model, tiny_trainer
from torch import Tensor

from simclr_pl.callbacks import (
    CollapseMonitor,
    ExactCheckpoint,
    OnlineLinearProbe,
    StepLog,
    ThroughputMonitor,
    delayed,
)
from simclr_pl.run_folder import MetricsTable, Resumed
from simclr_pl.simclr import SimCLR


def late(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(delayed._LAG, "cpu", steps)


def rows(folder: Path) -> list[dict[str, str]]:
    """In the table's order, without what is timed."""
    with open(folder / "run/version_0/metrics.csv") as file:
        table = list(csv.DictReader(file))
    rows = [{k: v for k, v in row.items() if v} for row in table]
    return [{k: "?" if k.startswith("throughput/") else v for k, v in row.items()} for row in rows]


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Two epochs of seven steps, measured at steps of their own; evaluated once, after the second."""
    monitors = [OnlineLinearProbe(), CollapseMonitor(every_n_steps=3), ThroughputMonitor(0.9, 1)]
    model, ckpt_path = options.pop("model", None), options.pop("ckpt_path", None)
    defaults: dict[str, Any] = {"logger": MetricsTable(str(folder), "run")}
    defaults |= {"limit_train_batches": 7, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    defaults |= {"check_val_every_n_epoch": 2, "enable_checkpointing": True}
    trainer = tiny_trainer([*monitors, *callbacks], **{**defaults, **options})
    trainer.fit(model or tiny_model(), tiny_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def saver(folder: Path) -> ExactCheckpoint:
    return ExactCheckpoint(folder / "run/version_0/checkpoints", every_n_train_steps=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The rows of an uninterrupted run that writes them at once."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, saver(folder))
    return rows(folder)


def test_rows_are_lightnings(
    whole: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepLog, "take", lambda *_, **__: False)
    fit(tmp_path, enable_checkpointing=False)
    expected = rows(tmp_path)
    assert sum("train/loss" in row for row in expected) == 14
    for row, own in zip(expected, whole, strict=True):
        if "train/learning_rate" in row:  # which Lightning rounds to float32
            row["train/learning_rate"] = own["train/learning_rate"]
    assert whole == expected


@pytest.mark.parametrize(("every", "lag"), [(1, 4), (1, 20), (3, 4)])
def test_late_rows_are_those_written_at_once(
    every: int,
    lag: int,
    whole: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late(lag, monkeypatch)
    fit(tmp_path, log_every_n_steps=every, enable_checkpointing=False)
    own = {"train/loss", "throughput/step_ms"}
    expected = [r for r in whole if not own & r.keys() or (int(r["step"]) + 1) % every == 0]
    assert rows(tmp_path) == expected


class Note(Callback):
    """What callbacks see of a step's loss."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append((trainer.callback_metrics["train/loss"], outputs["loss"].detach()))


def test_callbacks_see_the_newest_numbers_at_any_lag(tmp_path: Path, monkeypatch: Any) -> None:
    late(4, monkeypatch)
    note = Note()
    stop = EarlyStopping("train/loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    best = ExactCheckpoint(tmp_path / "best", "{train/loss:.4f}", monitor="train/loss")
    trainer = fit(tmp_path, note, stop, best)
    assert all(torch.equal(seen, loss) for seen, loss in note.seen)
    assert trainer.global_step == len(note.seen) == 7
    assert best.best_model_score == note.seen[-1][1]
    assert isinstance(trainer.logged_metrics["train/loss"], Tensor)


class Fails(Checkpoint):  # after all others
    def __init__(self, step: int, kind: type[BaseException]) -> None:
        self.step, self.kind = step, kind

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.kind


@pytest.mark.parametrize("lag", [0, 4])
def test_a_run_that_fails_leaves_the_rows_of_the_steps_before(
    lag: int, tmp_path: Path, monkeypatch: Any
) -> None:
    late(lag, monkeypatch)
    with pytest.raises(ValueError):
        fit(tmp_path, Fails(6, ValueError))
    steps = [row["step"] for row in rows(tmp_path) if "train/loss" in row]
    assert steps == ["0", "1", "2", "3", "4"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("step", [5, 7])
def test_a_run_that_is_killed_after_a_save_and_resumed_has_each_row_once(
    step: int, whole: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(4, monkeypatch)
    monkeypatch.setattr(StepLog, "on_exception", lambda *_: None)  # as a kill, which none hears of
    with pytest.raises(SystemExit):
        fit(tmp_path, saver(tmp_path), Fails(step, SystemExit))
    checkpoints = tmp_path / "run/version_0/checkpoints"
    (checkpoint,) = checkpoints.iterdir()
    logger = MetricsTable("", "", Resumed(checkpoint, step))
    fit(tmp_path, saver(tmp_path), ckpt_path=checkpoint, logger=logger)
    assert rows(tmp_path) == whole


class Mine(SimCLR):
    """With hooks and means of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        self.log("mine/mean", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
        mean = outputs["features"].mean()
        self.log("mine/both", mean, on_step=True, on_epoch=True, batch_size=1)
        self.log("mine/count", torch.tensor(batch_idx), prog_bar=True)
        return outputs

    def on_train_batch_end(self, *_: Any) -> None:
        """In the place of SimCLR's."""


def test_means_over_an_epoch_go_lightnings_way(tmp_path: Path, monkeypatch: Any) -> None:
    late(4, monkeypatch)
    model = tiny_model()
    model.__class__ = Mine
    trainer = fit(tmp_path, model=model, enable_checkpointing=False)
    table = rows(tmp_path)
    assert [row["mine/mean"] for row in table if "mine/mean" in row] == ["3.0", "3.0"]
    assert sum("mine/both_step" in row for row in table) == 14
    assert [row["mine/count"] for row in table if "train/loss" in row] == [
        f"{i % 7}.0" for i in range(14)
    ]
    assert trainer.progress_bar_metrics["mine/count"] == 6.0


def test_a_trainer_has_one_however_often_it_fits() -> None:
    trainer = tiny_trainer([OnlineLinearProbe()], limit_train_batches=1, limit_val_batches=0)
    for _ in range(2):
        trainer.fit(tiny_model(), tiny_data())
    assert sum(isinstance(c, StepLog) for c in trainer.callbacks) == 1  # type: ignore[attr-defined]
