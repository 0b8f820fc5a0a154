"""The loading monitor: the share of time spent waiting, and what could not be read, on all ranks."""

import logging
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from ranks import on_ranks
from tiny import tiny_data, tiny_model, tiny_trainer, weights
from torch.utils.data import Dataset

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import digits
from simclr_pl.callbacks import LoadingMonitor
from simclr_pl.data import DatasetSource, ImageFolder


class Slow(Dataset):
    """Grey images that take a time of their own."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> np.ndarray:
        time.sleep(self.seconds)
        return np.full((32, 32), i, np.uint8)


class Busy(Callback):
    """Makes every step last longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class Shares(Callback):
    """Writes down what was logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if "data/wait" in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics["data/wait"]))


def fit(image_seconds: float, step_seconds: float, steps: int, **options: Any) -> list[float]:
    data = ContrastiveDataModule(
        DatasetSource(Slow(image_seconds), channels=1),
        4,
        augment=digits(),
        num_workers=0,
        resident="none",
    )
    shares = Shares()
    trainer = tiny_trainer(
        [Busy(step_seconds), LoadingMonitor(**options), shares],
        max_steps=steps,
        max_epochs=-1,
        limit_train_batches=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(tiny_model(), datamodule=data)
    return shares.values


def test_the_share_is_that_of_the_time_in_the_loader() -> None:
    loading = fit(0.02, 0.02, 12)[-1]  # 80 ms of loading, 20 ms and a small step
    computing = fit(0.002, 0.072, 12)[-1]  # 8 ms of loading, 72 ms and a small step
    assert 0.5 < loading < 0.85
    assert 0.02 < computing < 0.2


@pytest.fixture
def messages() -> Any:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("simclr_pl.callbacks.loading")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_waiting_is_warned_of_once_with_what_to_do(messages: list[str]) -> None:
    fit(0.002, 0.0, 120)
    (message,) = messages
    assert "of the last 50 steps' time" in message
    for remedy in ("simclr data pack", "data.num_workers`, now 0", "data.resident"):
        assert remedy in message


def test_no_warning_below_the_bound(messages: list[str]) -> None:
    fit(0.0005, 0.02, 80)
    assert messages == []


def test_a_bound_outside_0_to_1_raises_input_error() -> None:
    with pytest.raises(InputError, match=r"within \[0, 1\]; got 1.5. Set `loading.warn_above`"):
        LoadingMonitor(1.5)


def test_the_monitor_leaves_the_weights_bit_identical() -> None:
    models = []
    for callbacks in ([], [LoadingMonitor()]):
        trainer = tiny_trainer(callbacks)
        trainer.fit(tiny_model(), datamodule=tiny_data())
        models.append(weights(trainer.lightning_module))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[str, list[str]]:
    """40 grey images of unequal size, four of them empty files."""
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (32 + i % 3, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    bad = [tmp_path / f"{i:02}.png" for i in (3, 9, 21, 34)]
    for path in bad:
        path.write_bytes(b"")
    return str(tmp_path), sorted(map(str, bad))


def fit_damaged(root: str, folder: str) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("simclr_pl").addHandler(handler)
    data = ContrastiveDataModule(
        ImageFolder(root, grey=True),
        8,
        augment=digits(),
        num_workers=0,
        max_bad_fraction=0.5,
    )
    world_size = torch.distributed.get_world_size()
    trainer = tiny_trainer(
        [LoadingMonitor()],
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=3,
        limit_train_batches=1.0,
        num_sanity_val_steps=0,
        logger=CSVLogger(folder, name="run"),
    )
    trainer.fit(tiny_model(), datamodule=data)
    return float(trainer.callback_metrics["data/unreadable"]), data.unreadable, logged


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_any_rank_could_not_read_is_counted_and_listed_on_all(
    damaged: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory, world_size: int
) -> None:
    root, bad = damaged
    folder = tmp_path_factory.mktemp("runs")
    ranks = on_ranks(world_size, fit_damaged, root, str(folder))
    for count, unreadable, _ in ranks:
        assert count == 4.0
        assert sorted(unreadable) == bad
    lines = (folder / "run" / "version_0" / "unreadable.tsv").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [[name, "the file is empty"] for name in bad]
    reported = [m.split("'")[1] for *_, logged in ranks for m in logged]
    assert set(reported) == set(bad)
    assert len(reported) <= len(bad) * world_size  # in three epochs
