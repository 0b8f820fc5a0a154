"""An encoder's file: what it keeps, what commands make of it, and what it cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained import digits_run

from simclr_pl import ConvEncoder, Encoder, InputError
from simclr_pl.cli import main
from simclr_pl.commands.encoder_file import KEY, read_encoder, write_encoder
from simclr_pl.commands.encoders import clean_views, load_subject
from simclr_pl.data import Digits

SMALL = {"class_path": "simclr_pl.models.ConvEncoder", "init_args": {"width": 4, "in_channels": 1}}
ABOUT = {
    "encoder": SMALL,
    "normalisation": {"mean": [0.3], "std": [0.2]},
    "source": "made by hand",
    "step": 7,
    "size": 24,
}


def changed(file: Path, **changes: Any) -> Path:
    """A whole file, but for entries of its recipe."""
    write_encoder(file, ConvEncoder(4, 1), {**ABOUT, **changes})
    return file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    encoder = ConvEncoder(4, 1).to(memory_format=torch.channels_last)
    write_encoder(tmp_path / "e.safetensors", encoder, ABOUT)
    read = read_encoder(tmp_path / "e.safetensors")
    expected, received = encoder.state_dict(), read.encoder.state_dict()
    assert expected.keys() == received.keys()
    assert all(torch.equal(received[name], value) for name, value in expected.items())
    assert (read.normalisation, read.source, read.step) == (((0.3,), (0.2,)), "made by hand", 7)
    assert (read.recipe, read.size, read.encoder.num_features) == (SMALL, 24, 32)
    assert not torch.equal(read.build().state_dict()["0.weight"], expected["0.weight"])
    with safe_open(tmp_path / "e.safetensors", "pt") as content:
        assert json.loads(content.metadata()[KEY]) == ABOUT
    assert [f.name for f in tmp_path.iterdir()] == ["e.safetensors"]


def test_the_tensors_of_an_encoder_by_name_have_its_librarys_names(tmp_path: Path) -> None:
    encoder = Encoder("timm/resnet18", small_stem=True, in_channels=1)
    arguments = {"name": "timm/resnet18", "small_stem": True, "in_channels": 1, "pretrained": True}
    recipe = {"class_path": "simclr_pl.models.Encoder", "init_args": arguments}
    write_encoder(tmp_path / "e.safetensors", encoder, {**ABOUT, "encoder": recipe})
    assert load_file(tmp_path / "e.safetensors").keys() == encoder.model.state_dict().keys()
    images = torch.rand(2, 1, 32, 32)
    read = read_encoder(tmp_path / "e.safetensors").encoder  # and nothing was fetched
    assert torch.equal(read.eval()(images), encoder.eval()(images))


def test_commands_take_the_file_and_the_folder_as_the_run_itself(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    main(["export", str(run), "--out", "e.safetensors"])
    main(["export", str(run), "--format", "huggingface", "--out", "folder"])
    top1 = []
    for what in (str(run), "e.safetensors", "folder"):
        options = ["--dataset", "Digits", "--accelerator", "cpu", "--baselines", "false"]
        main(["knn", what, *options, "--out", "knn.json"])
        top1.append(json.loads(Path("knn.json").read_text())["top1"])
    assert top1[0] == top1[1] == top1[2]
    views = clean_views(load_subject("folder"), Digits())
    assert (views.size, views.mean, views.std) == (32, (0.204,), (0.181,))
    short = ["--epochs", "1", "--fraction", "0.1", "--accelerator", "cpu", "--batch_size", "32"]
    main(["finetune", "e.safetensors", "--dataset", "Digits", *short])
    tuned = load_subject("e.finetune.ckpt")
    assert tuned.tuned
    assert isinstance(tuned.encoder, ConvEncoder)


def test_the_size_and_pixels_of_a_file_are_those_that_its_images_get(tmp_path: Path) -> None:
    subject = load_subject(str(changed(tmp_path / "e.safetensors")))
    views = clean_views(subject, Digits())
    assert (views.size, views.mean, views.std) == (24, (0.3,), (0.2,))
    assert clean_views(subject, Digits(), size=16).size == 16


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("stranger.Touch", {}),
        ("torch.nn.Linear", {"in_features": 2, "out_features": 2}),
        ("simclr_pl.__main__.main", {}),
        ("simclr_pl.models.ConvEncoder", {"width": {"class_path": "stranger.Touch"}}),
    ],
)
def test_a_file_names_encoders_of_this_package_alone(
    class_path: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("from pathlib import Path; Path('touched').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {"class_path": class_path, "init_args": arguments}
    file = changed(tmp_path / "e.safetensors", encoder=recipe)
    with pytest.raises(InputError, match="must name an encoder of simclr_pl and plain values"):
        read_encoder(file)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {}}, "must be a JSON object with `encoder`"),
        ({"encoder": "ConvEncoder"}, "must be a JSON object with `encoder`"),
        ({"step": "many"}, "must be a JSON object with `encoder`"),
        ({"size": 1}, "must be a JSON object with `encoder`"),
        ({"encoder": {**SMALL, "init_args": {"width": 8}}}, "must hold the tensors of its recipe"),
        ({"encoder": {**SMALL, "init_args": {"depth": 8}}}, "recipe that can be built here"),
        ({"encoder": {"class_path": "simclr_pl.models.No"}}, "recipe that can be built here"),
        ({"encoder": {"class_path": "simclr_pl.losses.Stats"}}, "recipe that can be built here"),
        ({"encoder": {"class_path": "simclr_pl.cli.main"}}, "recipe that can be built here"),
        ({"normalisation": {"mean": [0.5]}}, "`normalisation` of an encoder's file must be"),
        ({"normalisation": {"mean": [0.5], "std": [0]}}, "a `std` above 0"),
        ({"normalisation": {"mean": [0.5], "std": [1, 1]}}, "one number a channel"),
    ],
)
def test_a_wrong_recipe_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_encoder(changed(tmp_path / "e.safetensors", **changes))
    assert "\n" not in str(error.value)


def test_a_file_without_a_recipe_says_what_makes_one(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "e.safetensors")
    with pytest.raises(InputError, match=r"without `simclr_pl` .* Run `simclr import .*` first"):
        load_subject(str(tmp_path / "e.safetensors"))


def test_a_torn_or_missing_file_is_one_line(tmp_path: Path) -> None:
    file = changed(tmp_path / "e.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="must be whole safetensors"):
        load_subject(str(file))
    with pytest.raises(InputError, match=r"must exist; got 'no\.safetensors'"):
        load_subject("no.safetensors")
