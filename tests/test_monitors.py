"""All monitors together, as the command line has them: never felt, and resumed as if uninterrupted."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks
from tiny import differences, tiny_data, tiny_model, tiny_trainer, weights
from torch import Tensor, nn

from simclr_pl.training_cli import _MONITORS

OFTEN: dict[str, dict[str, Any]] = {"collapse": {"every_n_steps": 3}}


class Randomness(Callback):
    """Keeps torch's random state at points that every run passes."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.states.append(torch.get_rng_state())

    on_train_batch_end = on_train_epoch_end = on_validation_end = on_train_batch_start


def monitors() -> list[Callback]:
    return [
        cls(**{**options, **OFTEN.get(key, {}), **keep_all(cls)})
        for key, (cls, options, _) in _MONITORS.items()
    ]


def keep_all(cls: type[Callback]) -> dict[str, Any]:
    return {"save_top_k": -1} if issubclass(cls, ModelCheckpoint) else {}


def fit(
    folder: Path, callbacks: list[Callback], ckpt_path: Path | None = None, **options: Any
) -> Trainer:
    """Four batches to an epoch, evaluated every second one; dropout shows any random number drawn."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = tiny_trainer(
        callbacks,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        logger=CSVLogger(folder, name="run", version=0),
        **options,
    )
    model = tiny_model()
    assert isinstance(model.encoder, nn.Sequential)
    model.encoder.append(nn.Dropout(0.2))
    trainer.fit(model, datamodule=tiny_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def with_and_without(folder: Path, precision: str = "32-true") -> list[tuple[Any, Any, Any]]:
    found = []
    for name, callbacks in (("with", monitors()), ("without", [])):
        randomness = Randomness()
        trainer = fit(folder / name, [*callbacks, randomness], precision=precision)
        optimizer = trainer.optimizers[0].state_dict()
        found.append((weights(trainer.lightning_module), optimizer, randomness.states))
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_and_randomness_are_bit_identical_with_all_monitors_and_with_none(
    precision: str, tmp_path: Path
) -> None:
    watched, unwatched = with_and_without(tmp_path, precision)
    assert differences(watched, unwatched) == []


def test_weights_and_randomness_are_bit_identical_on_two_ranks(tmp_path: Path) -> None:
    for watched, unwatched in on_ranks(2, with_and_without, tmp_path):
        assert differences(watched, unwatched) == []


def states(trainer: Trainer) -> dict[str, Any]:
    """Of the monitors; what is timed, and where checkpoints lie, is of each run its own."""
    own = {"time", "peak_mib"}
    return {
        c.state_key: {k: v for k, v in c.state_dict().items() if k not in own}
        for c in trainer.callbacks  # type: ignore[attr-defined]
        if not isinstance(c, ModelCheckpoint)
    }


def logged(folder: Path, after_step: int) -> list[dict[str, str]]:
    with open(folder / "run/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if v and not k.startswith("throughput/")}
        for row in rows
        if int(row["step"]) >= after_step
    ]


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")  # the resumed run has its own folder
@pytest.mark.parametrize("epoch", [1, 2])  # after an evaluation, and between two of them
def test_a_resumed_run_goes_on_as_if_uninterrupted(epoch: int, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", monitors(), max_epochs=4)
    step = 4 * (epoch + 1)
    checkpoint = tmp_path / f"whole/run/version_0/checkpoints/epoch={epoch}-step={step}.ckpt"
    resumed = fit(tmp_path / "resumed", monitors(), checkpoint, max_epochs=4)
    assert differences(weights(whole.lightning_module), weights(resumed.lightning_module)) == []
    optimizers = [trainer.optimizers[0].state_dict() for trainer in (whole, resumed)]
    assert differences(*optimizers) == []
    assert differences(states(whole), states(resumed)) == []
    rows = [logged(tmp_path / name, step) for name in ("whole", "resumed")]
    assert len(rows[0]) > 4 * (3 - epoch)
    assert rows[0] == rows[1]
    assert {"knn/top1", "probe/top1", "train/loss"} <= {key for row in rows[1] for key in row}
