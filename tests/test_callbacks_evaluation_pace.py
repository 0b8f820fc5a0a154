"""The pace of evaluation: within its share of the work, and always after the last step."""

import math
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from tiny import tiny_data, tiny_model, tiny_trainer

from simclr_pl.callbacks import EvaluationPace, evaluation_pace
from simclr_pl.callbacks.evaluation_pace import epochs_between


class Evaluated(Callback):
    """Writes down after which steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def evaluated_after(ckpt_path: Any = None, **options: Any) -> list[int]:
    """Three batches of 64 to an epoch."""
    evaluated = Evaluated()
    options = {"limit_train_batches": 3, "num_sanity_val_steps": 0, **options}
    trainer = tiny_trainer([evaluated, EvaluationPace()], check_val_every_n_epoch=2, **options)
    trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=10), ckpt_path=ckpt_path)
    return evaluated.steps


@pytest.fixture
def every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_pace, "epochs_between", lambda *_: 2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 4}, [6, 12]),
        ({"max_epochs": 5}, [6, 12, 15]),
        ({"max_epochs": 1}, [3]),
        ({"max_epochs": -1, "max_steps": 8}, [6, 8]),  # the last epoch is cut short
        ({"max_epochs": 9, "max_steps": 2}, [2]),
        ({"max_epochs": -1, "max_steps": 6}, [6]),
        ({"max_epochs": 5, "accumulate_grad_batches": 2}, [4, 8, 10]),  # two steps to an epoch
        ({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, [4, 5]),
    ],
)
def test_every_second_epoch_and_the_last_step_are_evaluated(
    options: dict[str, int], steps: list[int], every_second: None
) -> None:
    assert evaluated_after(**options) == steps


def test_the_computed_pace_is_that_of_the_sets_and_the_batches() -> None:
    # 10 of the bank and 450 queries; 3 * 2 * 192 forward passes of training an epoch
    every = math.ceil(460 / (6 * 192) / 0.01)
    assert every == 40
    assert evaluated_after(max_epochs=41) == [120, 123]


def test_nothing_is_evaluated_without_validation(every_second: None) -> None:
    assert evaluated_after(max_epochs=2, limit_val_batches=0) == []


@pytest.mark.parametrize(
    ("evaluated", "trained", "views", "epochs"),
    [(60_000, 50_000, 2, 20), (60_000, 50_000, 4, 10), (100_000, 1_281_167, 2, 2), (1, 50, 2, 1)],
)
def test_evaluation_keeps_within_its_share(
    evaluated: int, trained: int, views: int, epochs: int
) -> None:
    assert epochs_between(evaluated, trained, views) == epochs
    share = evaluated / (epochs * 3 * views * trained)
    assert share <= 0.01
    assert epochs == 1 or evaluated / ((epochs - 1) * 3 * views * trained) > 0.01


def test_a_resumed_run_is_evaluated_after_the_same_steps(tmp_path: Any, every_second: None) -> None:
    whole = evaluated_after(max_epochs=5)

    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer = tiny_trainer([Saves()], max_epochs=3, limit_train_batches=3)
    trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=10))
    resumed = evaluated_after(tmp_path / "a.ckpt", max_epochs=5)
    assert [step for step in whole if step > 9] == resumed


def test_early_stopping_looks_after_evaluations_only() -> None:
    looks = []

    class Stops(EarlyStopping):
        def _run_early_stopping_check(self, trainer: Any) -> None:
            looks.append(trainer.global_step)

    evaluated = Evaluated()
    trainer = tiny_trainer(
        [Stops("none", strict=False), EvaluationPace(), evaluated],
        check_val_every_n_epoch=2,  # as the command line sets it
        limit_train_batches=3,
        max_epochs=3,
        num_sanity_val_steps=0,
    )
    trainer.fit(tiny_model(), datamodule=tiny_data(bank_size=10))
    assert looks == evaluated.steps == [9]
