"""`simclr export`: other programs load what it writes, and get the features of the checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import digits_run

from simclr_pl import ConvEncoder, Encoder, InputError
from simclr_pl.cli import main
from simclr_pl.commands.encoder_file import KEY, write_encoder
from simclr_pl.commands.encoders import load_subject
from simclr_pl.commands.export import _difference, _program, export

PIXELS = {"mean": [0.4], "std": [0.2]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs"))


def encoder_file(file: str, size: int = 32, **arguments: Any) -> Encoder:
    """Writes the file of an encoder by name whose batch norm has statistics that matter."""
    encoder = Encoder(**arguments)
    channels = arguments.get("in_channels", 3)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    recipe = {"class_path": "simclr_pl.models.Encoder", "init_args": arguments}
    pixels = {name: values * channels for name, values in PIXELS.items()}
    about = {"encoder": recipe, "normalisation": pixels, "source": "x", "step": 3, "size": size}
    write_encoder(Path(file), encoder, about)
    return encoder.eval()


def onnx_session(file: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(images)


def test_a_runs_encoder_lies_beside_its_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run)])
    file = run / "checkpoints/last.safetensors"
    said = capsys.readouterr().out
    assert str(file) in said
    assert "less [0.204], divided by [0.181]; 32 pixels a side" in said
    assert "largest difference of features, file to checkpoint: " in said
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    encoder = {
        k.removeprefix("encoder."): v for k, v in content.items() if k.startswith("encoder.")
    }
    saved = load_file(file)
    assert saved.keys() == encoder.keys()
    assert all(torch.equal(saved[name], value) for name, value in encoder.items())
    assert [f.name for f in file.parent.iterdir() if f.name.startswith(".")] == []


def test_timm_takes_the_file_as_its_own() -> None:
    main(["export", "timm/resnet18", "--out", "r.safetensors"])
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file("r.safetensors"))
    images = torch.rand(2, 3, 32, 32)
    expected = load_subject("timm/resnet18").encoder
    assert torch.equal(model.eval()(images), expected.eval()(images))


def test_timm_takes_the_file_of_a_small_stem_once_it_has_one() -> None:
    encoder = encoder_file("e.safetensors", name="timm/resnet18", small_stem=True)
    model = timm.create_model("resnet18", num_classes=0)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.load_state_dict(load_file("e.safetensors"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), encoder(images))


def test_torchvision_takes_the_file_as_its_own_but_for_the_classifier() -> None:
    main(["export", "torchvision/resnet18", "--out", "r.safetensors"])
    model = torchvision.models.resnet18()
    missing, surplus = model.load_state_dict(load_file("r.safetensors"), strict=False)
    assert (missing, surplus) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    expected = load_subject("torchvision/resnet18").encoder
    assert torch.equal(model.eval()(images), expected.eval()(images))


def test_onnx_takes_any_number_of_images_and_says_how_they_are_normalised(run: Path) -> None:
    main(["export", str(run), "--format", "onnx", "--out", "e.onnx"])
    session = onnx_session("e.onnx")
    encoder = load_subject(str(run)).encoder.eval()
    assert session.get_inputs()[0].shape == ["batch", 1, 32, 32]
    for n in (1, 2, 5):
        images = torch.randn(n, 1, 32, 32)
        (received,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(received), features(encoder, images))
    about = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert about["normalisation"] == {"mean": [0.204], "std": [0.181]}
    assert (about["size"], about["step"]) == (32, 6)
    assert about["source"] == "quickstart/version_0/last.ckpt"
    assert [f.name for f in Path().iterdir()] == ["e.onnx"]


def test_a_torch_program_takes_any_number_of_images_and_says_how_they_are_normalised(
    run: Path,
) -> None:
    main(["export", str(run), "--format", "torch", "--out", "e.pt2"])
    extra = {f"{KEY}.json": ""}
    program = torch.export.load("e.pt2", extra_files=extra).module()
    encoder = load_subject(str(run)).encoder.eval()
    for n in (1, 2, 5):
        images = torch.randn(n, 1, 32, 32)
        torch.testing.assert_close(features(program, images), features(encoder, images))
    assert json.loads(extra[f"{KEY}.json"])["normalisation"] == {"mean": [0.204], "std": [0.181]}


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        (32, {"name": "timm/resnet10t", "in_channels": 1}),
        (32, {"name": "torchvision/resnet18", "small_stem": True}),
        (160, {"name": "timm/test_vit"}),
    ],
    ids=["grey", "small stem", "ViT"],
)
def test_programs_of_other_encoders_take_any_number_of_images(
    size: int, arguments: dict[str, Any]
) -> None:
    encoder = encoder_file("e.safetensors", size, **arguments)
    for form in ("onnx", "torch"):
        main(["export", "e.safetensors", "--format", form])
    images = torch.randn(5, arguments.get("in_channels", 3), size, size)
    expected = features(encoder, images)
    (received,) = onnx_session("e.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(received), expected, atol=1e-4, rtol=1e-4)
    program = torch.export.load("e.pt2").module()
    torch.testing.assert_close(features(program, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_timm_builds_a_folder_by_itself(channels: int) -> None:
    encoder = encoder_file("e.safetensors", name="timm/resnet10t", in_channels=channels)
    main(["export", "e.safetensors", "--format", "huggingface", "--out", "folder"])
    model = timm.create_model("local-dir:folder", pretrained=True).eval()
    images = torch.rand(2, channels, 32, 32)
    assert torch.equal(model(images), encoder(images))
    data = timm.data.resolve_model_data_config(model)
    assert list(data["input_size"]) == [channels, 32, 32]
    assert (list(data["mean"]), list(data["std"])) == ([0.4] * channels, [0.2] * channels)
    pixels = json.loads(Path("folder/preprocessor_config.json").read_text())
    assert (pixels["image_mean"], pixels["image_std"]) == ([0.4] * channels, [0.2] * channels)
    edges = (pixels["size"]["shortest_edge"], pixels["crop_size"]["height"])
    assert edges == (37, 32)  # 7/8 of the side, as `Augment` cuts
    assert "timm.create_model" in Path("folder/README.md").read_text()
    assert "trained by SimCLR" not in Path("folder/README.md").read_text()  # nobody knows


def test_a_folder_promises_timm_nothing_that_timm_cannot_build() -> None:
    encoder_file("e.safetensors", name="timm/resnet10t", width=0.5)
    main(["export", "e.safetensors", "--format", "huggingface", "--out", "folder"])
    assert "architecture" not in json.loads(Path("folder/config.json").read_text())
    assert "timm.create_model" not in Path("folder/README.md").read_text()


def test_a_model_card_tells_the_run(run: Path) -> None:
    scores = {"knn_top1": 0.5, "knn_top1_init": 0.25, "linear_top1": None, "steps": 6}
    summary, linear = run / "summary.json", run / "checkpoints/last.linear.json"
    summary.write_text(json.dumps(scores))
    linear.write_text(json.dumps({"step": 6, "top1": 0.75, "dataset": "/some/where/photos"}))
    try:
        main(["export", str(run), "--format", "huggingface", "--out", "folder"])
    finally:
        summary.unlink()
        linear.unlink()
    card = Path("folder/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front.get("license")) == ("simclr_pl", None)
    assert "# ConvEncoder, trained by SimCLR" in card
    rows = [
        "| data | Digits |",
        "| optimiser steps | 6 |",
        "| images of one update | 128 |",
        "| learning rate | 0.004 at its peak: 0.004, scaled none |",
        "| temperature | 0.2 |",
        "among frozen features | the run's | 50.0 | 25.0 | - |",
        "| linear classifier on frozen features | photos | 75.0 | - | - |",
    ]
    assert [row for row in rows if row not in card] == []
    assert "trained beside" not in card
    assert str(run) not in card
    assert "@inproceedings{chen2020simple" in card


@pytest.mark.parametrize("text", ['{"knn_top1": 0.5, "steps": 5}', '{"knn', "[]"])
def test_a_model_card_has_no_scores_of_other_weights_or_of_damaged_files(
    text: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").write_text(text)
    main(["export", str(run), "--format", "huggingface", "--out", "folder"])
    (run / "summary.json").unlink()
    assert "None were measured." in Path("folder/README.md").read_text()
    assert ("left out of the model card" in capsys.readouterr().out) == (text == '{"knn')


def test_the_card_of_a_fine_tuned_encoder_says_so_and_has_no_scores_of_before(run: Path) -> None:
    short = ["--epochs", "1", "--fraction", "0.1", "--accelerator", "cpu", "--batch_size", "32"]
    main(["finetune", str(run), *short])
    tuned = run / "checkpoints/last.finetune.ckpt"
    (run / "summary.json").write_text('{"knn_top1": 0.5, "steps": 6}')
    main(["export", str(tuned), "--format", "huggingface", "--out", "folder"])
    (run / "summary.json").unlink()
    card = Path("folder/README.md").read_text()
    assert "and then with labels, by fine-tuning or distillation" in card
    assert "None were measured." in card


def test_the_learning_rate_of_a_card_is_the_one_of_the_optimiser(tmp_path: Path) -> None:
    run = digits_run(tmp_path, "--model.lr_scaling", "sqrt", "--data.global_batch_size", "64")
    main(["export", str(run), "--format", "huggingface", "--out", "folder"])
    assert "| 0.032 at its peak: 0.004, scaled sqrt |" in Path("folder/README.md").read_text()


@pytest.mark.parametrize("form", ["safetensors", "huggingface", "torch", "onnx"])
def test_weights_that_are_no_numbers_leave_no_file(form: str) -> None:
    encoder = ConvEncoder(4, 1)
    nn.init.constant_(encoder[0].weight, torch.nan)
    recipe = {"class_path": "simclr_pl.ConvEncoder", "init_args": {"width": 4, "in_channels": 1}}
    about = {"encoder": recipe, "normalisation": PIXELS, "source": "x", "step": 3, "size": 16}
    write_encoder(Path("nan.safetensors"), encoder, about)
    out = {"safetensors": "e.safetensors", "torch": "e.pt2", "onnx": "e.onnx"}.get(form, "e")
    with pytest.raises(InputError, match=r"must give the features of its checkpoint; got a .* nan"):
        export("nan.safetensors", form, out)  # type: ignore[arg-type]
    assert [f.name for f in Path().iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("shift", [0.0, 1e-5, 1e-2])
def test_a_difference_above_the_tolerance_is_an_error(shift: float) -> None:
    encoder = ConvEncoder(4, 1).eval()
    views = [torch.rand(n, 1, 16, 16) for n in (1, 3)]
    if shift < 1e-3:
        found = _difference(encoder, lambda x: encoder(x) + shift, views, "test")
        assert found == pytest.approx(shift, rel=1e-2)
    else:
        with pytest.raises(InputError, match=r"got a difference of 1\.0e-02 from test for 1"):
            _difference(encoder, lambda x: encoder(x) + shift, views, "test")


class Branches(nn.Module):
    """What is computed depends on the values of the images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_an_encoder_that_cannot_be_traced_is_one_line() -> None:
    with pytest.raises(InputError, match="can trace for any batch") as error:
        _program(Branches(), torch.zeros(3, 1, 8, 8))
    assert "\n" not in str(error.value)


def test_onnx_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        main(["export", "resnet18", "--format", "onnx"])
    assert end.value.code == 2
    assert "got no onnxscript. Run `pip install 'simclr_pl[onnx]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "out", "message"),
    [
        (
            "safetensors",
            "r.pt",
            "must end in .safetensors and lie in a folder that exists; got 'r.pt'",
        ),
        ("safetensors", "no/r.safetensors", "lie in a folder that exists; got 'no/r.safetensors'"),
        ("onnx", "r.pt", "must end in .onnx"),
        ("torch", "r.pt", "must end in .pt2"),
        ("huggingface", "no/folder", "`out` must lie in a folder that exists; got 'no/folder'"),
        ("huggingface", "full", "must be a new or an empty folder; got 'full'"),
        ("huggingface", "e.safetensors", "must be "),
        ("safetensors", "e.safetensors", "must be another file than what is exported"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    form: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder_file("e.safetensors", name="timm/resnet10t")
    Path("full").mkdir()
    Path("full/README.md").write_text("mine")
    before = Path("e.safetensors").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["export", "e.safetensors", "--format", form, "--out", out])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Path("e.safetensors").read_bytes() == before
    assert sorted(str(f) for f in Path().rglob("*")) == ["e.safetensors", "full", "full/README.md"]
