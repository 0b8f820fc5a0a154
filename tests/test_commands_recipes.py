"""What a recipe may name, and what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from simclr_pl.commands.recipes import build_model
from simclr_pl.errors import InputError

SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch executed"}}
SPELLED = '{"cla\\u0073s_path": "os\\u002esystem", "init_args": {"command": "touch executed"}}'
CONV = {"in_channels": 1, "out_channels": 1, "kernel_size": 1}
ENCODER = {"class_path": "simclr_pl.ConvEncoder", "init_args": {"width": 4, "in_channels": 1}}


# jsonargparse warns of some, and will refuse them itself one day
@pytest.mark.filterwarnings("ignore:(?s).*import path denylist.*")
@pytest.mark.parametrize(
    "part",
    [
        {"encoder": SYSTEM},
        {"encoder": ENCODER, "projector": json.dumps(SYSTEM)},
        {"encoder": ENCODER, "projector": SPELLED},
        {"encoder": ENCODER, "optimizer": SPELLED},
        {"encoder": {"class_path": "torch.nn.Conv2d", "init_args": {**CONV, "device": SPELLED}}},
        {"encoder": {"class_path": "torch.nn.Sequential", "dict_kwargs": {"x": SYSTEM}}},
        {"encoder": {"class_path": "torch.hub.os.system", "init_args": {}}},
        {"encoder": {"class_path": "torch.hub.load", "init_args": {}}},
        {"encoder": {"class_path": "subprocess.Popen", "init_args": {"args": "touch executed"}}},
        {"encoder": ENCODER, "projector": "os._exit"},
        {"encoder": ENCODER, "projector": "sys.exit"},
        {"encoder": ENCODER, "projector": "builtins.exit"},
        {"encoder": ENCODER, "loss": "time.sleep"},
        {"encoder": ENCODER, "optimizer": {"class_path": "subprocess.Popen", "init_args": {}}},
        {"encoder": {"class_path": "torch.nn.Conv2d", "init_args": {"padding_mode": "os._exit"}}},
    ],
)
def test_what_is_no_part_of_a_model_is_refused_and_not_called(
    tmp_path: Path, part: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="must name modules and optimisers alone"):
        build_model(tmp_path / "a.ckpt", part)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "part",
    [
        {"encoder": ENCODER, "projector": {"class_path": "simclr_pl.Projector", "init_args": {}}},
        {"encoder": ENCODER, "projector": "torch.nn.Identity"},
        {"encoder": ENCODER, "optimizer": {"class_path": "simclr_pl.optim.LARS"}},
        {"encoder": ENCODER, "optimizer": {"class_path": "torch.optim.AdamW"}},
        {"encoder": ENCODER, "loss": {"class_path": "simclr_pl.NTXentLoss"}},
        {"encoder": {"class_path": "simclr_pl.Encoder", "init_args": {"name": "timm/resnet18"}}},
        {"encoder": {"class_path": "torchvision.models.resnet18"}},
    ],
)
def test_parts_by_class_and_by_function_are_built(tmp_path: Path, part: dict[str, Any]) -> None:
    assert build_model(tmp_path / "a.ckpt", part).num_features > 0


def test_what_only_lies_in_the_current_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text("open('executed', 'w')\ndef encoder(): pass\n")
    recipe = {"encoder": {"class_path": "hostile.encoder"}}
    with pytest.raises(InputError, match="No module named 'hostile'"):
        build_model(tmp_path / "a.ckpt", recipe)
    assert not (tmp_path / "executed").exists()
