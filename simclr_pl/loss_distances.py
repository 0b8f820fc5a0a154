"""NT-Xent by Euclidean distances of rows that are not normalised: s_ij = -||z_i - z_j||^2 / sigma.

Symbols: B images and V views of this rank, n = V*B rows here, N rows of all ranks, D projection width,
y_i = (z_i - mean) sqrt(2 log2(e) / sigma), h_i = ||y_i||^2 / 2, s_ij in base 2 = y_i . y_j - h_i - h_j.

A cosine is at least -1; a distance has no bound, and exp(s) of all pairs of a row may vanish even in
float64. So sums are kept as logarithms: pass 1 holds each row's largest s so far and sums exp2 of what
the others are below it, for the rows of a tile and for its columns, as flash attention does for rows (Dao
et al., arXiv:2205.14135). The cache keeps s, and pass 2 weighs a negative pair by
exp2(s + a_i) + exp2(s + a_j), where exp2(s + a_i) is a share of row i's sum and so has a bound.

An s that is made of a product and two squares errs by the rounding of the squares, however small it is.
So the mean row is taken off first, as no distance depends on it, rows with squares too large for float32
are computed in float64, and positives that are views of one image are subtracted. In float32 the
gradient is then within 1e-5 of the float64 one, but within 2e-4 where the rows lie in clusters 100 times
narrower than their distances, as the pulls on a row nearly cancel there.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from simclr_pl.distributed import gather_rows, rank, world_size
from simclr_pl.loss_anchors import (
    LN_2,
    LOG2_E,
    Anchors,
    Denominator,
    GradientInForward,
    Options,
    Statistics,
    by_partners,
    gather_columns,
    masked,
    names_of_views,
    summarise,
)
from simclr_pl.loss_tiles import PairTiles, RowSums, Tile, add_to_rows, workspace

_LARGEST_SQUARE = 128  # of ||y||^2 in float32


class DistanceLoss(GradientInForward):
    """Loss of all N rows by their distances; gradient of this rank's n rows and of sigma."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, sigma: float | Tensor, ids: Tensor | None, options: Options
    ) -> Tensor:
        """Returns the scalar loss of ``z`` (n, D); ``ids`` (N,) are those of all ranks."""
        n, width = z.shape
        scale = (2 * LOG2_E / (sigma.double() if isinstance(sigma, Tensor) else sigma)) ** 0.5
        everything, first = _centred(gather_rows(z), scale), rank() * n  # (N, D)
        y = everything[first : first + n]  # (n, D)
        tiles = DistanceTiles(y, everything, first, options.n_images, ids, options.cache_mb)
        sums = tiles.row_sums(options.statistics is not None)
        every = _anchors(sums, options.n_images, ids, options.denominator)
        own, n_anchors = every.part(first, n), every.number()
        if options.statistics is not None:
            options.statistics.append(_statistics(sums, own, everything, scale))
        if options.gradient and any(ctx.needs_input_grad):
            g = tiles.weighted_rows(own.r, every.r, None if ids is None else _weigher(own, every))
            g = torch.addcmul(g[:, :width], y, g[:, width, None], value=-1)
            if ids is None:
                _pull_to_views(g, y, own, options.n_images)
            # DistributedDataParallel averages over ranks; the loss is one mean over all of them.
            g *= world_size() * LN_2 * scale / n_anchors
            ctx.save_for_backward(g.to(z.dtype))
            if isinstance(sigma, Tensor):
                # s is of degree 2 in z and of degree -1 in sigma: Euler's theorem, twice.
                ctx.of_temperature = (-(y * g).sum() / (2 * scale * sigma)).to(sigma.dtype)
        loss: Tensor = every.loss.sum() / n_anchors
        return loss


def _centred(z: Tensor, scale: float | Tensor) -> Tensor:
    """Centres and scales all rows ``z`` (N, D) to y, in the dtype that their squares need."""
    y = (z - z.mean(0)) * scale
    # All ranks have all rows and decide alike. An accelerator waits for the answer here.
    if y.dtype == torch.float32 and y.square().sum(1).max() > _LARGEST_SQUARE:
        z = z.double()
        y = (z - z.mean(0)) * scale
    return y


class DistanceTiles(PairTiles):
    """`PairTiles` of distances: the tiles are s, in base 2, with -inf for pairs that do not count.

    Args:
        own: (n, D) this rank's rows y, float32 or float64, centred.
        everything: (N, D) the rows of all ranks; ``own`` is the part that starts at ``first``.
        first: position of the own rows in ``everything``.
        n_images: B; without ids the positives of a row are this rank's rows at multiples of B from it.
        ids: (N,) int64, rows with equal ids are positives; or None.
        cache_mb: size of the tiles kept between the passes, in MiB.
    """

    def __init__(
        self,
        own: Tensor,
        everything: Tensor,
        first: int,
        n_images: int,
        ids: Tensor | None,
        cache_mb: float,
    ) -> None:
        self.rows = own
        half = everything.square().sum(1, keepdim=True).div_(-2)  # (N, 1)
        one = torch.ones_like(half)
        # The product of these two is s, and the ones make pass 2 sum the weights along with the rows.
        left = torch.cat([own, half[first : first + len(own)], one[: len(own)]], 1)  # (n, D + 2)
        right = torch.cat([everything, one, half], 1)  # (N, D + 2)
        super().__init__(left, right, first, n_images, ids, cache_mb)

    def row_sums(self, statistics: bool) -> RowSums:
        """Sums exp2(s) over the pairs of each own row, and keeps what tiles it can.

        Args:
            statistics: also fill the last three fields.

        Returns:
            The fields of `RowSums`, but as logarithms: log2 of the sums over the negatives and over the
            positives; the largest s of a negative and of a positive; and as ``spread`` the mean of s
            over all pairs, weighted by exp2(s).
        """
        negative, positive = (_LogSums(self.rows, statistics) for _ in range(2))
        similarity, positives = self.rows.new_zeros(2, len(self.rows))
        if self.ids is None:
            self._add_views(positive, similarity)
            positives += len(self.rows) // self.n_images - 1
        for tile in self.plan:
            s = self._exponentials(self._similarities(tile), tile)
            if self.ids is not None:
                same = self._is_positive(tile)
                add_to_rows(positives, same.to(s.dtype), tile, self.first)
                add_to_rows(similarity, torch.where(same, s, 0), tile, self.first)
                self._add_logs(positive, torch.where(same, s, -torch.inf), tile)
                s = s.masked_fill(same, -torch.inf)
            self._add_logs(negative, s, tile)
        columns = (negative.log2(), positive.log2(), similarity, positives)
        if not statistics:
            return RowSums(*columns)
        everything = torch.logaddexp2(columns[0], columns[1])
        mean = negative.mean() * (columns[0] - everything).exp2()
        mean += positive.mean() * (columns[1] - everything).exp2()
        return RowSums(*columns, negative.largest, positive.largest, mean)

    def _exponentials(self, s: Tensor, tile: Tile) -> Tensor:
        """Not yet raised: s of a tile, in its place of the cache or where the product is."""
        if tile.kept is not None:
            s = self._place(tile).copy_(s)
        return self._clear_own_pairs(s, tile, -torch.inf)

    def _add_views(self, positive: "_LogSums", similarity: Tensor) -> None:
        views = self.rows.view(-1, self.n_images, self.rows.shape[1])  # (V, B, D)
        for a, b in combinations(range(len(views)), 2):
            s = (views[a] - views[b]).square().sum(1).div_(-2)  # (B,)
            for view in (a, b):
                at = slice(view * self.n_images, (view + 1) * self.n_images)
                similarity[at] += s
                positive.add(s[:, None], 1, at)

    def _add_logs(self, sums: "_LogSums", s: Tensor, tile: Tile) -> None:
        sums.add(s, 1, tile.rows)
        if tile.mirrored:
            sums.add(s, 0, slice(tile.columns.start - self.first, tile.columns.stop - self.first))

    def _weights(self, e: Tensor, own_r: Tensor, every_r: Tensor) -> Tensor:
        """Of s of a tile and log2 r of its rows and columns: exp2(s + a_i) + exp2(s + a_j)."""
        w, of_columns = (workspace(name, e, e.numel()).view_as(e) for name in ("weights", "below"))
        torch.add(e, own_r, out=w).exp2_()
        return w.add_(torch.add(e, every_r, out=of_columns).exp2_())


class _LogSums:
    """Sums of exp2(s) over the pairs of each own row, whatever the size of s.

    Attributes:
        largest: (n,) the largest s.
        total: (n,) the sum of exp2(s - largest).
        spread: (n,) the sum of exp2(s - largest) (s - largest), or None.
    """

    def __init__(self, rows: Tensor, spread: bool) -> None:
        # Finite, as -inf less -inf is no number.
        self.largest = rows.new_full((len(rows),), torch.finfo(rows.dtype).min / 2)
        self.total = rows.new_zeros(len(rows))
        self.spread = rows.new_zeros(len(rows)) if spread else None

    def add(self, s: Tensor, dim: int, at: slice) -> None:
        """Adds ``s``, summed over ``dim``, to the rows ``at``."""
        old, total = self.largest[at], self.total[at]
        new = torch.maximum(old, s.amax(dim))
        below = workspace("below", s, s.numel()).view_as(s)
        torch.sub(s, new.unsqueeze(dim), out=below)
        factor = (old - new).exp2_()
        if self.spread is not None:
            moved = (self.spread[at] + total * (old - new)) * factor
            some = below.clamp(min=-1e5)  # 0 times -inf is no number
            self.spread[at] = moved + (below.exp2() * some).sum(dim)
        self.total[at] = total * factor + below.exp2_().sum(dim)
        self.largest[at] = new

    def log2(self) -> Tensor:
        """log2 of the sums; -inf where there is no pair."""
        return self.largest + self.total.log2()

    def mean(self) -> Tensor:
        """The mean of s, weighted by exp2(s); any finite number where there is no pair."""
        assert self.spread is not None
        return self.largest + self.spread / self.total.clamp(min=1)


def _anchors(sums: RowSums, n_images: int, ids: Tensor | None, denominator: Denominator) -> Anchors:
    """Of all rows, from the logarithms of this rank's sums.

    `Anchors.r` is log2 r here, and q is 0 or 1 as the weight of a positive p is
    q_i (r_i E_ip - h_i) - k_i.
    """
    columns = (sums.negative, sums.positive, sums.similarity, sums.positives)
    log_m, log_p, similarity, positives = gather_columns(*columns)  # (N,) each
    count, is_anchor = positives.clamp(min=1), positives > 0
    if denominator == "all":
        log_all = torch.logaddexp2(log_m, log_p)
        # With one positive log P is its s, to the bit.
        loss = torch.logaddexp2(log_m - log_p, torch.zeros_like(log_m))
        loss += log_p - similarity / count
        of_m, of_p = ((part - log_all).exp2_() / count for part in (log_m, log_p))
        several = (positives > 1).to(log_m.dtype)
        anchors = Anchors(-log_all, of_m, LN_2 * loss, several, of_p)
    else:
        is_anchor &= log_m > -torch.inf
        anchors = Anchors(-log_m, 1 / count, LN_2 * (log_m - similarity / count))
        if denominator == "both_negatives":
            if ids is None:
                most = len(sums.negative) // n_images - 1
                partners = by_partners(log_m, names_of_views(log_m, most + 1, n_images), most)
            else:
                partners = by_partners(log_m, ids, int(positives.max()))
            r, k, loss = anchors.r + partners.share.log2(), anchors.k, anchors.loss
            anchors = Anchors(r, k, loss + partners.excess)
    return anchors if ids is None else masked(anchors, is_anchor, -torch.inf)


def _weigher(own: Anchors, every: Anchors) -> Callable[[Tensor, Tile], Tensor]:
    """The weight of a positive pair in the gradient, both rows as anchors; see `_anchors`."""

    def weigh(s: Tensor, tile: Tile) -> Tensor:
        weight = torch.zeros_like(s)
        for anchors, at in ((own, (tile.rows, None)), (every, (None, tile.columns))):
            weight -= anchors.k[at]
            if anchors.q is not None and anchors.h is not None:
                e = (s + anchors.r[at]).exp2_()
                weight += e.sub_(anchors.h[at]).mul_(anchors.q[at])
        return weight

    return weigh


def _pull_to_views(g: Tensor, y: Tensor, own: Anchors, n_images: int) -> None:
    """Adds the positives' part where they are the views of one image, all on this rank."""
    rows, sums = (part.view(-1, n_images, part.shape[1]) for part in (y, g))  # (V, B, D)
    r, k = own.r.view(-1, n_images), own.k.view(-1, n_images)  # (V, B)
    for a, b in combinations(range(len(rows)), 2):
        apart = rows[b] - rows[a]
        weight = k[a] + k[b]
        if own.q is not None and own.h is not None:
            q, h = own.q.view_as(k), own.h.view_as(k)
            s = apart.square().sum(1).div_(-2)
            for view in (a, b):
                weight -= q[view] * ((s + r[view]).exp2_() - h[view])
        apart *= weight[:, None]
        sums[a].sub_(apart)
        sums[b].add_(apart)


def _statistics(
    sums: RowSums, own: Anchors, everything: Tensor, scale: float | Tensor
) -> Statistics:
    assert sums.spread is not None
    entropy = LN_2 * (torch.logaddexp2(sums.negative, sums.positive) - sums.spread)
    all_pairs = everything.sum(0).square().sum() - len(everything) * everything.square().sum()
    return summarise(sums, own, entropy, all_pairs, scale**2 / 2)
