"""The clock: every part gets its own time, however far the device is behind."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from tiny import tiny_fit, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simclr_pl import RunSummary
from simclr_pl.callbacks import ThroughputMonitor
from simclr_pl.callbacks.step_clock import NOTHING, Reading, StepClock, peak_memory_mib


class Time:
    """Passes when something below says so, and never else."""

    now = 0.0


def takes(milliseconds: float) -> None:
    Time.now += milliseconds


class Stamp:
    def __init__(self) -> None:
        self.at = Time.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Stamp") -> float:
        return end.at - self.at


class Items(Dataset):
    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        takes(self.milliseconds)
        return torch.ones(2)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Items(1), batch_size=2)  # 2 ms, 3 batches

    def val_dataloader(self) -> Any:
        return DataLoader(Items(100), batch_size=2)

    def transfer_batch_to_device(self, batch: Tensor, *_: Any) -> Tensor:
        takes(3)
        return batch

    def on_after_batch_transfer(self, batch: Tensor, *_: Any) -> Tensor:
        takes(5)
        return batch


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, *_: Any) -> Tensor:
        takes(7)
        return self.linear(batch).sum()

    def validation_step(self, batch: Tensor, *_: Any) -> None:
        takes(11)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Watches(Callback):
    def on_train_start(self, *_: Any) -> None:
        takes(10_000)  # before the first epoch, which is not counted

    def on_train_batch_start(self, *_: Any) -> None:
        takes(13)

    def on_after_backward(self, *_: Any) -> None:
        takes(17)  # within the step

    def on_validation_batch_end(self, *_: Any) -> None:
        takes(19)

    def on_train_epoch_end(self, *_: Any) -> None:
        takes(23)

    def on_train_end(self, *_: Any) -> None:
        takes(10_000)


class Saves(Checkpoint):
    def on_train_batch_end(self, *_: Any) -> None:
        takes(29)

    def on_validation_end(self, *_: Any) -> None:
        takes(31)


def clocked_fit(stamp: Any = Stamp, callbacks: Any = (), **options: Any) -> StepClock:
    """Two epochs of three batches, each evaluated on three, after a check of the evaluation."""
    trainer = tiny_trainer([Watches(), Saves(), *callbacks], enable_checkpointing=True, **options)
    clock = StepClock(trainer, trainer.profiler, stamp)
    trainer.profiler = clock
    trainer.fit(Model(), datamodule=Data())
    return clock


EXPECTED = {
    "start": 2 * 2,  # of each epoch's first batch
    "wait": 4 * 2,
    "transfer": 6 * 3,
    "augment": 6 * 5,
    "compute": 6 * 7,
    "monitors": 6 * (13 + 17) + 6 * 19 + 2 * 23,
    "evaluation": 6 * (200 + 3 + 5 + 11),
    "other": 6 * 29 + 2 * 31,
}


def test_every_part_gets_exactly_its_own_time() -> None:
    reading = clocked_fit().read()
    milliseconds = {part: 1000 * seconds for part, seconds in reading.seconds.items()}
    assert milliseconds == pytest.approx(EXPECTED)
    assert reading.batches == 6


def test_shares_add_to_1_and_join_the_parts() -> None:
    reading, whole = clocked_fit().read(), sum(EXPECTED.values())
    shares = reading.shares()
    assert shares == pytest.approx(
        {
            "data": (4 + 8 + 18) / whole,
            "augment": 30 / whole,
            "compute": 42 / whole,
            "monitors": (EXPECTED["monitors"] + EXPECTED["evaluation"]) / whole,
            "other": EXPECTED["other"] / whole,
        }
    )
    assert sum(shares.values()) == pytest.approx(1)
    assert 1000 * reading.training == pytest.approx(whole - EXPECTED["evaluation"])


class LateStamp(Stamp):
    """A device that reaches its stamps only when it is let, or waited for."""

    reached = 0
    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.number = self.made

    def query(self) -> bool:
        return self.number <= self.reached

    def synchronize(self) -> None:
        type(self).reached = self.number


class ReadsAlong(Callback):
    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.readings.append(trainer.profiler.read())
        LateStamp.reached = LateStamp.made - 10  # a little behind


def test_a_device_that_is_behind_is_not_waited_for_until_the_end() -> None:
    along = ReadsAlong()
    last = clocked_fit(LateStamp, [along]).read()
    assert along.readings[0] == NOTHING
    batches = [reading.batches for reading in along.readings]
    assert batches == sorted(batches)
    assert batches[2] < 3
    assert last.batches == 6
    assert {p: 1000 * s for p, s in last.seconds.items()} == pytest.approx(EXPECTED)


def test_readings_add_and_subtract() -> None:
    a = Reading({**NOTHING.seconds, "wait": 2.0}, 3)
    b = Reading({**NOTHING.seconds, "wait": 5.0, "compute": 1.0}, 7)
    assert b.since(a) == Reading({**NOTHING.seconds, "wait": 3.0, "compute": 1.0}, 4)
    assert b.since(a).after(a) == b
    assert sum(NOTHING.shares().values()) == 0


def test_the_users_profiler_hears_everything_and_is_given_back() -> None:
    alone, under = SimpleProfiler(), SimpleProfiler()
    trainers = [
        tiny_fit([], profiler=alone),
        tiny_fit([ThroughputMonitor(every_n_steps=1), RunSummary(baselines=False)], profiler=under),
    ]
    assert trainers[1].profiler is under
    for action in ("run_training_epoch", "run_training_batch"):
        heard = [len(profiler.recorded_durations[action]) for profiler in (alone, under)]
        assert heard == [heard[0]] * 2
        assert heard[0] > 0


def test_monitor_and_summary_share_one_clock() -> None:
    class Looks(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.clock = trainer.profiler

    looks = Looks()
    trainer = tiny_fit([ThroughputMonitor(every_n_steps=1), RunSummary(baselines=False), looks])
    assert isinstance(looks.clock, StepClock)
    assert isinstance(looks.clock.inner, PassThroughProfiler)
    assert isinstance(trainer.profiler, PassThroughProfiler)


def test_a_fit_after_one_that_was_broken_off_has_a_clock_of_its_own() -> None:
    trainer = tiny_trainer([])
    first = StepClock.of(trainer)
    assert StepClock.of(trainer) is first
    first.start("run_training_epoch")
    second = StepClock.of(trainer)
    assert second is not first
    assert isinstance(second.inner, PassThroughProfiler)


def test_peak_memory_holds_what_was_allocated() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    block = torch.ones(300 * 2**18)  # 300 MiB, written
    after = peak_memory_mib(torch.device("cpu"))
    assert block[-1] == 1
    assert after >= max(before, 300)
