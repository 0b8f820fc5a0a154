"""`simclr export`: the weights of a checkpoint's encoder, under the names that timm gives them."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from trained import digits_run

from simclr_pl.cli import main
from simclr_pl.commands.encoders import load_subject


def test_a_runs_encoder_lies_beside_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = digits_run(tmp_path)
    main(["export", str(run)])
    file = run / "checkpoints/last.safetensors"
    assert str(file) in capsys.readouterr().out
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    encoder = {
        k.removeprefix("encoder."): v for k, v in content.items() if k.startswith("encoder.")
    }
    saved = load_file(file)
    assert saved.keys() == encoder.keys()
    assert all(torch.equal(saved[name], value) for name, value in encoder.items())
    other = load_subject(str(run)).fresh()
    other.load_state_dict(saved)
    assert sorted(f.name for f in file.parent.iterdir() if f.name.startswith(".")) == []


def test_timm_takes_the_file_as_its_own(tmp_path: Path) -> None:
    main(["export", "timm/resnet18", "--out", "r.safetensors"])
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file("r.safetensors"))
    images = torch.rand(2, 3, 32, 32)
    expected = load_subject("timm/resnet18").encoder
    assert torch.equal(model.eval()(images), expected.eval()(images))


@pytest.mark.parametrize("out", ["r.pt", "no/r.safetensors"])
def test_a_mistake_is_one_line(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "resnet18", "--out", out])
    assert end.value.code == 2
    assert f"in a folder that exists; got {out!r}" in capsys.readouterr().err
