"""What each row adds to the loss and to the gradient, from the sums over its pairs.

Symbols: B images of a rank, V views, W ranks, N = W*V*B rows of all ranks, s_ij the exponent of a pair
in nats, P(i) the positives of row i and c their number, M_i the sum of E_ij = exp(s_ij) over the
negatives and P_i that over the positives. A row's loss is one of

    "all":             log(M_i + P_i) - mean_p s_ip
    "negatives":       log M_i - mean_p s_ip
    "both_negatives":  mean_p log(M_i + M_p) - mean_p s_ip

Everything here is done for the rows of all ranks on each of them: they are few numbers.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_pl.distributed import all_reduce_sum, gather_rows, is_distributed, world_size
from simclr_pl.loss_tiles import RowSums

Denominator = Literal["all", "negatives", "both_negatives"]
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Statistics(NamedTuple):
    """What the loss saw, over all ranks; scalars.

    Attributes:
        top1: share of the anchors whose nearest other row is a positive.
        positive_similarity: mean cosine of the positive pairs; of rows that are not normalised the mean
            of -||z_i - z_j||^2, not divided by the temperature.
        negative_similarity: the same of the negative pairs.
        entropy: mean over the anchors of the entropy of their softmax over all other rows, in nats.
    """

    top1: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    entropy: Tensor


class Options(NamedTuple):
    """How the loss is computed; see `simclr_pl.losses.nt_xent`. ``n_images`` is B."""

    n_images: int
    denominator: Denominator
    cache_mb: float
    statistics: list[Statistics] | None
    gradient: bool = True


class Anchors(NamedTuple):
    """What a row contributes as an anchor, (rows,) each.

    The weight of a negative j in the gradient is r_i E_ij, that of a positive p is
    q_i (E_ip - h_i) - k_i. Without ids every row is an anchor; with one positive q is 0.
    """

    r: Tensor
    k: Tensor
    loss: Tensor
    q: Tensor | None = None
    h: Tensor | None = None
    is_anchor: Tensor | None = None

    def part(self, first: int, size: int) -> "Anchors":
        """Those of the ``size`` rows from ``first`` on."""
        columns = (None if column is None else column[first : first + size] for column in self)
        return Anchors(*columns)  # type: ignore[arg-type]

    def number(self) -> int | Tensor:
        """Number of anchors, at least 1."""
        if self.is_anchor is None:
            return len(self.loss)
        return self.is_anchor.sum().clamp(min=1)


class GradientInForward(torch.autograd.Function):
    """A function of (z, temperature, ids, options) whose forward saves its gradients in ``ctx``.

    That in z as a saved tensor, that in the temperature, if it is a tensor, as ``of_temperature``.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """The saved gradients, times ``upstream``."""
        (of_z,) = ctx.saved_tensors
        of_temperature = getattr(ctx, "of_temperature", None)
        if of_temperature is not None:
            of_temperature = of_temperature * upstream[0]
        return of_z * upstream[0], of_temperature, None, None


def gather_columns(*columns: Tensor) -> tuple[Tensor, ...]:
    """Columns (n,) of this rank to columns (N,) of all, in one gather."""
    if not is_distributed():
        return columns
    return tuple(gather_rows(torch.stack(columns, 1)).t().contiguous())


def summarise(
    sums: RowSums, own: Anchors, entropy: Tensor, all_pairs: Tensor, unit: float | Tensor
) -> Statistics:
    """Statistics over all ranks, of this rank's sums and anchors; collective.

    Args:
        sums: with the fields for statistics.
        own: the anchors of this rank's rows.
        entropy: (n,) in nats.
        all_pairs: scalar, the sum over all pairs of rows of what ``sums.similarity`` sums.
        unit: what that is divided by.
    """
    assert sums.largest_positive is not None
    assert sums.largest_negative is not None
    hit = (sums.largest_positive > sums.largest_negative).to(entropy.dtype)
    anchor = torch.ones_like(entropy) if own.is_anchor is None else own.is_anchor
    columns = (sums.similarity, sums.positives, anchor, anchor * hit, anchor * entropy)
    parts = torch.stack([column.sum() for column in columns])
    similarity, positives, anchors, hits, entropies = all_reduce_sum(parts)
    n = world_size() * len(entropy)
    negatives = n * (n - 1) - positives
    anchors = anchors.clamp(min=1)
    return Statistics(
        hits / anchors,
        similarity / positives.clamp(min=1) / unit,
        (all_pairs - similarity) / negatives.clamp(min=1) / unit,
        entropies / anchors,
    )


def anchors_of_views(sums: RowSums, n_images: int, denominator: Denominator) -> Anchors:
    """Of all rows, from this rank's sums, where positives are the other views of an image."""
    m, p, similarity = gather_columns(sums.negative, sums.positive, sums.similarity)  # (N,) each
    count = len(sums.negative) // n_images - 1
    if denominator == "all":
        r, loss = (m + p).reciprocal_(), (m / p).log1p_()
        if count == 1:
            return Anchors(r, r * m, loss)
        loss += p.log() - LN_2 * similarity / count
        return Anchors(r, r * m / count, loss, q=r, h=p / count)
    r, loss = m.reciprocal(), m.log() - LN_2 * similarity / count
    if denominator == "both_negatives":
        partners = by_partners(m.log2(), names_of_views(m, count + 1, n_images), count)
        r, loss = r * partners.share, loss + partners.excess
    return Anchors(r, torch.full_like(m, 1 / count), loss)


def anchors_by_ids(sums: RowSums, ids: Tensor, denominator: Denominator) -> Anchors:
    """Of all rows, from this rank's sums and all ids (N,), with any number of positives."""
    columns = (sums.negative, sums.positive, sums.similarity, sums.positives)
    m, p, similarity, positives = gather_columns(*columns)  # (N,) each
    count, is_anchor = positives.clamp(min=1), positives > 0
    if denominator == "all":
        r, several = 1 / (m + p), positives > 1
        # With one positive log p is its similarity; their difference would be nothing but rounding.
        spread = torch.where(several, p.log() - LN_2 * similarity / count, 0)
        loss = (m / p).log1p() + spread
        anchors = Anchors(r, r * m / count, loss, q=r * several, h=p / count)
    else:
        is_anchor &= m > 0
        r, loss = 1 / m, m.log() - LN_2 * similarity / count
        if denominator == "both_negatives":
            partners = by_partners(m.log2(), ids, int(positives.max()))
            r, loss = r * partners.share, loss + partners.excess
        anchors = Anchors(r, 1 / count, loss)
    return masked(anchors, is_anchor)


def masked(anchors: Anchors, is_anchor: Tensor, of_r: float = 0) -> Anchors:
    """Puts 0 where a row is no anchor, and ``of_r`` as its r."""
    r = torch.where(is_anchor, anchors.r, of_r)
    k, loss, q, h = (c if c is None else torch.where(is_anchor, c, 0) for c in anchors[1:5])
    return Anchors(r, k, loss, q, h, is_anchor.to(r.dtype))  # type: ignore[arg-type]


class Partners(NamedTuple):
    """What the negatives of a row's positives do, (N,) each.

    Attributes:
        share: 2 / c sum_p M_i / (M_i + M_p). The 2 is there as M_i is also in the losses of the
            positives p, each with its own 1 / c, and the rows of one id have one c.
        excess: mean_p log(1 + M_p / M_i), in nats.
    """

    share: Tensor
    excess: Tensor


def by_partners(log_m: Tensor, names: Tensor, most: int) -> Partners:
    """Compares M of all positive pairs, without a matrix: rows of one name are sorted side by side.

    Args:
        log_m: (N,) log2 M.
        names: (N,) rows with equal names are positives.
        most: the largest number of positives of a row: so many steps of (N,) numbers are taken.
    """
    names, order = names.sort()
    log_m = log_m[order]
    share, excess, count = torch.zeros((3, len(log_m)), dtype=log_m.dtype, device=log_m.device)
    for step in range(1, most + 1):
        same = names[step:] == names[:-step]
        ahead = log_m[step:] - log_m[:-step]  # log2 M_p / M_i of the earlier row
        for rows, ratio in ((slice(None, -step), ahead), (slice(step, None), -ahead)):
            share[rows] += torch.where(same, torch.sigmoid(-LN_2 * ratio), 0)
            excess[rows] += torch.where(same, torch.logaddexp2(ratio, torch.zeros_like(ratio)), 0)
            count[rows] += same
    count.clamp_(min=1)
    place = order.argsort()
    return Partners((2 * share / count)[place], (LN_2 * excess / count)[place])


def names_of_views(rows: Tensor, n_views: int, n_images: int) -> Tensor:
    """(N,) a name for the image of each of the ``rows`` (N, ...) of all ranks."""
    images = torch.arange(len(rows) // n_views, device=rows.device).view(
        -1, 1, n_images
    )  # (W, 1, B)
    return images.expand(-1, n_views, -1).flatten()
