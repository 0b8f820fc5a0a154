"""A resumed run is the uninterrupted one: every loss, weight, head, evaluation and logged value."""

import csv
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks
from tiny import differences, tiny_data, tiny_fit, tiny_model, tiny_trainer
from torch import nn

from simclr_pl import ContrastiveDataModule
from simclr_pl.callbacks import (
    CollapseMonitor,
    EvaluationPace,
    ExactCheckpoint,
    KNNMonitor,
    OnlineLinearProbe,
)
from simclr_pl.data import Digits
from simclr_pl.data.loader import Loader
from simclr_pl.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dirpath has changed"),  # each run has its own folder
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
]


class Events(Callback):
    """What every step saw, and which hooks were called after which step."""

    def __init__(self) -> None:
        self.losses: dict[int, str] = {}  # in hex, by the number of the batch
        self.images: dict[int, list[int]] = {}
        self.hooks: list[tuple[str, int, int]] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        n = trainer.fit_loop.total_batch_idx
        assert n not in self.losses
        self.losses[n] = float(outputs["loss"]).hex()
        self.images[n] = batch["index"].tolist()

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.hooks.append(("start", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.hooks.append(("end", trainer.current_epoch, trainer.global_step))

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.hooks.append(("validation", trainer.current_epoch, trainer.global_step))


class Run(NamedTuple):
    losses: dict[int, str]
    images: dict[int, list[int]]
    hooks: list[tuple[str, int, int]]
    end: dict[str, Any]
    rows: list[dict[str, str]]


def fit(
    folder: Path,
    ckpt_path: Path | None = None,
    data: ContrastiveDataModule | None = None,
    batch_norm: bool = True,
    **options: Any,
) -> Run:
    """Three epochs of four batches, a checkpoint after every step, all monitors that have a schedule."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    events, probe = Events(), OnlineLinearProbe()
    callbacks = [
        *([EvaluationPace()] if options.get("check_val_every_n_epoch", 2) == 2 else []),
        *(probe, KNNMonitor(), CollapseMonitor(every_n_steps=3), events),
        ExactCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1),
    ]
    defaults = {"max_epochs": 3, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    trainer = tiny_trainer(
        callbacks,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=True,
        **{**defaults, **options},
    )
    model = tiny_model(batch_norm)
    assert isinstance(model.encoder, nn.Sequential)
    if batch_norm:
        model.encoder.append(nn.Dropout(0.2))
    data = data or tiny_data(bank_size=30)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    rows = rows_of(folder) if trainer.is_global_zero else []
    return Run(events.losses, events.images, events.hooks, end_of(trainer, probe), rows)


def end_of(trainer: Trainer, probe: OnlineLinearProbe) -> dict[str, Any]:
    return {
        "weights": trainer.lightning_module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "probe": probe.state_dict(),
        "steps": trainer.global_step,
    }


def rows_of(folder: Path) -> list[dict[str, str]]:
    if not (file := folder / "metrics.csv").is_file():
        return []  # nothing was left to train
    with file.open() as lines:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]


def rest(whole: Run, step: int, done: int) -> Run:
    """What a run did after a step, and after so many batches."""
    return Run(
        {n: loss for n, loss in whole.losses.items() if n >= done},
        {n: images for n, images in whole.images.items() if n >= done},
        [h for h in whole.hooks if h[2] > step or (h[0], h[2]) == ("start", step)],
        whole.end,
        [row for row in whole.rows if int(row["step"]) >= step],
    )


def deviations(whole: Run, resumed: Run, step: int) -> list[str]:
    """Where the resumed run is not what the whole one did after that step."""
    done = len(whole.losses) - len(resumed.losses)
    return differences(rest(whole, step, done)._asdict(), resumed._asdict())


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoints/step={step}.ckpt"


class Transient(ContrastiveDataModule):
    """Workers that end with each epoch."""

    def train_dataloader(self) -> Loader:
        loader = super().train_dataloader()
        options = {"num_workers": 2, "persistent_workers": False}
        return Loader(loader.dataset, loader.first_step, sampler=loader.sampler, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [1, 3, 4, 6, 8, 11, 12]),
        ({"max_epochs": -1, "max_steps": 10}, [2, 4, 8, 10]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 4, 6, 9, 12]),
        ({"check_val_every_n_epoch": 1, "max_epochs": -1, "max_steps": 10}, [3, 4]),
        ({"accumulate_grad_batches": 2}, [1, 2, 3, 4]),
        ({"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": 5}, [1, 2, 3]),
        ({"precision": "bf16-mixed"}, [3, 4]),
    ],
)
def test_a_run_that_is_resumed_anywhere_is_the_uninterrupted_one(
    options: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    whole = fit(tmp_path, **options)
    for step in steps:
        resumed = fit(tmp_path / str(step), checkpoint(tmp_path, step), **options)
        assert deviations(whole, resumed, step) == []


@pytest.mark.parametrize("data", [ContrastiveDataModule, Transient])
def test_workers_start_at_the_step_that_is_resumed(data: type, tmp_path: Path) -> None:
    def of(workers: int) -> ContrastiveDataModule:
        return data(Digits(), global_batch_size=64, bank_size=30, num_workers=workers)  # type: ignore[no-any-return]

    whole = fit(tmp_path)
    for step in (3, 4):
        resumed = fit(tmp_path / str(step), checkpoint(tmp_path, step), of(2))
        assert deviations(whole, resumed, step) == []


def test_a_run_is_resumed_twice_in_a_row_with_the_same_objects(tmp_path: Path) -> None:
    whole, data = fit(tmp_path), tiny_data(bank_size=30)
    fit(tmp_path / "first", checkpoint(tmp_path, 2), data)
    for step in (6, 4):
        again = fit(tmp_path / str(step), checkpoint(tmp_path / "first", step), data)
        assert deviations(whole, again, step) == []
    assert fit(tmp_path / "anew", None, data).losses == whole.losses


def whole_and_resumed(folder: Path, steps: list[int], batch_norm: bool = True) -> list[Run]:
    whole = fit(folder, batch_norm=batch_norm)
    return [whole, *(fit(folder / str(n), checkpoint(folder, n)) for n in steps)]


def test_two_ranks_are_resumed_as_one(tmp_path: Path) -> None:
    steps = [2, 4, 7]
    for rank, (whole, *resumed) in enumerate(on_ranks(2, whole_and_resumed, tmp_path, steps)):
        assert bool(whole.rows) == (rank == 0)
        for step, run in zip(steps, resumed, strict=True):
            assert deviations(whole, run, step) == []


def test_another_number_of_ranks_goes_on_in_the_same_global_order(tmp_path: Path) -> None:
    one = fit(tmp_path / "one", batch_norm=False)
    two = on_ranks(2, whole_and_resumed, tmp_path / "two", [], False)
    a, b = (run for (run,) in two)
    assert {n: a.images[n] + b.images[n] for n in a.images} == one.images
    for step in (3, 4):
        run = fit(tmp_path / f"one/{step}", checkpoint(tmp_path / "two", step), batch_norm=False)
        assert run.images == {n: images for n, images in one.images.items() if n >= step}
        for n, loss in run.losses.items():
            assert float.fromhex(loss) == pytest.approx(float.fromhex(one.losses[n]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "name"), [({"seed": 1}, "'seed': 1"), ({"global_batch_size": 32}, "_size': 32")]
)
def test_the_middle_of_an_epoch_is_not_resumed_in_another_order(
    options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    fit(tmp_path, max_epochs=1)
    with pytest.raises(InputError, match=f"step 3 of epoch 0 of .*for .*{name}.*`data.seed`"):
        fit(tmp_path / "b", checkpoint(tmp_path, 3), tiny_data(bank_size=30, **options))
    fit(tmp_path / "c", checkpoint(tmp_path, 4), tiny_data(bank_size=30, **options))


def test_the_loaders_length_stays_the_whole_epoch_and_its_iterator_starts_late() -> None:
    data = tiny_data(bank_size=30)
    data.setup()
    loader = data.train_dataloader()
    done = 5
    loader.first_step = lambda: done
    batches = iter(loader)
    done = 9  # read from the checkpoint after Lightning made the iterator
    assert len(loader) == len(loader.sampler) == 21  # type: ignore[arg-type]
    assert [batch["index"].tolist() for batch in batches] == [
        draw.positions.tolist() for draw in data.train_dataloader().sampler
    ][9:]


def test_no_checkpoint_falls_between_accumulated_batches(tmp_path: Path) -> None:
    class DueAtTheThirdBatch(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:
                daily._last_time_checked = float("-inf")

        def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
            saved.append(trainer.fit_loop.total_batch_idx + 1)

    saved: list[int] = []
    daily = ExactCheckpoint(tmp_path, train_time_interval=timedelta(days=1))
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    tiny_fit([DueAtTheThirdBatch(), daily], enable_checkpointing=True, **options)
    assert saved == [4, 8]  # and the end


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}])
def test_the_last_step_of_a_run_is_always_saved(end: dict[str, int], tmp_path: Path) -> None:
    rarely = ExactCheckpoint(tmp_path, save_last="link", every_n_train_steps=3)
    tiny_fit([rarely], enable_checkpointing=True, limit_val_batches=0, **end)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == end.get("max_steps", 8)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_run_that_was_moved_goes_on_removing_its_oldest_checkpoints(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int, ckpt_path: Path | None = None) -> list[str]:
        newest = ExactCheckpoint(folder, "{epoch}", monitor="step", mode="max", save_top_k=2)
        options: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": epochs}
        trainer = tiny_trainer([newest], enable_checkpointing=True, **options)
        trainer.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=ckpt_path, weights_only=True)
        return sorted(file.name for file in folder.iterdir())

    assert train(tmp_path / "old", 2) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    new = (tmp_path / "old").rename(tmp_path / "new")
    assert train(new, 3, new / "epoch=1.ckpt") == ["epoch=1.ckpt", "epoch=2.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_the_link_to_the_last_checkpoint_stays_one_file(tmp_path: Path) -> None:
    def train(epochs: int, ckpt_path: Path | None = None) -> None:
        last = ExactCheckpoint(tmp_path, save_last="link", save_top_k=-1)
        options: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": epochs}
        trainer = tiny_trainer([last], enable_checkpointing=True, **options)
        trainer.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=ckpt_path, weights_only=True)

    train(1)
    train(2, tmp_path / "epoch=0-step=4.ckpt")
    names = ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert (tmp_path / "last.ckpt").resolve().name == "epoch=1-step=8.ckpt"
