"""Encoders by name, projection heads, and the width of an encoder's features."""

import pytest
import torch
from torch import Tensor, nn

from simclr_pl.errors import InputError
from simclr_pl.models import ConvEncoder, Encoder, Projector, feature_width


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def norm_widths(model: nn.Module) -> list[int]:
    return [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("resnet18", 32, 512),
        ("timm/resnet18", 32, 512),
        ("torchvision/resnet18", 32, 512),
        ("torchvision/mobilenet_v3_small", 32, 1024),  # a hidden layer before the classifier
        ("mobilenetv3_small_100", 32, 1024),  # likewise
        ("torchvision/convnext_tiny", 32, 768),
        ("vit_tiny_patch16_224", 224, 192),
        ("torchvision/googlenet", 32, 1024),  # two auxiliary classifiers
    ],
)
@pytest.mark.parametrize("in_channels", [3, 1])
def test_encoder_maps_images_to_features(
    name: str, size: int, width: int, in_channels: int
) -> None:
    encoder = Encoder(name, in_channels=in_channels)
    assert encoder.num_features == width
    features = encoder(torch.rand(2, in_channels, size, size))
    assert features.shape == (2, width)
    features.square().sum().backward()
    unused = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # DistributedDataParallel would stop


def test_a_name_of_both_libraries_is_timm_s() -> None:
    import timm
    import torchvision

    assert isinstance(Encoder("resnet18").model, timm.models.ResNet)
    assert isinstance(Encoder("torchvision/resnet18").model, torchvision.models.ResNet)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_small_stem_keeps_the_resolution(name: str) -> None:
    shapes: list[torch.Size] = []
    for small_stem in (True, False):
        encoder = Encoder(name, small_stem=small_stem, in_channels=1)
        encoder.model.layer1.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))  # type: ignore[operator, union-attr]
        encoder(torch.rand(2, 1, 20, 28))
    assert shapes == [(2, 64, 20, 28), (2, 64, 5, 7)]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18d", "torchvision/mobilenet_v3_small"]
)
def test_small_stem_refuses_what_has_no_7x7_stem(name: str) -> None:
    with pytest.raises(InputError, match=f"`small_stem` needs a ResNet.*'{name}' has none"):
        Encoder(name, small_stem=True)


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 1024), ("resnet18d", 1024), ("resnet50", 4096)]
)
def test_width_2_doubles_every_layer_of_a_resnet(name: str, features: int) -> None:
    narrow, wide = Encoder(name), Encoder(name, width=2, in_channels=1)
    assert wide.num_features == 2 * narrow.num_features == features
    assert wide(torch.rand(2, 1, 32, 32)).shape == (2, features)
    for a, b in zip(convs(narrow), convs(wide), strict=True):
        assert b.out_channels == 2 * a.out_channels
        assert b.in_channels == (1 if a.in_channels == 3 else 2 * a.in_channels)
        assert (b.kernel_size, b.stride, b.padding) == (a.kernel_size, a.stride, a.padding)
    assert norm_widths(wide) == [2 * n for n in norm_widths(narrow)]


def test_stem_stride_is_that_of_the_small_stem() -> None:
    shapes: list[torch.Size] = []
    for name in ("resnet18", "torchvision/resnet18"):
        encoder = Encoder(name, small_stem=True, stem_stride=2)
        encoder.model.layer1.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))  # type: ignore[operator, union-attr]
        assert encoder(torch.rand(2, 3, 20, 29)).shape == (2, 512)
    assert shapes == [(2, 64, 10, 15)] * 2


@pytest.mark.parametrize(("small_stem", "stride"), [(False, 2), (True, 0)])
def test_stem_stride_needs_the_small_stem(small_stem: bool, stride: int) -> None:
    with pytest.raises(InputError, match=f"`stem_stride` must be >= 1, and 1 wi.*got {stride}"):
        Encoder("resnet18", small_stem=small_stem, stem_stride=stride)


def test_width_and_small_stem_go_together() -> None:
    encoder = Encoder("resnet18", small_stem=True, width=0.5)
    assert encoder.model.conv1.weight.shape == (32, 3, 3, 3)  # type: ignore[union-attr]
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, 256)


def test_width_refuses_what_it_cannot_widen() -> None:
    with pytest.raises(InputError, match="needs a ResNet; got 2 for 'vit_tiny_patch16_224'"):
        Encoder("vit_tiny_patch16_224", width=2)
    with pytest.raises(InputError, match="needs a timm ResNet; got 2 for 'torchvision/resnet18'"):
        Encoder("torchvision/resnet18", width=2)
    with pytest.raises(InputError, match="`pretrained` weights exist at `width` 1 only; got 2"):
        Encoder("resnet18", width=2, pretrained=True)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet51", "resnet50"),
        ("timm/resnet51", "resnet50"),
        ("torchvision/vit_b_17", "vit_b_16"),
        ("timm/vit_b_16", "vit_b_16"),  # torchvision's only
        ("???", "resnet18, resnet50"),
    ],
)
def test_unknown_name_is_refused_with_close_matches(name: str, close: str) -> None:
    with pytest.raises(InputError) as error:
        Encoder(name)
    assert f"got {name!r}. Perhaps: " in str(error.value)
    assert close in str(error.value).split("Perhaps: ")[1]


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "torchvision/fasterrcnn_resnet50_fpn", "quantized_resnet18"]
)
def test_what_is_no_classifier_is_unknown(name: str) -> None:
    with pytest.raises(InputError, match=r"must be a model of timm or torchvision"):
        Encoder(name)


def test_a_model_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(InputError, match=r"last layer must be linear.*'squeezenet1_1' has none"):
        Encoder("torchvision/squeezenet1_1")


@pytest.mark.parametrize(("width", "in_channels"), [(16, 3), (3, 1)])
def test_conv_encoder_widths_double(width: int, in_channels: int) -> None:
    encoder = ConvEncoder(width, in_channels)
    assert [c.in_channels for c in convs(encoder)] == [in_channels, width, 2 * width, 4 * width]
    assert norm_widths(encoder) == [width, 2 * width, 4 * width, 8 * width]
    assert encoder.num_features == 8 * width
    for size in (8, 31):
        assert encoder(torch.rand(2, in_channels, size, size)).shape == (2, 8 * width)


LINEAR, HIDDEN = [nn.Linear], [nn.Linear, nn.BatchNorm1d, nn.ReLU]


@pytest.mark.parametrize("last_batch_norm", [True, False])
@pytest.mark.parametrize(
    ("layers", "kinds", "widths"),
    [
        (1, LINEAR, [(20, 5)]),
        (2, HIDDEN + LINEAR, [(20, 30), (30, 5)]),
        (3, HIDDEN * 2 + LINEAR, [(20, 30), (30, 30), (30, 5)]),
    ],
)
def test_projector_layout(
    layers: int, kinds: list[type], widths: list[tuple[int, int]], last_batch_norm: bool
) -> None:
    head = Projector(20, 30, 5, layers=layers, last_batch_norm=last_batch_norm)
    assert [type(module) for module in head] == kinds + [nn.BatchNorm1d] * last_batch_norm
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == widths
    assert all(m.bias is None for m in linears)
    assert head(torch.randn(4, 20)).shape == (4, 5)


def test_projector_s_last_batch_norm_has_no_trainable_beta() -> None:
    *_, hidden, _, _, last = Projector(20, layers=3)
    assert isinstance(hidden, nn.BatchNorm1d)
    assert isinstance(last, nn.BatchNorm1d)
    assert hidden.bias.requires_grad
    assert last.weight.requires_grad
    assert not last.bias.requires_grad
    assert torch.equal(last.bias, torch.zeros(128))


def test_projector_defaults_are_two_layers_as_wide_as_the_features_to_128() -> None:
    shapes = [tuple(m.weight.shape) for m in Projector(20) if isinstance(m, nn.Linear)]
    assert shapes == [(20, 20), (128, 20)]


def test_projector_refuses_no_layers() -> None:
    with pytest.raises(InputError, match=r"`projector.layers` must be >= 1; got 0"):
        Projector(20, layers=0)


def test_feature_width_is_read_from_the_attribute_without_a_run() -> None:
    class Unrunnable(nn.Module):
        num_features = 7

    assert feature_width(Unrunnable()) == 7


@pytest.mark.parametrize("in_channels", [1, 3])
def test_feature_width_is_found_by_a_run(in_channels: int) -> None:
    encoder = nn.Sequential(nn.Conv2d(in_channels, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    assert feature_width(encoder) == 24


def test_feature_width_leaves_modes_statistics_and_random_state_as_they_were() -> None:
    encoder = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    encoder[1].eval()  # a frozen layer
    modes = [module.training for module in encoder.modules()]
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    random_state = torch.get_rng_state()
    feature_width(encoder)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in encoder.parameters())


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("encoder", "received"),
    [
        (nn.Conv2d(3, 6, 3), r"outputs \(1, 6, 62, 62\)"),  # not pooled
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten()), r"outputs \(1, 23064\)"),  # by size
        (nn.Linear(5, 5), "RuntimeError"),
        (Pair(), "AttributeError"),
    ],
)
def test_feature_width_refuses_what_does_not_map_images_to_vectors(
    encoder: nn.Module, received: str
) -> None:
    with pytest.raises(InputError, match=rf"must map .* got {received}.*`num_features`"):
        feature_width(encoder)
    assert encoder.training


def test_torchvision_weights_for_other_channels_are_an_error() -> None:
    with pytest.raises(InputError, match="need 3 channels; got 1 for 'resnet18'"):
        Encoder("torchvision/resnet18", in_channels=1, pretrained=True)
