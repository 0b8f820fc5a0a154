"""The transformer of texts: padding changes nothing, dropout makes views, wrong input is told."""

import copy
from types import SimpleNamespace

import pytest
import torch

from simclr_pl import InputError, Projector, TextEncoder
from simclr_pl.chunks import encode_in_chunks
from simclr_pl.models import feature_width


def encoder(**options: object) -> TextEncoder:
    torch.manual_seed(0)
    defaults = {"vocab_size": 30, "width": 16, "depth": 2, "heads": 2, "max_length": 48}
    return TextEncoder(**{**defaults, **options})  # type: ignore[arg-type]


def tokens(rows: int = 5, length: int = 16) -> torch.Tensor:
    """Rows of 1, 4, 7, ... tokens and padding."""
    views = torch.randint(1, 31, (rows, length), generator=torch.Generator().manual_seed(1))
    count = torch.arange(1, 3 * rows, 3)[:rows, None]
    return views.where(torch.arange(length) < count, 0)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_padding_changes_no_feature(pooling: str) -> None:
    model = encoder(pooling=pooling).eval()
    views = tokens()
    features = model(views)
    assert features.shape == (5, 16)
    padded = model(torch.cat([views, torch.zeros(5, 27, dtype=torch.int64)], 1))
    alone = torch.cat([model(row[row != 0][None]) for row in views])
    torch.testing.assert_close(padded, features, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, features, rtol=0, atol=1e-6)


def test_attention_is_that_of_torchs_own_layer() -> None:
    model = encoder(depth=1, dropout=0.0).eval().double()
    ours = model.layers[0]
    theirs = torch.nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    names = {"mix": "self_attn.in_proj_", "merge": "self_attn.out_proj.", "norm_1": "norm1."}
    names |= {"norm_2": "norm2.", "think.0": "linear1.", "think.2": "linear2."}
    state = {
        names[name.rpartition(".")[0]] + name.rpartition(".")[2]: value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    h = torch.randn(5, 16, 16, dtype=torch.float64)
    real = tokens() != 0
    expected = theirs(h, src_key_padding_mask=~real)
    assert torch.allclose(ours(h, real[:, None, None])[real], expected[real], rtol=0, atol=1e-12)


def test_a_row_of_padding_alone_is_a_number_forward_and_backward() -> None:
    model = encoder()
    views = torch.cat([tokens(3), torch.zeros(1, 16, dtype=torch.int64)])
    features = model(views)
    features.square().sum().backward()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not model.tokens.weight.grad[0].any()


def test_dropout_makes_two_views_of_the_same_tokens_in_training_alone() -> None:
    model = encoder(dropout=0.1)
    views = tokens().repeat(2, 1)
    first, second = model(views).split(5)
    assert (first - second).abs().amin(1).max() > 1e-4
    first, second = model.eval()(views).split(5)
    assert torch.equal(first, second)


def test_chunks_give_the_gradients_of_the_whole_with_the_same_dropout() -> None:
    model = encoder(dropout=0.0).double()
    head = Projector(
        16, hidden_features=8, out_features=4, layers=1, last_batch_norm=False
    ).double()
    views = tokens(7)
    grads = []
    for chunk in (None, 3):
        copied = copy.deepcopy(torch.nn.ModuleList([model, head]))

        def encode(x: torch.Tensor, parts: torch.nn.ModuleList = copied) -> tuple:
            h = parts[0](x)
            return h, parts[1](h)

        _, z = encode_in_chunks(encode, views, chunk, copied)
        z.square().sum().backward()
        grads.append([p.grad for p in copied.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_whole(dtype: torch.dtype) -> None:
    model = encoder().eval()
    whole = model(tokens())
    with torch.autocast("cpu", dtype):
        half = model(tokens())
    assert half.isfinite().all()
    assert torch.allclose(half.float(), whole, rtol=0, atol=0.1)


def test_it_compiles_once_for_all_lengths() -> None:
    model = encoder().eval()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for length in (16, 48):
        views = tokens(4, length)
        torch.testing.assert_close(compiled(views), model(views), rtol=0, atol=1e-6)


def test_what_it_cannot_take_is_an_error() -> None:
    model = encoder()
    assert feature_width(model) == 16
    for views in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 16), tokens(2, 49)):
        with pytest.raises(
            InputError, match=r"takes \(n, L\) token numbers with L <= `max_length` 48"
        ):
            model(views)
    with pytest.raises(InputError, match="got 30 for 31"):
        model.check_source(SimpleNamespace(vocab_size=31))
    assert model.check_source(SimpleNamespace(vocab_size=30)) is None
    assert model.check_source(SimpleNamespace()) is None
    with pytest.raises(InputError, match="`width` must divide by `heads`; got 16 and 3"):
        encoder(heads=3)
    with pytest.raises(InputError, match="`depth` must be >= 1"):
        encoder(depth=0)
    with pytest.raises(InputError, match="`dropout` must be"):
        encoder(dropout=1.0)
