"""The model of a checkpoint, built anew from the recipe that `simclr fit` leaves in it."""

import copy
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer

from simclr_pl.checkpoint_io import SafeCheckpointIO
from simclr_pl.errors import InputError
from simclr_pl.simclr import SimCLR


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's file, without running anything that it holds.

    Raises:
        InputError: it is no checkpoint of a LightningModule.
    """
    content = SafeCheckpointIO().load_checkpoint(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(
            f"a checkpoint must be one that `simclr fit` wrote; got {str(path)!r} without weights of "
            "a LightningModule. Give another file."
        )
    return content


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, which has a config.yaml; None if there is none."""
    folders = (checkpoint.absolute().parent.parent, checkpoint.absolute().parent)
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def recipe_of(
    path: Path, parameters: dict[str, Any], config: dict[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `SimCLR` as plain values, class paths included.

    Args:
        path: of the checkpoint, for the message.
        parameters: its hyper-parameters.
        config: the run's config.yaml, which steps in where these say nothing of the encoder.

    Raises:
        InputError: neither does.
    """
    if "encoder" not in parameters:
        parameters = (config or {}).get("model", {})
    if "encoder" not in parameters:
        raise InputError(
            "a checkpoint must say how its model is built, as those of `simclr fit` do; got "
            f"{str(path)!r}, written from Python. Put a config.yaml with its `model`, as `simclr fit` "
            "takes it, beside it."
        )
    recipe = copy.deepcopy({k: v for k, v in parameters.items() if not k.startswith("_")})
    options = recipe["encoder"].get("init_args", {}) if isinstance(recipe["encoder"], dict) else {}
    if "pretrained" in options:
        options["pretrained"] = False  # the weights come from the checkpoint: nothing to download
    return recipe


def build_model(path: Path, recipe: dict[str, Any]) -> SimCLR:
    """The model of a recipe, at initialisation.

    Args:
        path: of the checkpoint, for the message.
        recipe: from `recipe_of`.

    Raises:
        InputError: its classes cannot be imported, do not take its arguments, or are no parts of a model.
    """
    _refuse_foreign(path, recipe)  # before parsing, which imports what is named
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SimCLR, "model", fail_untyped=False)
    try:
        config = parser.parse_object({"model": recipe})
        _refuse_foreign(path, config.as_dict())  # parsing makes mappings of strings that spell them
        module: SimCLR = parser.instantiate(config).model
    except InputError:
        raise
    except Exception as error:  # what jsonargparse or the classes of the recipe raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"the model of {str(path)!r} must be one that can be built here; got: {lines[-1]}. "
            "Install or put on PYTHONPATH what its run imported."
        ) from error
    module.encoder.num_features = module.num_features  # type: ignore[assignment]
    return module


def _refuse_foreign(path: Path, recipe: dict[str, Any]) -> None:
    """Lets only parts of models through: jsonargparse would call any function that a recipe names.

    Raises:
        InputError: it names another class, or a function that is not said to return such a part.
    """
    for name in _strings(recipe):
        named = _named_by(name)
        if callable(named) and not _makes_part(named):
            raise InputError(
                f"a checkpoint's recipe must name modules and optimisers alone; got {name!r} in "
                f"{str(path)!r}. Do not trust this file."
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _named_by(name: str) -> Any:
    """The object of a dotted name, as jsonargparse would find it; None for other words."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name) or find_spec(name.split(".")[0]) is None:
        return None
    words = name.split(".")
    for n in range(len(words) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(words[:n]))
        except ImportError:
            continue
        for word in words[n:]:
            found = getattr(found, word, None)
        return found
    return None


def _makes_part(named: Any) -> bool:
    if not isinstance(named, type):
        try:
            named = get_type_hints(named).get("return")
        except (TypeError, NameError):
            return False
    return inspect.isclass(named) and issubclass(named, (nn.Module, Optimizer))
