"""The throughput monitor: true times, counts and shares; what could not be read, on all ranks."""

import csv
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
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch.utils.data import Dataset

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import digits
from simclr_pl.callbacks import ThroughputMonitor
from simclr_pl.callbacks.flops import batch_flops
from simclr_pl.callbacks.step_clock import NOTHING, Reading
from simclr_pl.data import DatasetSource, ImageFolder

SHARES = ("data", "augment", "compute", "monitors", "other")


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


def fit(image_seconds: float, callback_seconds: float, steps: int, **options: Any) -> Any:
    """Batches of 4 images, 16 to an epoch; returns what was logged last."""
    data = ContrastiveDataModule(
        DatasetSource(Slow(image_seconds), channels=1),
        4,
        augment=digits(),
        num_workers=0,
        resident="none",
    )
    trainer = tiny_trainer(
        [Busy(callback_seconds), ThroughputMonitor(every_n_steps=1, **options)],
        max_steps=steps,
        max_epochs=-1,
        limit_train_batches=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=steps,
    )
    trainer.fit(tiny_model(), datamodule=data)
    return trainer.callback_metrics


def rows_of(folder: Path, **options: Any) -> list[dict[str, str]]:
    logger = CSVLogger(folder, name="run", version=0)
    tiny_fit([ThroughputMonitor(every_n_steps=1)], logger=logger, **options)
    with open(folder / "run/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row.get("throughput/step_ms")]


def test_the_shares_are_those_of_the_time_spent() -> None:
    loading = fit(0.02, 0.02, 12)  # 80 ms of loading, 20 ms in a callback and a small step
    watching = fit(0.002, 0.072, 12)  # 8 ms and 72 ms
    # Ratios, since the machine may have other work: what each part gets is in test_callbacks_step_clock
    assert loading["throughput/data"] > 1.5 * loading["throughput/monitors"] > 0
    assert watching["throughput/monitors"] > 1.5 * watching["throughput/data"] > 0


def test_what_is_logged_agrees_with_itself(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert len(rows) == 8
    model = tiny_model()
    flops = batch_flops(tiny_trainer([]), model, {"views": torch.rand(128, 1, 32, 32)})
    peaks = set()
    for row in rows:
        values = {k.removeprefix("throughput/"): float(v) for k, v in row.items() if v}
        assert sum(values[name] for name in SHARES) == pytest.approx(1, abs=1e-5)
        assert min(values[name] for name in SHARES) >= 0
        seconds = values["step_ms"] / 1000
        assert values["samples_per_second"] * seconds == pytest.approx(64, rel=1e-4)
        assert values["gflops"] * seconds * 1e9 == pytest.approx(flops, rel=1e-4)
        peaks.add(values["gflops"] / values["flop_utilisation"])
        assert values["peak_memory_mib"] > 50
    assert max(peaks) == pytest.approx(min(peaks), rel=1e-3)  # of the device, once for a run


def test_flops_are_those_of_the_views_of_their_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer = tiny_trainer([ThroughputMonitor(every_n_steps=1)], logger=logger)
    trainer.fit(tiny_model(), datamodule=tiny_data(augment_until={1: digits(16)}))
    with open(tmp_path / "run/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/gflops"]]
    sides = {"0": 16, "1": 32}
    assert [row["epoch"] for row in rows] == ["0"] * 4 + ["1"] * 4
    for row in rows:
        views = torch.rand(128, 1, sides[row["epoch"]], sides[row["epoch"]])
        flops = batch_flops(tiny_trainer([]), tiny_model(), {"views": views})
        seconds = float(row["throughput/step_ms"]) / 1000
        assert float(row["throughput/gflops"]) * seconds * 1e9 == pytest.approx(flops, rel=1e-4)


def images_on_a_rank(folder: Path) -> Any:
    options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 2}
    rows = rows_of(folder, devices=2, strategy="ddp", max_epochs=1, **options)
    return [
        float(r["throughput/samples_per_second"]) * float(r["throughput/step_ms"]) for r in rows
    ]


def test_images_of_all_ranks_are_counted(tmp_path: Path) -> None:
    images, _ = on_ranks(2, images_on_a_rank, tmp_path)
    assert images == pytest.approx([64_000] * 2, rel=1e-4)


@pytest.mark.parametrize(("every", "accumulate", "steps"), [(3, 1, [2, 5]), (2, 2, [1, 3])])
def test_it_logs_once_every_n_steps(
    every: int, accumulate: int, steps: list[int], tmp_path: Path
) -> None:
    options = {"log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    rows = rows_of(tmp_path, limit_val_batches=0, num_sanity_val_steps=0, **options)
    assert [int(row["step"]) for row in rows] == steps


@pytest.fixture
def messages() -> Any:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("simclr_pl.callbacks.throughput")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_waiting_is_warned_of_once_with_what_to_do(messages: list[str]) -> None:
    fit(0.004, 0.0, 120)
    (message,) = messages
    assert "of the last 50 batches' time" in message
    for remedy in ("simclr data pack", "data.num_workers`, now 0", "data.resident"):
        assert remedy in message


def test_no_warning_below_the_bound(messages: list[str]) -> None:
    fit(0.0005, 0.03, 60)
    assert messages == []


@pytest.mark.parametrize(("part", "warns"), [("wait", True), ("start", False), ("transfer", False)])
def test_only_waiting_within_an_epoch_is_a_reason_to_warn(
    part: str, warns: bool, messages: list[str]
) -> None:
    seconds = {**NOTHING.seconds, "compute": 8.0, "evaluation": 90.0, part: 3.0}
    ThroughputMonitor()._watch(tiny_trainer([]), Reading(seconds, 50))
    assert bool(messages) is warns


def test_a_resumed_run_does_not_warn_again(messages: list[str]) -> None:
    options: dict[str, Any] = {"limit_train_batches": 18, "limit_val_batches": 0}
    first = ThroughputMonitor(0.0)
    tiny_fit([first], max_epochs=3, **options)
    assert len(messages) == 1
    resumed = ThroughputMonitor(0.0)
    resumed.load_state_dict(first.state_dict())
    tiny_fit([resumed], max_epochs=3, **options)
    assert len(messages) == 1


def test_it_logs_at_logging_steps_that_are_far_enough_apart(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 20, "log_every_n_steps": 2}
    tiny_fit([ThroughputMonitor(every_n_steps=5)], logger=logger, **options)
    with open(tmp_path / "run/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/data"]]
    assert [int(row["step"]) for row in rows] == [5, 11, 17]  # each value once


def test_a_bound_outside_0_to_1_raises_input_error() -> None:
    with pytest.raises(InputError, match=r"within \[0, 1\]; got 1.5. Set `throughput.warn_above`"):
        ThroughputMonitor(1.5)
    with pytest.raises(InputError, match="`every_n_steps` must be >= 1; got 0"):
        ThroughputMonitor(every_n_steps=0)


def test_the_monitor_leaves_the_weights_bit_identical() -> None:
    models = []
    for callbacks in ([], [ThroughputMonitor(every_n_steps=1)]):
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
        [ThroughputMonitor(every_n_steps=1)],
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
