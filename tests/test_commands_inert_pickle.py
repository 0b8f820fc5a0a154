"""A checkpoint with objects of any class gives its tensors, and runs nothing."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_pl.commands.inert_pickle import load_untrusted
from simclr_pl.errors import InputError


class Attack:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


class Configuration(dict):  # type: ignore[type-arg]
    """As OmegaConf's: a class that is not there where the file is read."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.flags = ["a", {"b": 1}]


class Names(list):  # type: ignore[type-arg]
    """Filled by appending."""


def foreign(monkeypatch: pytest.MonkeyPatch, file: Path) -> dict[str, Any]:
    """Writes objects whose module is gone when they are read."""
    module = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    for cls in (Configuration, Names):
        monkeypatch.setattr(cls, "__module__", "elsewhere")
        setattr(module, cls.__name__, cls)
    content = {
        "state_dict": {
            "weight": torch.rand(2, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "half": torch.ones(2, dtype=torch.float16)[1:],
        },
        "hyper_parameters": Configuration(a=Names([1, 2])),
        "callbacks": {Configuration: 1},
    }
    torch.save(content, file)
    monkeypatch.delitem(sys.modules, "elsewhere")
    return content


def test_tensors_are_read_and_other_objects_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = foreign(monkeypatch, Path("a.ckpt"))
    found, skipped = load_untrusted(Path("a.ckpt"))
    assert skipped == {"elsewhere.Configuration", "elsewhere.Names"}
    for name, value in content["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    assert found["state_dict"]["half"].dtype == torch.float16


def test_a_file_with_code_runs_none() -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}, "x": Attack()}, "a.ckpt")
    found, skipped = load_untrusted(Path("a.ckpt"))
    assert not Path("attacked").exists()
    assert skipped == {f"{os.mkdir.__module__}.mkdir"}
    assert torch.equal(found["state_dict"]["weight"], torch.ones(2))
    torch.load("a.ckpt", weights_only=False)
    assert Path("attacked").exists()  # the file does what it should not


def test_plain_files_are_read_by_torch_alone() -> None:
    torch.save({"weight": torch.ones(2)}, "a.pt")
    torch.save({"weight": torch.ones(2)}, "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        found, skipped = load_untrusted(Path(name))
        assert torch.equal(found["weight"], torch.ones(2))
        assert skipped == set()


def test_what_cannot_be_read_safely_is_refused() -> None:
    torch.save({"x": Attack()}, "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"weight": torch.ones(200)}, "cut.ckpt")
    Path("cut.ckpt").write_bytes(Path("cut.ckpt").read_bytes()[:600])
    Path("empty.ckpt").touch()
    for name in ("old.ckpt", "cut.ckpt", "empty.ckpt", "missing.ckpt"):
        with pytest.raises(InputError, match=f"must be a whole file of torch.save; got '{name}'"):
            load_untrusted(Path(name))
    assert not Path("attacked").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torchscript_is_refused() -> None:
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)).save("script.pt")
    with pytest.raises(InputError, match="save its state dict alone"):
        load_untrusted(Path("script.pt"))
