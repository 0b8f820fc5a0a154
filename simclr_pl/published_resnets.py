"""ResNets whose graph differs from timm's: the authors' own, solo-learn's and lightly's.

Symbols: n images, C channels, H x W pixels, E feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_pl.errors import InputError
from simclr_pl.models import Encoder

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class SimCLRResNet(nn.Module):
    """The ResNets of google-research/simclr, to the pixel: those of SimCLR and SimCLRv2.

    They differ from timm's and torchvision's in the pool after the stem, which TensorFlow pads on the
    right and below only, and with selective kernels in the shortcuts' pool and in the kernels
    themselves. The tensors have torchvision's names where both have them. Layers are registered in the
    order in which the authors' code creates them, which numbers TensorFlow's variables.

    Args:
        depth: layers: 18, 34, 50, 101, 152 or 200.
        width: multiplies the channels of every layer; the published models have 1, 2, 3 and 4.
        sk_ratio: above 0, selective kernels and the ResNet-D stem and shortcuts, as in SimCLRv2, which
            sets 0.0625: the width of a kernel's attention as a part of its channels, at least 32.
        small_stem: a 3x3 convolution of stride 1 and no pool, for images of 32 pixels.
        in_channels: channels of the images.

    Attributes:
        num_features: the feature width E.

    Raises:
        InputError: the depth is none of these, or a number is out of range.

    Source: resnet.py of google-research/simclr (the TF2 code; for selective kernels at depth 18 and 34,
    where it and the TF1 code differ, there is nothing published and no support here).
    """

    def __init__(
        self,
        depth: int = 50,
        width: int = 1,
        sk_ratio: float = 0.0,
        small_stem: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check(depth, width, sk_ratio)
        channels = 64 * width
        self.conv1 = _stem(in_channels, channels, sk_ratio > 0 and not small_stem, small_stem)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.Identity() if small_stem else _SameMaxPool()
        c_in = channels
        for stage, count in enumerate(BLOCKS[depth]):
            blocks: list[nn.Module] = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                if depth < 50:
                    block: _Block = _Basic(c_in, channels, stride, first=i == 0)
                else:
                    block = _Bottleneck(c_in, channels, stride, first=i == 0, sk_ratio=sk_ratio)
                blocks.append(block)
                c_in = block.width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels *= 2
        self.num_features = c_in
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, C, H, W), by default in [0, 1], to features (n, E)."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(stage)(x)
        return x.mean((2, 3))


def _check(depth: int, width: int, sk_ratio: float) -> None:
    if depth not in BLOCKS:
        raise InputError(
            f"`depth` must be one of {', '.join(map(str, BLOCKS))}; got {depth}. Set `encoder.depth`."
        )
    if width < 1:
        raise InputError(f"`width` must be >= 1; got {width}. Set `encoder.width`.")
    if not 0 <= sk_ratio <= 1:
        raise InputError(f"`sk_ratio` must be in [0, 1]; got {sk_ratio}. Set `encoder.sk_ratio`.")
    if sk_ratio > 0 and depth < 50:
        raise InputError(
            f"`sk_ratio` above 0 needs `depth` 50 or more; got {depth}. Set `encoder.depth`."
        )


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # tf.keras.initializers.VarianceScaling()
            std = module.weight[0].numel() ** -0.5 / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, _Block):
            nn.init.zeros_(module.last_norm().weight)


def _conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    # Padded alike on both sides, as the authors' fixed padding is.
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)


def _stem(c_in: int, c_out: int, deep: bool, small: bool) -> nn.Module:
    if not deep:
        return _conv(c_in, c_out, 3) if small else _conv(c_in, c_out, 7, 2)
    half = c_out // 2
    return nn.Sequential(
        _conv(c_in, half, 3, 2),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        _conv(half, half, 3),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        _conv(half, c_out, 3),
    )


class _SameMaxPool(nn.Module):
    """3x3, stride 2, padded as TensorFlow's SAME: an even side on the right or below only."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return F.max_pool2d(x, 3, 2, (height % 2, width % 2), ceil_mode=True)


class _ShortcutPool(nn.Module):
    """2x2 mean: with stride 2 an odd side gets a zero, with stride 1 the last one stands for its like."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        mode = "constant" if self.stride == 2 else "replicate"
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode), 2, self.stride)


class _SelectiveKernels(nn.Module):
    """Two 3x3 streams, mixed for each channel by attention (arXiv:1903.06586, as the authors have it)."""

    def __init__(self, c_in: int, channels: int, stride: int, sk_ratio: float) -> None:
        super().__init__()
        middle = max(int(channels * sk_ratio), 32)
        self.conv = _conv(c_in, 2 * channels, 3, stride)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.reduce = _conv(channels, middle, 1)
        self.reduce_bn = nn.BatchNorm2d(middle)
        self.expand = _conv(middle, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack(F.relu(self.bn(self.conv(x))).chunk(2, 1))  # (2, n, C, H, W)
        pooled = streams.sum(0).mean((2, 3), keepdim=True)
        mixing = self.expand(F.relu(self.reduce_bn(self.reduce(pooled))))
        return (streams * torch.stack(mixing.chunk(2, 1)).softmax(0)).sum(0)


class _Block(nn.Module):
    """What the two kinds of residual blocks share: the shortcut, which comes first."""

    def __init__(self, c_in: int, width: int, stride: int, first: bool, pool: bool) -> None:
        super().__init__()
        self.width = width
        self.downsample: nn.Module = nn.Identity()
        if first:
            layers = [_conv(c_in, width, 1, 1 if pool else stride), nn.BatchNorm2d(width)]
            self.downsample = nn.Sequential(*([_ShortcutPool(stride)] if pool else []), *layers)

    def last_norm(self) -> nn.BatchNorm2d:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)][-1]


class _Basic(_Block):
    def __init__(self, c_in: int, channels: int, stride: int, first: bool) -> None:
        super().__init__(c_in, channels, stride, first, pool=False)
        self.conv1, self.bn1 = _conv(c_in, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class _Bottleneck(_Block):
    def __init__(self, c_in: int, channels: int, stride: int, first: bool, sk_ratio: float) -> None:
        super().__init__(c_in, 4 * channels, stride, first, pool=sk_ratio > 0)
        self.conv1, self.bn1 = _conv(c_in, channels, 1), nn.BatchNorm2d(channels)
        if sk_ratio > 0:
            self.conv2: nn.Module = _SelectiveKernels(channels, channels, stride, sk_ratio)
            self.bn2: nn.Module | None = None
        else:
            self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, self.width, 1), nn.BatchNorm2d(self.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        if self.bn2 is not None:
            y = F.relu(self.bn2(y))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class SmallStemResNet(Encoder):
    """ResNets with a 3x3 stem of stride 1 and no pool, as solo-learn and lightly's examples have them.

    Their tensors have the shapes of an `Encoder` with ``small_stem``; their features are others.

    Args:
        name: of timm, such as "resnet18".
        padding: of the stem in pixels; solo-learn has 2 for CIFAR.
        relu: after the stem; lightly's examples lose it, since they make a Sequential of the modules of a
            ResNet whose ReLU is a function.
        width: multiplies the channels of every layer.
        in_channels: channels of the images.

    Attributes:
        num_features: the feature width E.
    """

    def __init__(
        self,
        name: str = "resnet18",
        padding: int = 1,
        relu: bool = True,
        width: float = 1.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__(name, small_stem=True, width=width, in_channels=in_channels)
        self.model.conv1.padding = (padding, padding)  # type: ignore[union-attr, assignment]
        if not relu:
            self.model.act1 = nn.Identity()
