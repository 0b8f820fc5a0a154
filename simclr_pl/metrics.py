"""What features and scores are worth: pure functions.

Symbols: n rows, E feature width, B images, V views, N = V*B rows, D projection width.

Rows of any float dtype are measured in float32 at least, also under autocast; float64 stays float64.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # compared with all rows at a time: memory is _ROWS * N numbers


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share, by Wilson's score (1927, J. Am. Stat. Assoc. 22).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and 1.

    Args:
        correct: hits, of ``total``.
        total: trials, >= 1.
        confidence: that the interval covers the true share.

    Returns:
        Its lower and upper end.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - spread) / scale, (centre + spread) / scale


class Histograms(NamedTuple):
    """How often cosines fall into each of the equal bins over [-1, 1], (bins,) int64 each.

    Attributes:
        positive: of the pairs of views of one image.
        negative: of the pairs of rows of different images.
    """

    positive: Tensor
    negative: Tensor


def rank_me(features: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Effective rank: how many dimensions the rows fill (Garrido et al. 2023, arXiv:2210.02885, eq. 1).

    exp of the entropy of p_k = sigma_k / sum(sigma) + epsilon, with sigma the singular values of the
    rows as they are, neither centred nor normalised.

    Args:
        features: (n, E).
        epsilon: the paper's.

    Returns:
        Scalar from 1, a single direction, to min(n, E); NaN if a feature is not finite.
    """
    if not features.isfinite().all():  # LAPACK would raise
        return _wide(features).new_tensor(torch.nan)
    # From the smaller Gram matrix: at 512 x 2048 in a quarter of `svdvals`' time. In float64 its
    # rounding, sqrt(2e-16) of the largest sigma, stays below epsilon and below float32's own.
    x = features.double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # (min(n, E),)
    tiny = torch.finfo(sigma.dtype).tiny  # rows of zeros: a point, of rank 1
    p = sigma / sigma.sum().clamp(min=tiny) + epsilon
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank.to(_wide(features))


def deviation(features: Tensor) -> Tensor:
    """Spread of the directions (Chen and He 2021, arXiv:2011.10566, section 4.1).

    The standard deviation of each dimension of the L2-normalised rows, averaged, times sqrt(E).

    Args:
        features: (n, E).

    Returns:
        Scalar: 0 for constant rows, 1 for rows spread evenly over the sphere.
    """
    unit = _unit(features)
    return unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1])


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """How far positives are apart (Wang and Isola 2020, arXiv:2005.10242, section 4.1.1).

    Args:
        x: (n, D) one view of each image, in any scale; L2-normalised here.
        y: (n, D) another.
        alpha: power of the distance.

    Returns:
        Scalar: the mean of |x - y|^alpha, 0 where positives coincide, at most 2^alpha.
    """
    distance: Tensor = torch.linalg.vector_norm(_unit(x) - _unit(y), dim=1)
    return distance.pow(alpha).mean()


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """How evenly rows cover the sphere (Wang and Isola 2020, arXiv:2005.10242, section 4.1.2).

    log of the mean over the pairs i < j of exp(-t |x_i - x_j|^2).

    Args:
        x: (n, D) in any scale; L2-normalised here. Holds n * (n - 1) / 2 numbers.
        t: weight of the distance, > 0.

    Returns:
        Scalar: 0 for constant rows, less the more even they are; NaN for fewer than two rows.
    """
    exponents = -t * torch.pdist(_unit(x)).square()  # (pairs,)
    return exponents.logsumexp(0) - exponents.new_tensor(len(exponents)).log()


def contrastive_top1(projections: Tensor) -> Tensor:
    """Share of the rows whose nearest other row is a view of the same image.

    The same as ``top1`` of `simclr_pl.losses.Statistics`; a tie is a miss, so a collapsed model has 0.

    Args:
        projections: (V, B, D), V >= 2, in any scale.

    Returns:
        Scalar in [0, 1].
    """
    hits: list[Tensor] = []
    for cosine, same, row in _cosine_blocks(projections):
        cosine.scatter_(1, row, -torch.inf)  # a row is not its own neighbour
        positive = cosine.masked_fill(~same, -torch.inf).amax(1)
        hits.append(positive > cosine.masked_fill_(same, -torch.inf).amax(1))
    return torch.cat(hits).to(_wide(projections)).mean()


def similarity_histograms(projections: Tensor, bins: int = 100) -> Histograms:
    """Counts the cosines of positive and of negative pairs, each pair once.

    Args:
        projections: (V, B, D) in any scale.
        bins: number of equal bins over [-1, 1].

    Returns:
        The counts; a pair whose cosine is not finite is in none.
    """
    counts = projections.new_zeros(2 * bins + 1, dtype=torch.int64)
    for cosine, same, row in _cosine_blocks(projections):
        counted = torch.arange(cosine.shape[1], device=row.device) > row  # (r, N), a pair once
        counted &= cosine.isfinite()
        place = ((cosine + 1) * (bins / 2)).clamp_(0, bins - 1).long()
        # The last place takes what is not counted: one `bincount`, where masks would copy pairs. Not
        # `histc`: on CUDA it is refused where deterministic algorithms are asked for.
        place = torch.where(counted, place + bins * ~same, 2 * bins)
        counts += torch.bincount(place.view(-1), minlength=2 * bins + 1)
    return Histograms(counts[:bins], counts[bins:-1])


def _cosine_blocks(projections: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cosines of all pairs of rows: (r, N), whether both show one image, and the rows (r, 1)."""
    n_images = projections.shape[1]
    unit = _unit(projections.flatten(0, 1))  # (N, D)
    every = torch.arange(len(unit), device=unit.device)
    for row in every.split(_ROWS):
        with torch.autocast(unit.device.type, enabled=False):
            cosine = unit[row] @ unit.T
        yield cosine, row[:, None] % n_images == every % n_images, row[:, None]


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(_wide(rows), dim=1)
