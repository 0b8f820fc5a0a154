"""The file of an encoder: safetensors, with the recipe of its architecture in the metadata.

`simclr export` and `simclr import` write it, and every command takes it as RUN. The tensors are those of
``encoder.model`` for an `Encoder`, which are under the names of timm or torchvision, and those of the
encoder itself for other classes. The metadata's entry ``simclr_pl`` is a JSON object:

    {"encoder": {"class_path": "simclr_pl.models.Encoder", "init_args": {"name": "resnet50"}},
     "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, "source": "...", "step": 1000}
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError
from simclr_pl.models import Encoder, feature_width

KEY = "simclr_pl"
_PLAIN = (str, int, float, bool, type(None))


@dataclass
class EncoderFile:
    """What an encoder's file holds.

    Attributes:
        encoder: with its weights; it has an integer ``num_features``.
        build: makes the same architecture anew, randomly initialised.
        normalisation: mean and standard deviation of each channel of pixels in [0, 1]; None where the
            file does not say.
        source: where the weights come from.
        step: optimiser steps that they were trained for.
        recipe: ``class_path`` and ``init_args`` of the encoder.
        size: side of a view in pixels that they were trained on; None where the file does not say.
    """

    encoder: nn.Module
    build: Callable[[], nn.Module]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
    source: str
    step: int
    recipe: dict[str, Any]
    size: int | None


def named_part(encoder: nn.Module) -> nn.Module:
    """The module whose tensors have the names that other programs know."""
    return encoder.model if isinstance(encoder, Encoder) else encoder


def write_encoder(file: Path, encoder: nn.Module, about: dict[str, Any]) -> None:
    """Writes an encoder's file; it is read back and compared before it takes its name.

    Args:
        file: replaced if it exists.
        encoder: its weights are written as they are.
        about: ``encoder`` (``class_path`` and ``init_args``), ``normalisation`` (``mean`` and ``std``),
            ``source`` and ``step``, as plain values; ``size`` of a view in pixels may be there.
    """
    temporary = temporary_of(file)
    try:
        save_encoder(temporary, encoder, about)
        publish(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def save_encoder(file: Path, encoder: nn.Module, about: dict[str, Any]) -> None:
    """Writes the file in its place, without the care of `write_encoder`, and compares it."""
    # Clones: tensors that share memory cannot be saved, and layouts other than contiguous are lost
    parts = named_part(encoder).state_dict()
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in parts.items()}
    about_it = {"format": "pt", KEY: json.dumps(about)}
    file.write_bytes(save(weights, about_it))  # `save_file` would hide it from other users
    saved = load_file(file)
    assert saved.keys() == weights.keys()
    assert all(_same(saved[name], value) for name, value in weights.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def read_encoder(file: Path) -> EncoderFile:
    """Reads an encoder's file; its recipe can name encoders of this package alone.

    A file can come from anywhere, and a class path of another package would import that package: only
    classes of ``simclr_pl`` are built, from plain values. A run whose encoder is a class of the user's
    own is given by its folder or checkpoint.

    Raises:
        InputError: the file is damaged, has no recipe or a foreign one, or its tensors do not fit it.
    """
    try:
        with safe_open(file, "pt") as content:
            text = (content.metadata() or {}).get(KEY)
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"an encoder's file must be whole safetensors; got {str(file)!r}: {error}. Export it anew."
        ) from error
    if text is None:
        raise InputError(
            f"an encoder's file must say how it is built, as those of `simclr export` do; got "
            f"{str(file)!r} without `{KEY}` in its metadata. Run `simclr import {file}` first."
        )
    about = _parsed(file, text)
    recipe = about["encoder"]

    def build() -> nn.Module:
        return _build(file, recipe)

    with torch.random.fork_rng(devices=[]):
        encoder = build()
    try:
        named_part(encoder).load_state_dict(weights)
    except RuntimeError as error:
        fault = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"an encoder's file must hold the tensors of its recipe; got {str(file)!r}: {fault} Export "
            "it anew."
        ) from error
    return EncoderFile(
        encoder=encoder,
        build=build,
        normalisation=_normalisation(file, about),
        source=str(about.get("source", "")),
        step=about["step"],
        recipe=recipe,
        size=about.get("size"),
    )


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(text)
        recipe = about["encoder"]
        path, arguments = recipe["class_path"], recipe.get("init_args") or {}
        about["step"] = int(about.get("step", 0))
        size = about.get("size")
        good = isinstance(path, str) and isinstance(arguments, dict)
        good &= size is None or (isinstance(size, int) and size > 1)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise InputError(
            f"the entry `{KEY}` of an encoder's file must be a JSON object with `encoder`, of a "
            f"`class_path` and `init_args`; got {text[:100]!r} in {str(file)!r}. Export it anew."
        )
    return about


def _normalisation(
    file: Path, about: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    given = about.get("normalisation")
    if given is None:
        return None
    try:
        mean, std = (tuple(float(x) for x in given[name]) for name in ("mean", "std"))
        if len(mean) == len(std) > 0 and all(map(math.isfinite, mean + std)) and min(std) > 0:
            return mean, std
    except (TypeError, KeyError, ValueError):
        pass
    raise InputError(
        f"`normalisation` of an encoder's file must be a `mean` and a `std` above 0, one number a "
        f"channel; got {given!r} in {str(file)!r}. Export it anew."
    )


def _build(file: Path, recipe: dict[str, Any]) -> nn.Module:
    path, arguments = recipe["class_path"], dict(recipe.get("init_args") or {})
    module, _, name = path.rpartition(".")
    is_ours = module == "simclr_pl" or (module.startswith("simclr_pl.") and "__" not in module)
    if not is_ours or not all(isinstance(value, _PLAIN) for value in arguments.values()):
        raise InputError(
            f"an encoder's file must name an encoder of simclr_pl and plain values; got {path!r} with "
            f"{arguments!r} in {str(file)!r}. Give the run's folder in its place."
        )
    if "pretrained" in arguments:
        arguments["pretrained"] = False  # the weights are in the file: nothing to download
    try:
        found = getattr(import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise TypeError(f"{path} is no module")
        encoder = found(**arguments)
        encoder.num_features = feature_width(encoder)  # type: ignore[assignment]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"an encoder's file must have a recipe that can be built here; got {path!r} with "
            f"{arguments!r} in {str(file)!r}: {error}. Use the version that wrote it."
        ) from error
    return encoder
