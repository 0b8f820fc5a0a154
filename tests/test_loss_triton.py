"""The GPU path of the loss: in Triton's interpreter, through its compiler, and on a GPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_pl import losses
from simclr_pl.loss_tiles import PairTiles, RowSums
from simclr_pl.losses import Statistics, nt_xent

Run = Callable[..., Any]
SHAPES = [(2, 3, 7), (2, 17, 16), (2, 65, 128), (3, 2, 16), (3, 11, 7), (3, 43, 128)]  # V, B, D


def rows_of_two_ranks(shape: tuple[int, int, int]) -> tuple[Tensor, int]:
    """Rows v (2 n, D) in float32, at temperature 0.2, and n."""
    n_views, n_images, width = shape
    u = torch.randn(2 * n_views * n_images, width) + 0.3 * torch.randn(width)
    return u / u.norm(dim=1, keepdim=True) * (1.4427 / 0.2) ** 0.5, n_views * n_images


def brute_force(every: Tensor, first: int, n: int, n_images: int) -> tuple[Tensor, Tensor]:
    """E and log2 E of the negatives of rows [first, first + n), pair by pair; 0 elsewhere."""
    s = every.double() @ every.double().t()
    for i in range(first, first + n):
        for j in range(first, first + n):
            if (i - j) % n_images == 0:
                s[i, j] = -torch.inf
    s = s[first : first + n]
    return s.exp2(), s.masked_fill(s == -torch.inf, 0)


def sums_and_rows(
    engine: type[Any], every: Tensor, first: int, n: int, n_images: int, r: Tensor
) -> tuple[RowSums, RowSums, Tensor]:
    pairs = engine(every[first : first + n], every, first, n_images, None, 64)
    plain, full = pairs.row_sums(False), pairs.row_sums(True)
    return plain, full, pairs.weighted_rows(r[first : first + n], r, None)


def of_kernels(*case: Any) -> tuple[RowSums, RowSums, Tensor]:
    from simclr_pl.loss_triton import PairKernels, sum_rows

    assert type(sum_rows).__name__ == "InterpretedFunction"
    return sums_and_rows(PairKernels, *case)


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_brute_force_float64_and_tiles(
    interpreted: Run, shape: tuple[int, int, int], rank: int
) -> None:
    every, n = rows_of_two_ranks(shape)
    r = torch.rand(len(every))
    case = (every, rank * n, n, shape[1], r)
    plain, full, g = interpreted(of_kernels, *case)
    e, s = brute_force(every, rank * n, n, shape[1])
    assert plain[4:] == (None, None, None)
    torch.testing.assert_close(plain[:4], full[:4], rtol=0, atol=0)
    assert_near(full.negative, e.sum(1))
    assert_near(full.largest_negative, e.amax(1))
    weights = e * (r[rank * n : (rank + 1) * n, None] + r).double()
    assert_near(g, weights @ every.double())
    tiles_plain, tiles, tiles_g = sums_and_rows(PairTiles, *case)
    assert_near(g, tiles_g)
    for field, of_tiles in zip((*plain[:4], *full), (*tiles_plain[:4], *tiles), strict=True):
        assert_near(field, of_tiles)
    # `spread` has both signs in it: its error is measured against the sum of magnitudes.
    views = every[rank * n : (rank + 1) * n].double().view(shape)
    s_positive = torch.einsum("abd,cbd->acb", views, views)  # (V, V, B)
    s_positive = s_positive[~torch.eye(shape[0], dtype=torch.bool)].view(shape[0], -1, shape[1])
    spread = (e * s).sum(1) + (s_positive.exp2() * s_positive).sum(1).flatten()
    size = (e * s.abs()).sum(1) + (s_positive.exp2() * s_positive.abs()).sum(1).flatten()
    assert (full.spread - spread).norm() <= 2e-6 * size.norm()


def test_a_row_alone_has_no_negatives(interpreted: Run) -> None:
    every = torch.randn(2, 7)
    _, full, g = interpreted(of_kernels, every, 0, 2, 1, torch.ones(2))
    assert full.negative.eq(0).all()
    assert full.largest_negative.eq(0).all()
    assert g.eq(0).all()


def test_sums_over_many_like_rows_keep_their_digits(interpreted: Run) -> None:
    every = torch.randn(16).expand(20_000, 16) + 0.1 * torch.randn(20_000, 16)
    every = every / every.norm(dim=1, keepdim=True)
    _, _, g = interpreted(of_kernels, every, 0, 2, 1, torch.ones(len(every)))
    e, _ = brute_force(every[:2], 0, 2, 1)
    e = torch.cat([e, (every[:2].double() @ every[2:].double().t()).exp2()], 1)
    # 2.5e-8 here; 2.6e-7 without the compensation, 8e-7 with its sign turned.
    assert_near(g, 2 * e @ every.double(), 1e-7)


def nt_xent_of_kernels(z: Tensor, variant: dict[str, str]) -> tuple[Tensor, Tensor, Statistics]:
    from simclr_pl.loss_triton import PairKernels

    losses._engine_for = lambda own, ids: PairKernels  # in the interpreting process only
    return value_gradient_statistics(z, 0.2, **variant)


def value_gradient_statistics(
    z: Tensor, temperature: float, **variant: Any
) -> tuple[Tensor, Tensor, Statistics]:
    z = z.detach().requires_grad_()
    statistics: list[Statistics] = []
    loss = nt_xent(z, temperature=temperature, statistics=statistics, **variant)
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad, statistics[0]


VARIANTS: list[dict[str, str]] = [
    {},
    {"denominator": "negatives"},
    {"denominator": "both_negatives", "similarity": "euclidean"},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nt_xent_through_kernels_matches_float64(
    interpreted: Run, shape: tuple[int, int, int], variant: dict[str, str]
) -> None:
    z = torch.randn(shape)
    value, gradient, statistics = interpreted(nt_xent_of_kernels, z, variant)
    expected = value_gradient_statistics(z.double(), 0.2, **variant)
    assert_near(value, expected[0])
    assert_near(gradient, expected[1])
    torch.testing.assert_close(
        torch.stack(statistics).double(), torch.stack(expected[2]), rtol=1e-5, atol=1e-6
    )


# Triton's compiler needs no GPU, only the target's name.

POINTERS = {"own", "everything", "negative", "largest", "spread", "own_r", "every_r", "g"}


def compile_for(capability: int, tuned: Any, config: Any, constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = tuned.fn.arg_names
    options = config.all_kwargs()
    constants = constants | {name: options.pop(name) for name in names if name in options}
    kinds = {name: "*fp32" if name in POINTERS else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS}
    source = ASTSource(tuned.fn, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("capability", "width"), [(80, 128), (90, 7), (90, 256)])
def test_kernels_compile_without_tensor_cores_and_fit(
    capability: int, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton comes with torch for some systems only")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from simclr_pl import loss_triton

    padded = {7: 16, 128: 128, 256: 256}[width]
    for tuned, constants in [
        (loss_triton._tuned_sum_rows, {"statistics": True}),
        (loss_triton._tuned_sum_rows, {"statistics": False, "largest": None, "spread": None}),
        (loss_triton._tuned_weigh_rows, {"padded_width": padded}),
    ]:
        for config in tuned.configs:
            compiled = compile_for(capability, tuned, config, {"width": width} | constants)
            assert "fma.rn.f32" in compiled.asm["ptx"]
            assert "mma" not in compiled.asm["ptx"]  # the tensor cores round float32 to TF32
            assert compiled.metadata.shared <= 96 * 1024  # bytes; of 163 KiB and 227 KiB


def test_importing_losses_and_views_imports_no_triton() -> None:
    code = "import sys, simclr_pl.losses, simclr_pl.augment; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tiles_serve_where_triton_is_missing() -> None:
    code = "import sys; sys.modules['triton'] = None; import torch, simclr_pl.losses as l; "
    code += "assert l.nt_xent(torch.randn(2, 3, 4)) > 0"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tiles_serve_what_kernels_do_not() -> None:
    rows = torch.randn(4, 3)
    assert losses._engine_for(rows, None) is PairTiles
    assert losses._engine_for(rows.double(), None) is PairTiles


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent_on_a_gpu_matches_float64_and_repeats_itself(temperature: float) -> None:
    z = torch.randn(2, 1000, 128)
    on_gpu = z.cuda()
    assert losses._engine_for(on_gpu.flatten(0, 1), None) is not PairTiles
    value, gradient, _ = value_gradient_statistics(on_gpu, temperature)
    again = value_gradient_statistics(on_gpu, temperature)
    assert torch.equal(value, again[0])
    assert torch.equal(gradient, again[1])
    expected = value_gradient_statistics(z.double(), temperature)
    assert_near(value.cpu(), expected[0], 3e-6)
    assert_near(gradient.cpu(), expected[1], 3e-6)


@needs_gpu
def test_ids_wide_rows_and_float64_on_a_gpu_take_the_tiles() -> None:
    rows = torch.randn(4, 257, device="cuda")
    assert losses._engine_for(rows, None) is PairTiles
    assert losses._engine_for(rows[:, :8].double(), None) is PairTiles
    assert losses._engine_for(rows[:, :8], torch.arange(4, device="cuda")) is PairTiles
