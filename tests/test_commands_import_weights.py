"""`simclr import` writes a file that every command takes, and says what is in it."""

import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from tensorflow_files import STEP, expected, write
from torch import nn

from simclr_pl.cli import main
from simclr_pl.commands.encoder_file import read_encoder
from simclr_pl.commands.encoders import clean_views, load_subject
from simclr_pl.data import Digits


@pytest.fixture(scope="module")
def tf1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of TF1."""
    folder = tmp_path_factory.mktemp("resnet18")
    write("resnet18", folder / "model.ckpt-1234")
    return folder


def test_weights_of_tensorflow_are_a_file_with_tensorflows_features(
    tf1: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["import", str(tf1), "--out", "simclr.safetensors"])
    said = capsys.readouterr().out
    assert "found: google-research/simclr, TF1, step 1,234" in said
    assert "SimCLRResNet(depth=18, width=1, sk_ratio=0.0, small_stem=True, in_channels=3)" in said
    assert "512 features, 11,173,056 parameters" in said
    assert "left out: head_supervised (2): head_supervised/linear_layer/dense/bias" in said
    written = read_encoder(Path("simclr.safetensors"))
    assert written.step == STEP
    assert written.encoder.num_features == 512
    assert written.normalisation == ((0.0,) * 3, (1.0,) * 3)
    images, features = expected("resnet18")
    with torch.no_grad():
        found = written.encoder.eval()(torch.from_numpy(images.copy()))
    torch.testing.assert_close(found, torch.from_numpy(features), rtol=0, atol=1e-5)


def grey_checkpoint() -> nn.Module:
    """A ResNet-18 of grey images, as a Lightning checkpoint beside a head."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    weights = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 5, "extra": Path("x")}, "grey.ckpt")
    return model


def test_a_command_runs_on_what_was_imported(capsys: pytest.CaptureFixture[str]) -> None:
    grey_checkpoint()
    main(["import", "grey.ckpt", "--mean", "[0.5]", "--std", "[0.25]"])
    said = capsys.readouterr().out
    assert "pixels: in [0, 1], less [0.5], divided by [0.25]" in said
    assert "note: not read, since they are no tensors: pathlib" in said
    assert "written to" in said
    assert "grey.safetensors" in said
    augment = clean_views(load_subject("grey.safetensors"), Digits())
    assert (tuple(augment.mean), tuple(augment.std)) == ((0.5,), (0.25,))
    quick = ["--baselines", "false", "--bank_size", "30", "--num_workers", "0", "--size", "16"]
    main(["knn", "grey.safetensors", "--dataset", "Digits", "--out", "knn.json", *quick])
    assert "grey" in Path("knn.json").read_text()


def test_every_command_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = torchvision.models.resnet18()
    networks = {"backbone": model.state_dict(), "momentum_backbone": model.state_dict()}
    torch.save({"state_dict": networks}, "several.ckpt")
    page = (Path(__file__).parents[1] / "docs" / "import.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("simclr import")]
    for command in commands:
        words = shlex.split(command.replace("CHECKPOINT", "several.ckpt"))
        main(words[1:])
        assert f"written to {words[words.index('--out') + 1]}" in capsys.readouterr().out
    assert len(commands) == 3


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["import", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_mistakes_are_one_line(tf1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey_checkpoint()
    one = "`mean` must be 1 numbers, one a channel; got [0.485, 0.456, 0.406]"
    assert one in mistake(capsys, "grey.ckpt")
    zero = mistake(capsys, "grey.ckpt", "--mean", "[0]", "--std", "[0]")
    assert "`std` must be 1 numbers above 0, one a channel; got [0.0]" in zero
    assert "a checkpoint must exist" in mistake(capsys, "nothing")
    assert "must end in .safetensors" in mistake(capsys, "grey.ckpt", "--out", "a.pt")
    assert "a folder that exists" in mistake(capsys, "grey.ckpt", "--out", "no/a.safetensors")
    assert "`prefix` is for files of torch" in mistake(capsys, str(tf1), "--prefix", "backbone")
    Path("same.safetensors").touch()
    assert "another file than the checkpoint" in mistake(
        capsys, "same.safetensors", "--out", "./same.safetensors"
    )
    Path("broken.ckpt").write_text("no checkpoint")
    assert "must be a whole file of torch.save" in mistake(capsys, "broken.ckpt")
    assert not list(Path().glob("*.safetensors*"))[1:]  # nothing is left but what was there
