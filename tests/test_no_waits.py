"""A training step with all monitors and the bar never waits for its device, logging steps included.

The command line trains on the CPU, which takes a GPU's ways here and counts as the device. A wait is a
number that is asked for, a copy to the host, an operation whose result's size depends on numbers, or one
that brings a number from the host.
"""

import csv
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_pl.augment import Augment
from simclr_pl.callbacks import delayed, finite_guard
from simclr_pl.data import image_stage
from simclr_pl.training_cli import SimCLRCLI

CALLS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "new_tensor"}
CALLS |= {"__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"}
OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_")
LOOP = "training_epoch_loop.py"
TRAIN = ["fit", "--data.source", "simclr_pl.data.Digits", "--data.global_batch_size", "32"]
TRAIN += ["--model.encoder", "simclr_pl.ConvEncoder", "--model.encoder.width", "4"]
TRAIN += ["--model.encoder.in_channels", "1", "--data.bank_size", "64"]
TRAIN += ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "6"]
TRAIN += ["--trainer.limit_val_batches", "1", "--trainer.devices", "1"]
TRAIN += ["--trainer.log_every_n_steps", "2", "--throughput.every_n_steps", "2"]
TRAIN += ["--summary.baselines", "false"]


class Waits:
    """Those within training steps: the step's number, what, and from where."""

    def __init__(self) -> None:
        self.step = 0
        self.found: list[tuple[int, str, str]] = []

    def add(self, what: str) -> None:
        stack = traceback.extract_stack()
        places = [(Path(frame.filename).name, frame.name) for frame in stack]
        if not {(LOOP, "advance"), (LOOP, "on_advance_end")} & set(places):
            return
        host = {"fetchers.py", "evaluation_loop.py"}  # a loader's tensors are the host's anywhere
        if host & {file for file, _ in places} or ("delayed.py", "read") in places:
            return  # or what was queued for the host four steps before
        where = [
            f"{name}, line {frame.lineno}" for (name, _), frame in zip(places, stack, strict=True)
        ]
        self.found.append((self.step, what, " < ".join(where[-3:-12:-1])))


class Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        brings = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if brings or getattr(func, "__name__", "") in CALLS:
            self.waits.add(func.__name__)
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        indices = args[1] if name.startswith("index.") else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if by_mask or name.startswith(OPERATIONS):
            self.waits.add(name)
        return func(*args, **(kwargs or {}))


class Steps(Callback):
    """Watches the training; logs as a user does, and asks the device once, which is to be found."""

    def __init__(self) -> None:
        self.waits, self.watch = Waits(), ExitStack()
        self.shown: list[dict[str, Any]] = []  # on the bar, before each step
        self.means: list[Tensor] = []

    def on_train_start(self, *_: Any) -> None:
        self.watch.enter_context(Calls(self.waits))
        self.watch.enter_context(Operations(self.waits))

    def on_train_end(self, *_: Any) -> None:
        self.watch.close()

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.waits.step = trainer.global_step + 1
        self.shown.append(dict(trainer.progress_bar_metrics))
        module.log("user/number", 0.5)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.means.append(outputs["features"].mean())
        module.log("user/mean", self.means[-1], prog_bar=True)
        if self.waits.step == 7:
            float(outputs["loss"])


class Errors(Callback):
    """A GPU that is waited for within a step, after the first, is an error."""

    steps = 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step else "default")

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def on_validation_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    on_train_epoch_end = on_validation_start


def fit(folder: Path, accelerator: str, callback: Callback) -> None:
    class WithOneMore(SimCLRCLI):
        def instantiate_trainer(self, **options: Any) -> Trainer:
            trainer = super().instantiate_trainer(**options)
            trainer.callbacks.insert(1, callback)  # type: ignore[attr-defined]
            return trainer

    place = ["--trainer.accelerator", accelerator, "--trainer.default_root_dir", str(folder)]
    WithOneMore([*TRAIN, *place])


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # the bar is drawn
        patch.setattr(delayed, "_LAG", {})
        patch.setattr(finite_guard, "_FREE", ())
        patch.setattr(image_stage, "is_small", lambda _: False)
        patch.setattr(Augment, "apply", Augment.apply_batched)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, list[dict[str, str]]]:
    folder, steps = tmp_path_factory.mktemp("runs"), Steps()
    with as_on_a_gpu(), steps.watch:  # closed also where the run fails
        fit(folder, "cpu", steps)
    with open(folder / "simclr/version_0/metrics.csv") as file:
        return steps, list(csv.DictReader(file))


def test_no_step_waits_but_the_first_and_the_one_that_a_user_makes_wait(run: Any) -> None:
    later = [wait for wait in run[0].waits.found if wait[0] > 1]
    assert [(step, what) for step, what, _ in later] == [
        (7, "__float__"),
        (7, "_local_scalar_dense.default"),
    ]
    assert later[0][2].startswith("test_no_waits.py")


def test_every_logging_step_has_its_row(run: Any) -> None:
    rows = [row for row in run[1] if row["user/mean"]]
    assert [row["step"] for row in rows] == ["1", "3", "5", "7", "9", "11"]
    assert [row["epoch"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert {row["user/number"] for row in rows} == {"0.5"}
    assert all(float(row["train/loss"]) > 0 for row in rows)
    measured = [row["step"] for row in run[1] if row["throughput/step_ms"]]
    assert measured == [row["step"] for row in rows]


def test_the_bar_shows_numbers_of_a_few_steps_before(run: Any) -> None:
    last, means = run[0].shown[-1], [float(mean) for mean in run[0].means]
    assert {type(value) for value in last.values()} == {float}
    assert {"train/loss", "user/mean", "probe/train_top1"} <= last.keys()
    assert last["user/mean"] in means[4:7]  # of the seventh step at the latest, before the twelfth


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that may not be waited for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_gpu_is_not_waited_for(tmp_path: Path) -> None:
    errors = Errors()
    try:
        fit(tmp_path, "gpu", errors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert errors.steps == 12
