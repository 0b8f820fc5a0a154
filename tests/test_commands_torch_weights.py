"""Checkpoints in the layouts of other libraries give the features of the network that was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr_pl.commands.imported import fill
from simclr_pl.commands.torch_weights import read_torch
from simclr_pl.errors import InputError

Weights = dict[str, Tensor]


def resnet18(**options: Any) -> nn.Module:
    """torchvision's, with batch norms that do something."""
    model = torchvision.models.resnet18(**options)
    for value in model.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.0)
    return model.eval()


def under(prefix: str, model: nn.Module) -> Weights:
    return {prefix + name: value for name, value in model.state_dict().items()}


def cifar(model: nn.Module, padding: int) -> nn.Module:
    model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    model.maxpool = nn.Identity()
    return model


def save(content: Any) -> Path:
    torch.save(content, "other.ckpt")
    return Path("other.ckpt")


def has_features_of(
    expected: nn.Module, path: Path, size: int = 64, prefix: str | None = None
) -> bool:
    """Whether the encoder that is read has the features of ``expected``."""
    encoder = read_torch(path, prefix).build(str(path)).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        found, features = encoder(images), expected(images).flatten(1)
    return torch.allclose(found, features, rtol=1.3e-6, atol=1e-5)


HEADS = {"projector.0.weight": torch.zeros(4, 512), "classifier.weight": torch.zeros(10, 512)}


@pytest.mark.parametrize(
    "prefix",
    [
        "",  # torchvision, timm
        "backbone.",  # lightly's benchmarks, solo-learn, stable-pretraining
        "encoder.",
        "online_network.encoder.",
        "module.encoder_q.",  # MoCo
        "_feature_blocks.",  # VISSL
    ],
)
def test_a_resnet_is_found_below_any_prefix(prefix: str) -> None:
    model = resnet18()
    path = save({"state_dict": {**under(prefix, model), **HEADS}, "global_step": 70, "epoch": 1})
    imported = read_torch(path)
    assert imported.init_args == {
        "name": "resnet18",
        "small_stem": False,
        "width": 1.0,
        "in_channels": 3,
    }
    assert imported.step == 70
    assert imported.left_out == sorted([*HEADS, f"{prefix}fc.bias", f"{prefix}fc.weight"])
    model.fc = nn.Identity()
    assert has_features_of(model, path)


def test_lightlys_numbered_children_are_named() -> None:
    model = resnet18()
    backbone = nn.Sequential(*list(model.children())[:-1])  # as lightly's example of SimCLR has it
    assert has_features_of(
        backbone, save({"state_dict": {**under("backbone.", backbone), **HEADS}})
    )


def test_lightlys_own_resnet_for_small_images_is_named() -> None:
    generator = pytest.importorskip("lightly.models").ResNetGenerator
    for options in ({"name": "resnet-18", "width": 0.5}, {"name": "resnet-50", "width": 0.25}):
        model = generator(**options).eval()
        backbone = nn.Sequential(*list(model.children())[:-1], nn.AdaptiveAvgPool2d(1)).eval()
        path = save(
            {"state_dict": under("backbone.", backbone)}
        )  # as its examples have it: no ReLU
        assert read_torch(path).init_args["width"] == options["width"]
        assert has_features_of(backbone, path, size=32)
        model.linear = nn.Identity()
        assert has_features_of(model, save({"state_dict": under("backbone.", model)}), size=32)


def test_solo_learns_stem_for_cifar_is_padded_by_two() -> None:
    model = cifar(resnet18(), padding=2)
    model.fc = nn.Identity()
    path = save({"state_dict": {**under("backbone.", model), **HEADS}})
    assert read_torch(path).init_args["padding"] == 2
    assert has_features_of(model, path, size=32)


def test_a_small_stem_of_others_is_padded_by_one() -> None:
    model = cifar(resnet18(), padding=1)
    model.fc = nn.Identity()
    path = save({"state_dict": under("backbone.", model)})
    assert read_torch(path).init_args["small_stem"] is True
    assert has_features_of(model, path, size=32)


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext50_32x4d", "resnet34"])
def test_models_are_told_apart_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name).state_dict()
    content = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    assert read_torch(save(content)).init_args["name"] == name


def test_nested_dictionaries_are_searched() -> None:
    model = resnet18()
    trunk = {"trunk": under("_feature_blocks.", model), "heads": {"0.weight": torch.zeros(1)}}
    path = save({"classy_state_dict": {"base_model": {"model": trunk}}})  # VISSL's
    model.fc = nn.Identity()
    assert has_features_of(model, path)


def test_a_safetensors_file_is_read() -> None:
    model = resnet18()
    save_file(model.state_dict(), "other.safetensors")
    model.fc = nn.Identity()
    assert has_features_of(model, Path("other.safetensors"))


def test_the_trained_network_is_taken_before_its_moving_average() -> None:
    model, average = resnet18(), resnet18()
    path = save({"backbone": model.state_dict(), "momentum_backbone": average.state_dict()})
    assert "momentum_backbone.conv1.weight" in read_torch(path).left_out
    model.fc = average.fc = nn.Identity()
    assert has_features_of(model, path)
    assert has_features_of(average, path, prefix="momentum_backbone")


def test_several_networks_need_a_prefix() -> None:
    path = save({"a": resnet18().state_dict(), "b": resnet18().state_dict()})
    with pytest.raises(
        InputError, match=r"one ResNet must be chosen; got several .*: 'a\.', 'b\.'"
    ):
        read_torch(path)
    assert "a.conv1.weight" in read_torch(path, "b").left_out
    with pytest.raises(InputError, match=r"got 'c' where there is 'a\.', 'b\.'"):
        read_torch(path, "c")


def test_counters_of_batches_may_be_missing() -> None:
    model = resnet18()
    weights = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    model.fc = nn.Identity()
    assert has_features_of(model, save(weights))
    norm = nn.BatchNorm2d(2)
    norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    names = ("weight", "bias", "running_mean", "running_var")
    fill(norm, {name: torch.ones(2) for name in names}, "a file")
    assert norm.num_batches_tracked == 0


def refusal(weights: Weights) -> str:
    path = save(weights)
    with pytest.raises(InputError) as caught:
        read_torch(path).build(str(path))
    return str(caught.value)


def test_what_does_not_fill_its_encoder_is_refused() -> None:
    weights = resnet18().state_dict()
    missing = {name: value for name, value in weights.items() if name != "layer3.0.bn1.bias"}
    assert "with layer3.0.bn1.bias missing" in refusal(missing)
    assert "layer1.0.extra without a place" in refusal({**weights, "layer1.0.extra": torch.ones(1)})
    shape = {**weights, "layer4.1.bn2.weight": torch.ones(3)}
    assert "layer4.1.bn2.weight of another shape" in refusal(shape)
    deep = {**weights, "conv1.weight": torch.zeros(32, 3, 3, 3), "conv2.weight": torch.zeros(1)}
    assert "conv2.weight" in refusal(deep)
    short = {name: value for name, value in weights.items() if not name.startswith("layer2.1")}
    assert "got 2-1-2-2 blocks" in refusal(short)
    assert "must hold a ResNet under torchvision's names" in refusal({"a": torch.ones(1)})
