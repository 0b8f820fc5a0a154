"""What the readers of foreign checkpoints give `simclr import`, and how an encoder takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from simclr_pl.errors import InputError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class Imported:
    """An encoder's recipe and weights.

    Attributes:
        layout: what the checkpoint was taken for.
        class_path: of the encoder.
        init_args: of the encoder.
        weights: the encoder's tensors, without counters of batches.
        normalisation: mean and standard deviation of the pixels that the weights expect.
        left_out: names of the checkpoint that the encoder has no place for.
        step: optimiser steps of the training; 0 where the checkpoint does not say.
        remark: what the user should know; empty for nothing.
    """

    layout: str
    class_path: str
    init_args: dict[str, Any]
    weights: Mapping[str, Tensor]
    normalisation: Normalisation
    left_out: list[str] = field(default_factory=list)
    step: int = 0
    remark: str = ""

    def build(self, source: str) -> nn.Module:
        """The encoder with its weights: every tensor filled, every weight used.

        Args:
            source: the checkpoint, for the message.

        Raises:
            InputError: the checkpoint has a tensor too few or too many, or one of another shape.
        """
        module, _, name = self.class_path.rpartition(".")
        with torch.device("meta"):  # random numbers for what is then overwritten take seconds
            encoder: nn.Module = getattr(import_module(module), name)(**self.init_args)
        encoder.to_empty(device="cpu")
        fill(getattr(encoder, "model", encoder), self.weights, source)
        return encoder


def fill(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model.

    Args:
        model: takes them.
        weights: by the model's own names; counters of batches may be missing, and are then 0.
        source: the checkpoint, for the message.

    Raises:
        InputError: there is a tensor too few or too many, or one of another shape.
    """
    expected = model.state_dict()
    missing = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    surplus = [k for k in weights if k not in expected]
    wrong = [k for k in weights if k in expected and weights[k].shape != expected[k].shape]
    if missing or surplus or wrong:
        faults = [f"{_some(names)} {what}" for names, what in _faults(missing, surplus, wrong)]
        raise InputError(
            f"a checkpoint must fill its encoder, tensor by tensor; got {source!r} with "
            f"{'; '.join(faults)}. This architecture is not supported."
        )
    for name, value in expected.items():  # of the model's own memory
        value.copy_(weights[name]) if name in weights else value.zero_()


def _faults(*names: list[str]) -> list[tuple[list[str], str]]:
    words = ("missing", "without a place", "of another shape")
    return [(some, word) for some, word in zip(names, words, strict=True) if some]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
