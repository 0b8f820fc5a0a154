"""Encoders and projection heads.

Symbols: n rows, C channels, H x W pixels, E feature width, D projection width.
"""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from simclr_pl.errors import InputError


class Encoder(nn.Module):
    """Any torchvision or timm model by name, without its classifier: images in, features out.

    Args:
        name: a model of timm or torchvision, such as "resnet50" or "vit_small_patch16_224". A name that
            both have is taken from timm; "torchvision/resnet50" or "timm/resnet50" says which.
        small_stem: for ResNets, a 3x3 convolution of stride 1 and no pool in place of the 7x7 stem, as
            the paper does for CIFAR-10 (appendix B.9).
        stem_stride: of that convolution; 2 quarters the pixels of all layers, and nearly the time.
        width: multiplies the number of channels of every layer of a ResNet, as in the paper's 2x and
            4x models.
        in_channels: channels of the images.
        pretrained: load the published weights (needs a network).

    Attributes:
        num_features: the feature width E.

    Raises:
        InputError: the name is unknown, or an option does not fit the model.
    """

    def __init__(
        self,
        name: str = "resnet50",
        small_stem: bool = False,
        stem_stride: int = 1,
        width: float = 1.0,
        in_channels: int = 3,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if stem_stride < 1 or (stem_stride > 1 and not small_stem):
            raise InputError(
                "`stem_stride` must be >= 1, and 1 without `small_stem`; got "
                f"{stem_stride} and small_stem={small_stem}. Set `encoder.stem_stride`."
            )
        library, short_name = _find(name)
        if library == "timm":
            model, self.num_features = _timm_model(short_name, width, in_channels, pretrained)
        else:
            if width != 1.0:
                raise InputError(
                    f"`width` other than 1 needs a timm ResNet; got {width} for {name!r}. "
                    "Name a timm ResNet, e.g. 'timm/resnet50'."
                )
            model, self.num_features = _torchvision_model(short_name, in_channels, pretrained)
        if small_stem:
            _shrink_stem(model, name, stem_stride)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, C, H, W) to features (n, E)."""
        return self.model(x)  # type: ignore[no-any-return]


def _find(name: str) -> tuple[str, str]:
    """Returns the library and the model's name in it."""
    import timm
    import torchvision.models

    # The classifiers only: torchvision's detectors and the like are in modules of their own.
    classifiers = torchvision.models.list_models(module=torchvision.models)
    catalogue = {"timm": timm.list_models(), "torchvision": classifiers}
    prefix, _, short_name = name.partition("/")
    if prefix in catalogue and short_name in catalogue[prefix]:
        return prefix, short_name
    for library, names in catalogue.items():
        if name in names:
            return library, name
    known = [model for names in catalogue.values() for model in names]
    close = difflib.get_close_matches(short_name or name, known, n=3) or ["resnet18", "resnet50"]
    raise InputError(
        f"`encoder.name` must be a model of timm or torchvision; got {name!r}. "
        f"Perhaps: {', '.join(dict.fromkeys(close))}."
    )


def _timm_model(
    name: str, width: float, in_channels: int, pretrained: bool
) -> tuple[nn.Module, int]:
    import timm

    if width == 1.0:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels)
    elif pretrained:
        raise InputError(
            f"`pretrained` weights exist at `width` 1 only; got {width}. Set one of the two."
        )
    else:
        model = _wide_resnet(name, width, in_channels)
    # Some models put a hidden layer between the pooled features and the classifier.
    return model, int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]


def _wide_resnet(name: str, width: float, in_channels: int) -> nn.Module:
    import timm
    from timm.models.resnet import ResNet

    narrow = timm.create_model(name, num_classes=0)
    if not isinstance(narrow, ResNet):
        raise InputError(
            f"`width` other than 1 needs a ResNet; got {width} for {name!r}. Leave `width` at 1."
        )
    options: dict[str, Any] = {
        "channels": tuple(round(64 * 2**stage * width) for stage in range(4)),
        "stem_width": round(narrow.bn1.num_features * width / 2),  # type: ignore[operator, arg-type]
    }
    if isinstance(narrow.conv1, nn.Sequential):  # a deep stem, as wide as we say
        return timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    # timm's 7x7 stem has 64 channels at any width: build a deep one, put a 7x7 in its place.
    model = timm.create_model(name, num_classes=0, stem_type="deep", **options)
    model.conv1 = nn.Conv2d(in_channels, model.bn1.num_features, 7, 2, 3, bias=False)  # type: ignore[arg-type, union-attr]
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _torchvision_model(name: str, in_channels: int, pretrained: bool) -> tuple[nn.Module, int]:
    import torchvision.models

    if pretrained and in_channels != 3:
        raise InputError(
            f"torchvision's `pretrained` weights need 3 channels; got {in_channels} for {name!r}. "
            "Name a timm model, or set one of the two."
        )
    auxiliary = name in ("googlenet", "inception_v3")  # these have more classifiers, to be dropped
    options = {"init_weights": True} if auxiliary and not pretrained else {}
    model: nn.Module = torchvision.models.get_model(
        name, weights="DEFAULT" if pretrained else None, **options
    )
    if auxiliary:
        model.aux_logits = False  # type: ignore[assignment]
        for head in {"aux1", "aux2", "AuxLogits"} & dict(model.named_children()).keys():
            setattr(model, head, None)
    linear_names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear_names:
        raise InputError(
            f"the encoder's last layer must be linear, to be removed; {name!r} has none. "
            "Choose another model, or pass your own `nn.Module`."
        )
    width = model.get_submodule(linear_names[-1]).in_features
    model.set_submodule(linear_names[-1], nn.Identity())
    if in_channels != 3:
        conv_name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        model.set_submodule(
            conv_name,
            nn.Conv2d(
                in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                bias=conv.bias is not None,
            ),
        )
    return model, int(width)  # type: ignore[arg-type]


def _shrink_stem(model: nn.Module, name: str, stride: int) -> None:
    stem = getattr(model, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise InputError(
            f"`small_stem` needs a ResNet with a 7x7 stem; {name!r} has none. "
            "Leave `small_stem` false."
        )
    model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


class ConvEncoder(nn.Sequential):
    """Four 3x3 convolutions with batch norm, ReLU and max-pool between: an encoder for small CPUs.

    Args:
        width: channels of the first layer; the next have 2, 4 and 8 times as many.
        in_channels: channels of the images.

    Attributes:
        num_features: the feature width E, 8 * width.
    """

    def __init__(self, width: int = 16, in_channels: int = 3) -> None:
        channels = [in_channels, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [
                nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(channels[i + 1]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2) if i < 3 else nn.AdaptiveAvgPool2d(1),
            ]
        super().__init__(*layers, nn.Flatten())
        self.num_features = channels[-1]


class Projector(nn.Sequential):
    """The projection head: an MLP with batch norm, as in the authors' code.

    Hidden layers are linear, batch norm, ReLU; the last one is linear without bias and batch norm
    without beta. The paper's text (section 2.1) has two layers and no batch norm; the authors' code
    (`model_util.projection_head`) has it after every layer, and three layers by default (SimCLRv2).

    Args:
        in_features: feature width E of the encoder; filled in by `SimCLR`.
        hidden_features: width of the hidden layers; by default that of the features.
        out_features: projection width D.
        layers: number of linear layers; 1 is a linear head.
        last_batch_norm: batch norm after the last layer.

    Raises:
        InputError: fewer than one layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int = 128,
        layers: int = 2,
        last_batch_norm: bool = True,
    ) -> None:
        if layers < 1:
            raise InputError(f"`projector.layers` must be >= 1; got {layers}. The paper uses 2.")
        hidden = hidden_features or in_features
        widths = [in_features] + [hidden] * (layers - 1) + [out_features]
        stack: list[nn.Module] = []
        for i in range(layers):
            stack.append(nn.Linear(widths[i], widths[i + 1], bias=False))
            if i < layers - 1:
                stack += [nn.BatchNorm1d(widths[i + 1]), nn.ReLU(inplace=True)]
        if last_batch_norm:
            norm = nn.BatchNorm1d(out_features)
            norm.bias.requires_grad_(False)  # stays 0: no beta
            stack.append(norm)
        super().__init__(*stack)


def feature_width(encoder: nn.Module) -> int:
    """The feature width E of an encoder.

    It is read from ``encoder.num_features``, else found by running black images through it.

    Raises:
        InputError: neither works, or the width depends on the size of the images.
    """
    width = getattr(encoder, "num_features", None)
    if isinstance(width, int):
        return width
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    channels = convs[0].in_channels if convs else 3
    modes = {module: module.training for module in encoder.modules()}
    try:
        with torch.no_grad():
            shapes = [encoder.eval()(torch.zeros(1, channels, s, s)).shape for s in (64, 96)]
        if shapes[0] == shapes[1] and len(shapes[0]) == 2:
            return int(shapes[0][1])
        received = f"outputs {tuple(shapes[0])} and {tuple(shapes[1])} for 64 and 96 pixels"
    except Exception as error:
        received = f"{type(error).__name__} for an image of 64 pixels"
    finally:
        for module, mode in modes.items():  # not `train()`: frozen layers stay in evaluation mode
            module.training = mode
    raise InputError(
        f"an encoder must map (n, C, H, W) to features (n, E); got {received}. "
        "Give the encoder an integer attribute `num_features`."
    )
