"""ResNets of the authors' graph against plain sums, and against timm where the two agree."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.errors import InputError
from simclr_pl.models import Encoder
from simclr_pl.published_resnets import (
    SimCLRResNet,
    SmallStemResNet,
    _SameMaxPool,
    _ShortcutPool,
)


def test_parameters_are_those_of_table_1_of_simclrv2() -> None:
    table = {(50, 1, 0.0): 24, (50, 1, 0.0625): 35, (50, 2, 0.0625): 140, (152, 3, 0.0625): 795}
    for (depth, width, sk_ratio), millions in table.items():
        with torch.device("meta"):
            model = SimCLRResNet(depth, width, sk_ratio)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
        assert model.num_features == 2048 * width


def same_max_pool(x: np.ndarray) -> np.ndarray:
    """TensorFlow's SAME: the padding that is needed, its larger half on the right and below."""
    n = x.shape[0]
    out = -(-n // 2)
    total = max((out - 1) * 2 + 3 - n, 0)
    padded = np.pad(x, (total // 2, total - total // 2), constant_values=-np.inf)
    windows = [
        [padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max() for j in range(out)] for i in range(out)
    ]
    return np.array(windows)


@pytest.mark.parametrize("size", [4, 5, 8, 9])
def test_the_pool_is_tensorflows_same(size: int) -> None:
    x = torch.rand(1, 1, size, size)
    np.testing.assert_array_equal(_SameMaxPool()(x)[0, 0].numpy(), same_max_pool(x[0, 0].numpy()))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcuts_mean_counts_zeros_at_stride_2_and_pixels_at_stride_1(
    size: int, stride: int
) -> None:
    x = torch.rand(1, 1, size, size)[0, 0]

    def mean(i: int, j: int) -> Tensor:
        window = x[i : i + 2, j : j + 2]
        return window.sum() / 4 if stride == 2 else window.mean()

    places = range(0, size, stride)
    expected = torch.tensor([[mean(i, j) for j in places] for i in places])
    torch.testing.assert_close(_ShortcutPool(stride)(x[None, None])[0, 0], expected)


def test_at_depth_50_only_the_pool_differs_from_timm() -> None:
    ours = SimCLRResNet(50).eval()
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(ours(x), theirs(x), atol=1e-3)
    theirs.maxpool = _SameMaxPool()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_at_depth_18_the_first_stage_has_a_shortcut_of_its_own() -> None:
    names = SimCLRResNet(18, small_stem=True).state_dict().keys()
    theirs = Encoder("timm/resnet18", small_stem=True).model.state_dict().keys()
    assert {name for name in names ^ theirs if "layer1.0.downsample" not in name} == set()
    assert len(names) == len(theirs) + 6


def randomise(model: torch.nn.Module) -> None:
    """Else the last batch norm of each block, which starts at zero, hides the block."""
    for value in model.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.0)


def test_a_block_starts_as_its_shortcut() -> None:
    block = SimCLRResNet(18, small_stem=True).layer1[1].eval()  # type: ignore[index, union-attr]
    x = torch.rand(1, 64, 4, 4)
    assert torch.equal(block(x), x)


def test_selective_kernels_mix_two_streams_by_attention() -> None:
    model = SimCLRResNet(50, sk_ratio=0.0625)
    kernels = model.layer1[0].conv2.eval()  # type: ignore[index, union-attr]
    assert kernels.reduce.out_channels == 32  # the least: 64 / 16 is less
    x = torch.rand(1, 64, 4, 4)
    a, b = F.relu(kernels.bn(kernels.conv(x))).split(64, 1)
    pooled = (a + b).mean((2, 3), keepdim=True)
    logits = kernels.expand(F.relu(kernels.reduce_bn(kernels.reduce(pooled))))
    share = torch.sigmoid(logits[:, :64] - logits[:, 64:])
    torch.testing.assert_close(kernels(x), share * a + (1 - share) * b)


def test_solo_learns_stem_is_padded_by_two() -> None:
    model = SmallStemResNet("resnet18", padding=2).eval()
    assert model.model.conv1(torch.rand(1, 3, 32, 32)).shape == (1, 64, 34, 34)  # type: ignore[operator]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "`depth` must be one of 18, 34, 50, 101, 152, 200; got 20"),
        ({"width": 0}, "`width` must be >= 1; got 0"),
        ({"sk_ratio": -1.0}, r"`sk_ratio` must be in \[0, 1\]; got -1.0"),
        ({"depth": 18, "sk_ratio": 0.1}, "needs `depth` 50 or more; got 18"),
    ],
)
def test_a_mistake_is_said(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimCLRResNet(**options)  # type: ignore[arg-type]
