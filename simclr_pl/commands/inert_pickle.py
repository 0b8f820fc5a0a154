"""Checkpoints of torch whose pickles hold more than tensors, read without running what they name.

`torch.load(weights_only=True)` refuses the configurations and callbacks that Lightning and solo-learn
put beside the weights. Here tensors are built, by torch's own functions, and any other class is replaced
by one that takes everything and does nothing.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from simclr_pl.errors import InputError

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def load_untrusted(path: Path) -> tuple[Any, set[str]]:
    """The content of a file of `torch.save`, on the CPU, and the names of what was not built.

    Args:
        path: of the file, which nobody need trust.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return torch.load(path, "cpu", weights_only=True), set()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except Exception as error:  # damage, and what is no tensor, show in many ways
        if not _is_saved_zip(path):
            reason = (
                "it is damaged, of another kind, or in the older format with more than tensors."
            )
            raise _unreadable(path, reason) from error
    skipped: set[str] = set()
    try:
        return torch.load(path, "cpu", _pickle(skipped), weights_only=False), skipped
    except Exception as error:
        raise _unreadable(
            path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"a checkpoint must be a whole file of torch.save; got {str(path)!r}: {reason} Where it was "
        "written, save its state dict alone: torch.save(model.state_dict(), 'weights.pt')."
    )


def _is_saved_zip(path: Path) -> bool:
    """Whether it is `torch.save`'s zip; the older format and TorchScript have readers that run more."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return not any(name.endswith("/constants.pkl") for name in archive.namelist())


def _pickle(skipped: set[str]) -> ModuleType:
    """A module with the one class of `pickle` that torch takes from it."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _ALLOWED:
                return _ALLOWED[module, name]
            skipped.add(f"{module}.{name}")
            return type(name, (_Inert,), {})

    module = ModuleType("inert_pickle")
    module.Unpickler = Unpickler  # type: ignore[attr-defined]
    return module


class _Inert:
    """Stands for an object of any class: every way in which a pickle fills one is a way to do nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...
