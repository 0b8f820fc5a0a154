"""Sums over all pairs of rows, tile by tile: no N x N matrix is ever held.

Symbols: n rows of this rank, N rows of all ranks, D projection width, B images and V views of this
rank, E_ij = exp2(v_i . v_j).

S = v v^T is symmetric, so a tile of this rank's own square serves its rows and its columns. Pass 1 sums
E over the negatives of each row. Pass 2 weights E and multiplies it with v; it takes the tiles that
pass 1 kept, as many as the cache holds, and makes the others again.
"""

import threading
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DENSE = 256  # up to so many rows are one tile
_ROWS = 512
_KEPT_COLUMNS = 1024
_REMADE_COLUMNS = 512  # stays in the processor's cache while it is made, weighted and used

_memory = threading.local()

_ONEDNN: Any = None
if torch.backends.mkldnn.is_available():
    _ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def workspace(name: str, like: Tensor, size: int) -> Tensor:
    """A flat buffer that lives on between calls: fresh pages cost more than the sums in them."""
    held: dict[object, Tensor] = _memory.__dict__.setdefault("held", {})
    key = (name, like.device, like.dtype)
    if key not in held or held[key].numel() < size:
        with torch.inference_mode(False):  # else training could not write what validation made
            held[key] = like.new_empty(size)
    return held[key][:size]


class Tile(NamedTuple):
    """One tile of the plan.

    Attributes:
        rows: own rows, counted on this rank.
        columns: rows of all ranks.
        mirrored: the columns are, transposed, own rows too: the tile serves both.
        kept: its place in the cache, or None.
    """

    rows: slice
    columns: slice
    mirrored: bool
    kept: int | None


class RowSums(NamedTuple):
    """Sums over the pairs of each own row, (n,) each; the last three only for statistics.

    Attributes:
        negative: of E over the negatives.
        positive: of E over the positives.
        similarity: of log2 E over the positives.
        positives: number of positives.
        largest_negative: the largest E of a negative.
        largest_positive: the largest E of a positive.
        spread: of E log2 E over all pairs.
    """

    negative: Tensor
    positive: Tensor
    similarity: Tensor
    positives: Tensor
    largest_negative: Tensor | None = None
    largest_positive: Tensor | None = None
    spread: Tensor | None = None


class PairTiles:
    """The tiles of one rank's rows against all rows.

    Args:
        own: (n, D) this rank's rows v, float32 or float64.
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
        self.own, self.everything, self.first = own, everything, first
        self.n_images, self.ids = n_images, ids
        budget = int(cache_mb * 2**20) // own.element_size()
        self.plan = list(_plan(len(own), len(everything), first, budget))
        self.has_mirrored = any(tile.mirrored for tile in self.plan)
        kept = [tile.kept + _area(tile) for tile in self.plan if tile.kept is not None]
        self.cache = workspace("cache", own, max(kept, default=0))

    # Pass 1.

    def row_sums(self, statistics: bool) -> RowSums:
        """Sums E over the pairs of each own row, and keeps what tiles it can.

        Args:
            statistics: also fill the last three fields; half as slow again.
        """
        sums = RowSums(*self.own.new_zeros(7 if statistics else 4, len(self.own)))
        if self.ids is None:
            add_default_positives(sums, self.own, self.n_images)
        for tile in self.plan:
            self._add_tile(sums, tile)
        return sums

    def _add_tile(self, sums: RowSums, tile: Tile) -> None:
        s = self._similarities(tile)
        if self.ids is None:
            e = negative = self._exponentials(s, tile)
        else:
            e, negative = self._add_positives_by_id(s, tile, sums)
        add_to_rows(sums.negative, negative, tile, self.first)
        if sums.largest_negative is not None and sums.spread is not None:
            _raise_to(sums.largest_negative, negative, tile, self.first)
            add_to_rows(sums.spread, e * s, tile, self.first)

    def _similarities(self, tile: Tile) -> Tensor:
        """v_I v_J^T, overwritten by the next product."""
        return _product(self.own[tile.rows], self.everything[tile.columns])

    def _exponentials(self, s: Tensor, tile: Tile) -> Tensor:
        """E of a tile, in its place of the cache or overwritten by the next tile without one."""
        e = torch.exp2(s, out=self._place(tile))
        return self._clear_own_pairs(e, tile)

    def _place(self, tile: Tile) -> Tensor:
        area = _area(tile)
        if tile.kept is None:
            place = workspace("tile", self.own, area)
        else:
            place = self.cache[tile.kept : tile.kept + area]
        return place.view(tile.rows.stop - tile.rows.start, -1)

    def _clear_own_pairs(self, e: Tensor, tile: Tile, value: float = 0) -> Tensor:
        """Fills each row's pair with itself and, without ids, with its positives; in place."""
        if not self.first <= tile.columns.start < self.first + len(self.own):
            return e
        n = len(self.own)
        step = self.n_images if self.ids is None else n
        for k in range(1 - n // step, n // step):
            offset = self.first + tile.rows.start + k * step - tile.columns.start
            if -e.shape[0] < offset < e.shape[1]:
                e.diagonal(offset).fill_(value)
        return e

    def _is_positive(self, tile: Tile) -> Tensor:
        assert self.ids is not None
        own_ids = self.ids[self.first : self.first + len(self.own)]
        same = own_ids[tile.rows, None] == self.ids[None, tile.columns]
        return self._clear_own_pairs(same, tile)

    def _add_positives_by_id(self, s: Tensor, tile: Tile, sums: RowSums) -> tuple[Tensor, Tensor]:
        """Adds the positives of a tile; returns its E and E of its negatives."""
        positive = self._is_positive(tile)
        add_to_rows(sums.positives, positive.to(s.dtype), tile, self.first)
        add_to_rows(sums.similarity, torch.where(positive, s, 0), tile, self.first)
        e = self._exponentials(s, tile)
        of_positives = torch.where(positive, e, 0)
        add_to_rows(sums.positive, of_positives, tile, self.first)
        if sums.largest_positive is not None:
            _raise_to(sums.largest_positive, of_positives, tile, self.first)
        return e, e.masked_fill(positive, 0)

    # Pass 2.

    def weighted_rows(
        self, own_r: Tensor, every_r: Tensor, of_positives: Callable[[Tensor, Tile], Tensor] | None
    ) -> Tensor:
        """sum_j w_ij v_j for each own row, with w_ij = (r_i + r_j) E_ij for negatives.

        Args:
            own_r: (n,) of the own rows.
            every_r: (N,) of all rows.
            of_positives: with ids, maps E of a tile and the tile to the weights that its positives get,
                symmetric in the two rows of a pair; without ids positives get 0.

        Returns:
            (n, D).
        """
        g = torch.zeros_like(self.own)
        g_t = self.own.new_zeros(self.own.shape[::-1]) if self.has_mirrored else None  # (D, n)
        for tile in self.plan:
            if tile.kept is None:
                e = self._exponentials(self._similarities(tile), tile)
            else:
                e = self._place(tile)
            w = self._weights(e, own_r[tile.rows, None], every_r[None, tile.columns])
            if of_positives is not None:
                w = torch.where(self._is_positive(tile), of_positives(e, tile), w)
            g[tile.rows] += _product(w, self.everything[tile.columns].t())
            if g_t is not None and tile.mirrored:  # as (D, n): faster than as (n, D)
                columns = slice(tile.columns.start - self.first, tile.columns.stop - self.first)
                rows = slice(self.first + tile.rows.start, self.first + tile.rows.stop)
                g_t[:, columns] += _product(self.everything[rows].t().contiguous(), w.t())
        return g if g_t is None else g.add_(g_t.t())

    def _weights(self, e: Tensor, own_r: Tensor, every_r: Tensor) -> Tensor:
        """Of the negatives of a tile: (r_i + r_j) E_ij; overwritten by the next tile."""
        w = workspace("weights", e, e.numel()).view_as(e)
        return torch.add(own_r, every_r, out=w).mul_(e)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Makes x y^T of (a, k) and (b, k); the next product may overwrite it.

    oneDNN, which torch takes for convolutions but not for this, multiplies float32 at the full width of
    the processor's vectors, and MKL on AMD's at half of it: 207 against 98 GFLOP/s on one core.
    """
    if _ONEDNN is not None and x.device.type == "cpu" and x.dtype == torch.float32:
        return _ONEDNN(x, y, None, "none", [], "")  # type: ignore[no-any-return]
    out = workspace("product", x, x.shape[0] * y.shape[0]).view(x.shape[0], -1)
    return torch.mm(x, y.t(), out=out)


def add_default_positives(sums: RowSums, own: Tensor, n_images: int) -> None:
    """Adds the pairs of each of this rank's rows with the other views of its image."""
    views = own.view(-1, n_images, own.shape[1])  # (V, B, D)
    per_view = [None if field is None else field.view(len(views), -1) for field in sums]
    _, positive, similarity, positives, _, largest, spread = per_view
    assert positive is not None
    assert similarity is not None
    assert positives is not None
    for a, b in combinations(range(len(views)), 2):
        s = (views[a] * views[b]).sum(1)  # (B,)
        e = s.exp2()
        for view in (a, b):
            similarity[view] += s
            positive[view] += e
            if largest is not None and spread is not None:
                spread[view] += e * s
                torch.maximum(largest[view], e, out=largest[view])
    positives.fill_(len(views) - 1)


def _plan(n: int, total: int, first: int, budget: int) -> Iterator[Tile]:
    """The tiles that cover each pair of own rows once, and each pair with other ranks' rows."""
    height = n if total <= _DENSE else _ROWS
    used = 0
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        parts = (
            (first + start, first + rows.stop, False),  # the square on the diagonal
            (first + rows.stop, first + n, True),
            (0, first, False),
            (first + n, total, False),
        )
        for left, right, mirrored in parts:
            while left < right:
                width = min(_KEPT_COLUMNS, right - left)
                keep = used + (rows.stop - start) * width <= budget
                width = width if keep else min(_REMADE_COLUMNS, right - left)
                columns = slice(left, left + width)
                yield Tile(rows, columns, mirrored, used if keep else None)
                used += (rows.stop - start) * width if keep else 0
                left += width


def _area(tile: Tile) -> int:
    return int((tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start))


def add_to_rows(target: Tensor, values: Tensor, tile: Tile, first: int) -> None:
    """Adds the sums of a tile's ``values`` to those of its rows, (n,), and of its mirrored columns."""
    target[tile.rows] += values.sum(1)
    if tile.mirrored:
        target[tile.columns.start - first : tile.columns.stop - first] += values.sum(0)


def _raise_to(target: Tensor, values: Tensor, tile: Tile, first: int) -> None:
    rows = target[tile.rows]
    torch.maximum(rows, values.amax(1), out=rows)
    if tile.mirrored:
        columns = target[tile.columns.start - first : tile.columns.stop - first]
        torch.maximum(columns, values.amax(0), out=columns)
