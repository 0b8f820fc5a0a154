"""Encoder and head: the kept layers of the projector, and the layers' rates."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from simclr_pl import ConvEncoder, Encoder, InputError, Projector
from simclr_pl.evaluation.classifier import Classifier, encoder_layers, kept_layers, rates_by_depth


def projector() -> Projector:
    torch.manual_seed(1)
    made = Projector(32, hidden_features=12, out_features=6, layers=3)
    for module in made:
        if isinstance(module, nn.BatchNorm1d):  # statistics that a forgotten norm would show
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_the_head_sits_on_the_kept_layers_of_the_projector(layers: int) -> None:
    encoder, head = ConvEncoder(4, in_channels=1), projector()
    model = Classifier(encoder, 5, head, layers).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    x = torch.randn(3, 1, 32, 32)
    h = encoder(x)
    linear, norms = [head[0], head[3], head[6]], [head[1], head[4], head[7]]
    for i in range(layers):  # by hand: x W^T, the norm's formula, ReLU below the last layer
        h = h @ linear[i].weight.T
        n = norms[i]
        h = (h - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias
        h = h.clamp(min=0) if i < 2 else h
    expected = h @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.head.in_features == [32, 12, 12, 6][layers]
    assert len(model.projector) == [0, 3, 6, 8][layers]


def test_the_head_starts_at_zero_on_the_given_encoder() -> None:
    encoder = ConvEncoder(4)
    model = Classifier(encoder, 7)
    assert model.encoder is encoder
    assert not model(torch.randn(2, 3, 32, 32)).any()
    assert Classifier(encoder, 7, zero_head=False)(torch.randn(2, 3, 32, 32)).all()


@pytest.mark.parametrize(
    ("head", "layers"), [(None, 1), (nn.Identity(), 1), ("own", 4), ("own", -1)]
)
def test_layers_that_the_projector_has_not_are_an_error(
    head: nn.Module | str | None, layers: int
) -> None:
    given = projector() if head == "own" else head
    with pytest.raises(InputError, match=rf"`projector_layers` must be within .* got {layers}\."):
        kept_layers(given, layers)  # type: ignore[arg-type]


def rates(model: Classifier, decay: float) -> dict[str, float]:
    """The rate of each parameter by name, from an optimiser; each once."""
    name = {id(p): n for n, p in model.named_parameters()}
    solver = SGD(rates_by_depth(model, 0.5, decay), lr=9.0)
    pairs = [(name[id(p)], group["lr"]) for group in solver.param_groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_rates_shrink_by_the_factor_from_layer_to_layer() -> None:
    model = Classifier(ConvEncoder(4), 5, projector(), 2)
    depth = {"head": 0, "projector.3": 1, "projector.4": 1, "projector.0": 2, "projector.1": 2}
    for i, children in enumerate(["12", "8", "4", "0"]):  # the four convolutions, last to first
        depth |= {f"encoder.{children}": 3 + i, f"encoder.{int(children) + 1}": 3 + i}
    found = rates(model, 0.7)
    assert found.keys() == {n for n, _ in model.named_parameters()}
    for name, rate in found.items():
        assert rate == pytest.approx(0.5 * 0.7 ** depth[name.rpartition(".")[0]]), name


def test_without_decay_all_rates_are_the_same() -> None:
    model = Classifier(ConvEncoder(4), 5)
    assert set(rates(model, 1.0).values()) == {0.5}


@pytest.mark.parametrize(
    ("name", "first", "last", "layers"),
    [
        ("timm/resnet18", "conv1", "layer4.1.conv1", 9),  # the stem and eight blocks
        ("torchvision/resnet18", "conv1", "layer4.1.conv1", 5),  # the stem and four stages
        ("vit_tiny_patch16_224", "patch_embed.proj", "blocks.11.attn.qkv", 13),
    ],
)
def test_layers_of_library_encoders_are_in_their_order(
    name: str, first: str, last: str, layers: int
) -> None:
    model = Classifier(Encoder(name), 5)
    found = rates(model, 0.9)
    assert found.keys() == {n for n, _ in model.named_parameters()}
    lowest, highest = (found[f"encoder.model.{n}.weight"] for n in (first, last))
    assert lowest == min(found.values())
    assert highest > lowest
    assert len(encoder_layers(model.encoder)) >= layers
    assert found["head.weight"] == max(found.values()) == 0.5


def test_frozen_parameters_are_in_no_group() -> None:
    model = Classifier(ConvEncoder(4), 5, projector(), 3)
    assert not model.projector[7].bias.requires_grad
    model.encoder[0].requires_grad_(False)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert rates(model, 0.8).keys() == expected
    assert "encoder.0.weight" not in expected
