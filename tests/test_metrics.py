"""Measures of features and scores against their formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import binomtest, entropy
from torch import Tensor

from simclr_pl.losses import Statistics, nt_xent
from simclr_pl.metrics import (
    alignment,
    contrastive_top1,
    deviation,
    rank_me,
    similarity_histograms,
    uniformity,
    wilson_interval,
)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("correct", "total"), [(0, 7), (3, 7), (7, 7), (880, 1000)])
def test_interval_equals_scipy_wilson(correct: int, total: int, confidence: float) -> None:
    expected = binomtest(correct, total).proportion_ci(confidence, "wilson")
    found = wilson_interval(correct, total, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


# Features: oracles in float64, after the papers' formulas.


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    """Uneven scales, a common offset and a spectrum that falls."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64)
    offset = torch.randn(width, generator=g, dtype=torch.float64)
    return x * torch.linspace(0, -5, width, dtype=torch.float64).exp() + 0.3 * offset


def unit(x: Tensor) -> np.ndarray:
    return (x / x.norm(dim=1, keepdim=True)).numpy()


def images(n_views: int, n_images: int, width: int) -> Tensor:
    """(V, B, D) float64, views of an image near each other."""
    return rows(n_images, width) + 0.3 * torch.stack(
        [rows(n_images, width, 1 + view) for view in range(n_views)]
    )


@pytest.mark.parametrize(("n", "width"), [(40, 7), (7, 40), (1, 3), (33, 33)])
def test_rank_me_equals_the_papers_formula_in_float64(n: int, width: int) -> None:
    x = rows(n, width)
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    expected = math.exp(-sum(q * math.log(q) for q in p))
    found = rank_me(x)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, abs=1e-8)
    assert float(rank_me(x.float())) == pytest.approx(expected, rel=1e-6)
    assert float(found) == pytest.approx(math.exp(entropy(sigma)), rel=1e-4)  # of scipy: no epsilon


def test_rank_me_counts_dimensions_that_are_filled_evenly() -> None:
    x = torch.zeros(10, 6)
    x[torch.arange(10), torch.arange(10) % 5] = 1.0  # each of 5 axes twice
    assert float(rank_me(x)) == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rank_me_of_a_point_is_one(dtype: torch.dtype) -> None:
    point = torch.randn(1, 64).expand(50, 64).to(dtype)
    assert float(rank_me(point)) == pytest.approx(1, abs=1e-3)
    assert float(rank_me(torch.zeros(50, 64, dtype=dtype))) == pytest.approx(1, abs=1e-3)


def test_rank_me_of_a_line_is_at_most_two_however_small_its_offset() -> None:
    line = torch.randn(500, 1) * torch.randn(1, 256)
    assert float(rank_me(line)) == pytest.approx(1, abs=2e-3)
    for offset in (1e-3, 1.0, 1e3):
        assert float(rank_me(line + offset * torch.randn(1, 256))) < 2.01


def test_rank_me_of_features_that_are_not_finite_is_nan() -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.randn(5, 4)
        x[2, 1] = bad
        assert rank_me(x).isnan()


def test_deviation_equals_numpy() -> None:
    x = rows(23, 9)
    expected = unit(x).std(0).mean() * math.sqrt(9)
    assert float(deviation(x)) == pytest.approx(expected, abs=1e-12)
    assert float(deviation(x.float())) == pytest.approx(expected, rel=1e-5)


def test_deviation_is_one_on_the_whole_sphere_and_zero_at_a_point() -> None:
    axes = torch.cat([torch.eye(6), -torch.eye(6)]) * torch.rand(12, 1)
    assert float(deviation(axes)) == pytest.approx(1, abs=1e-6)
    assert float(deviation(torch.randn(1, 6).expand(12, 6))) == pytest.approx(0, abs=1e-6)
    assert float(deviation(torch.zeros(12, 6))) == 0


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_alignment_equals_a_loop(alpha: float) -> None:
    x, y = images(2, 11, 5)
    pairs = zip(unit(x), unit(y), strict=True)
    expected = sum(np.linalg.norm(a - b) ** alpha for a, b in pairs) / 11
    assert float(alignment(x, y, alpha)) == pytest.approx(expected, abs=1e-12)
    assert float(alignment(x.float(), y.float(), alpha)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("t", [2, 0.5])
def test_uniformity_equals_scipys_distances(t: float) -> None:
    x = rows(31, 6)
    expected = math.log(np.exp(-t * pdist(unit(x)) ** 2).mean())
    assert float(uniformity(x, t)) == pytest.approx(expected, abs=1e-12)
    assert float(uniformity(x.float(), t)) == pytest.approx(expected, rel=1e-5)


def test_uniformity_at_its_ends() -> None:
    assert float(uniformity(torch.randn(1, 6).expand(12, 6))) == pytest.approx(0, abs=1e-5)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])  # at distance 2
    assert float(uniformity(opposite, t=100)) == pytest.approx(-400)  # its exp is 0 in float32
    assert uniformity(torch.randn(1, 6)).isnan()


@pytest.mark.parametrize(
    ("n_views", "n_images", "width"), [(2, 13, 4), (3, 5, 4), (2, 1, 4), (2, 700, 40)]
)
def test_top1_equals_a_loop_and_the_losses(n_views: int, n_images: int, width: int) -> None:
    z = images(n_views, n_images, width)
    cosine = unit(z.flatten(0, 1)) @ unit(z.flatten(0, 1)).T
    np.fill_diagonal(cosine, -np.inf)
    image = np.arange(n_views * n_images) % n_images
    expected = float((image[cosine.argmax(1)] == image).mean())
    assert 0.2 < expected < 1 or n_images == 1
    assert float(contrastive_top1(z)) == pytest.approx(expected, abs=1e-12)
    statistics: list[Statistics] = []
    nt_xent(z, statistics=statistics)
    assert float(statistics[0].top1) == pytest.approx(expected, abs=1e-12)


def test_top1_of_a_point_is_zero() -> None:
    assert float(contrastive_top1(torch.ones(2, 6, 3))) == 0


@pytest.mark.parametrize(("n_views", "n_images"), [(2, 13), (3, 5), (2, 700)])
@pytest.mark.parametrize("bins", [1, 7, 100])
def test_histograms_equal_numpys(n_views: int, n_images: int, bins: int) -> None:
    z = images(n_views, n_images, 4)
    n = n_views * n_images
    cosine = unit(z.flatten(0, 1)) @ unit(z.flatten(0, 1)).T
    first, second = np.triu_indices(n, 1)
    positive = first % n_images == second % n_images
    values = cosine[first, second].clip(-1, 1)
    found = similarity_histograms(z, bins)
    for counts, kind in ((found.positive, positive), (found.negative, ~positive)):
        expected, _ = np.histogram(values[kind], bins, (-1, 1))
        assert counts.dtype == torch.int64
        # a cosine on an edge may fall on either side of it
        assert np.abs(counts.numpy() - expected).sum() <= 2
        assert counts.sum() == kind.sum()


def test_histograms_hold_both_ends_and_leave_out_what_has_no_cosine() -> None:
    z = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]], [[3.0, 0.0], [torch.nan, 0.0]]])
    found = similarity_histograms(z, 4)
    assert found.positive.tolist() == [0, 0, 0, 1]  # the pair of image 0
    assert found.negative.tolist() == [2, 0, 0, 0]  # both views of image 0 with view 0 of image 1


def test_autocast_changes_no_measure() -> None:
    z = images(2, 40, 16).float()

    def everything() -> list[Tensor]:
        scalars = [rank_me(z[0]), deviation(z[0]), alignment(*z), uniformity(z[0])]
        return [*scalars, contrastive_top1(z), *similarity_histograms(z)]

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = everything()
    for a, b in zip(plain, mixed, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_narrow_rows_are_measured_in_float32() -> None:
    z = images(2, 40, 16).bfloat16()
    for measure in (rank_me, deviation, uniformity):
        assert measure(z[0]).dtype == torch.float32
        assert torch.equal(measure(z[0]), measure(z[0].float()))
    assert torch.equal(contrastive_top1(z), contrastive_top1(z.float()))
    assert torch.equal(similarity_histograms(z).negative, similarity_histograms(z.float()).negative)
