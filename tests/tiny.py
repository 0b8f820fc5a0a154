"""A small real run on the embedded digits, for the tests of the module and the callbacks."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.optim import SGD

from simclr_pl import ContrastiveDataModule, ConvEncoder, Projector, SimCLR
from simclr_pl.data import Digits


def tiny_model(batch_norm: bool = True, dropout: float = 0.0, **options: Any) -> SimCLR:
    """Initialised by the seed 0; without batch norm for what must be equal at any rank count."""
    seed_everything(0)
    if batch_norm:
        encoder: nn.Module = ConvEncoder(4, in_channels=1)
        projector: Any = partial(Projector, hidden_features=16, out_features=8)
    else:
        encoder = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten()
        )
        encoder.num_features = 800
        projector = partial(Projector, out_features=8, layers=1, last_batch_norm=False)
    options = {"optimizer": partial(SGD, lr=0.05), "lr_scaling": "none", **options}
    return SimCLR(encoder, projector, temperature=0.2, warmup_epochs=0, **options)


def tiny_data(**options: Any) -> ContrastiveDataModule:
    return ContrastiveDataModule(Digits(), **{"global_batch_size": 64, "bank_size": 300, **options})


def tiny_trainer(callbacks: list[Callback], **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "limit_train_batches": 4,
        "num_sanity_val_steps": -1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **options})


def tiny_fit(callbacks: list[Callback], model: SimCLR | None = None, **options: Any) -> Trainer:
    """Trains for 8 steps and returns the trainer; its lightning_module is the model."""
    trainer = tiny_trainer(callbacks, **options)
    trainer.fit(model or tiny_model(), datamodule=tiny_data())
    return trainer


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """The places in which two nested values differ by a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a))} {sorted(map(str, b))}"]
        return [line for k in a for line in differences(a[k], b[k], f"{place}.{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: lengths {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a} {b}"]
