# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton reads the annotations of a kernel: only its own are allowed there.)
"""Sums over all pairs of rows on a GPU: `loss_tiles.PairTiles` without ids, as two Triton kernels.

Symbols: n rows of this rank, N rows of all ranks, D projection width, B images of this rank,
E_ij = exp2(v_i . v_j).

Each program owns a block of this rank's rows and walks over all N columns: no two programs write to
one place, so nothing is atomic and the sums have one order. The symmetry of S is not used: a mirrored
tile would have to be added across programs. Products are of full float32 ("ieee"), as TF32 would round
the exponents to 11 bits. This module imports triton, so import it where a GPU is at hand only.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_pl.loss_tiles import RowSums, Tile, add_default_positives

LARGEST_WIDTH = 256  # D; a program of the second kernel holds whole rows of the gradient


@triton.jit
def _similarities(
    own,
    everything,
    rows,
    columns,
    n,
    total,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
):
    """v_I v_J^T (block_rows, block_columns); 0 outside of the matrix."""
    of_rows = own + rows.to(tl.int64)[:, None] * width
    of_columns = everything + columns.to(tl.int64)[None, :] * width
    is_row = rows[:, None] < n
    is_column = columns[None, :] < total
    s = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for start in range(0, width, block_depth):
        depth = start + tl.arange(0, block_depth)
        left = depth[None, :]
        right = depth[:, None]
        a = tl.load(of_rows + left, mask=is_row & (left < width), other=0.0)
        b = tl.load(of_columns + right, mask=is_column & (right < width), other=0.0)
        s = tl.dot(a, b, s, input_precision="ieee")
    return s


@triton.jit
def _is_negative(rows, columns, n, total, first, n_images):
    """Which pairs are of different images: own rows of one image agree modulo B."""
    own_columns = columns - first
    is_own = (own_columns >= 0) & (own_columns < n)
    images = tl.where(is_own, own_columns % n_images, -1)
    return ((rows % n_images)[:, None] != images[None, :]) & (columns[None, :] < total)


@triton.jit(do_not_specialize=("n", "total", "first", "n_images"))
def sum_rows(
    own,
    everything,
    negative,
    largest,
    spread,
    n,
    total,
    first,
    n_images,
    width: tl.constexpr,
    statistics: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
):
    """Kernel: sums E over the negatives; for statistics also its maximum and E log2 E."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    sums = tl.zeros((block_rows,), dtype=tl.float32)
    maxima = tl.zeros((block_rows,), dtype=tl.float32)
    spreads = tl.zeros((block_rows,), dtype=tl.float32)
    for start in range(0, total, block_columns):
        columns = start + tl.arange(0, block_columns)
        s = _similarities(
            own, everything, rows, columns, n, total, width, block_rows, block_columns, block_depth
        )
        e = tl.where(_is_negative(rows, columns, n, total, first, n_images), tl.exp2(s), 0.0)
        sums += tl.sum(e, 1)
        if statistics:
            maxima = tl.maximum(maxima, tl.max(e, 1))
            spreads += tl.sum(e * s, 1)
    tl.store(negative + rows, sums, mask=rows < n)
    if statistics:
        tl.store(largest + rows, maxima, mask=rows < n)
        tl.store(spread + rows, spreads, mask=rows < n)


@triton.jit(do_not_specialize=("n", "total", "first", "n_images"))
def weigh_rows(
    own,
    everything,
    own_r,
    every_r,
    g,
    n,
    total,
    first,
    n_images,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
):
    """Kernel: sums (r_i + r_j) E_ij v_j over the negatives."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    depth = tl.arange(0, padded_width)[None, :]
    r = tl.load(own_r + rows, mask=rows < n, other=0.0)
    sums = tl.zeros((block_rows, padded_width), dtype=tl.float32)
    lost = tl.zeros((block_rows, padded_width), dtype=tl.float32)
    for start in range(0, total, block_columns):
        columns = start + tl.arange(0, block_columns)
        s = _similarities(
            own, everything, rows, columns, n, total, width, block_rows, block_columns, block_depth
        )
        e = tl.where(_is_negative(rows, columns, n, total, first, n_images), tl.exp2(s), 0.0)
        every = tl.load(every_r + columns, mask=columns < total, other=0.0)
        v = tl.load(
            everything + columns.to(tl.int64)[:, None] * width + depth,
            mask=(columns[:, None] < total) & (depth < width),
            other=0.0,
        )
        # Kahan's summation over the blocks: one chain of N additions, which is what the compiler makes
        # of `sums += tl.dot(...)` too, has 2 to 4 times the error where all rows are alike.
        part = tl.dot(e * (r[:, None] + every[None, :]), v, lost, input_precision="ieee")
        raised = sums + part
        lost = part - (raised - sums)
        sums = raised
    at = g + rows.to(tl.int64)[:, None] * width + depth
    tl.store(at, sums, mask=(rows[:, None] < n) & (depth < width))


def _config(rows: int, columns: int, warps: int) -> triton.Config:
    # Fusion is Triton's default until 3.9, and not from 3.10.
    options = {"block_depth": 32, "enable_fp_fusion": True}
    blocks = {"block_rows": rows, "block_columns": columns}
    return triton.Config(blocks | options, num_warps=warps, num_stages=2)


# The first of each is the one that is used where nothing may be timed.
_tuned_sum_rows = triton.autotune(
    [_config(64, 64, 4), _config(32, 64, 4), _config(16, 64, 4), _config(128, 64, 8)],
    key=["width", "total", "statistics"],
)(sum_rows)
_tuned_weigh_rows = triton.autotune(
    [_config(32, 32, 4), _config(16, 32, 4), _config(64, 32, 8)], key=["width", "total"]
)(weigh_rows)


class PairKernels:
    """The pairs of one rank's rows with all rows, on its GPU; the interface of `PairTiles`.

    The first call at each width D and number of rows N times several block sizes. They decide the
    order of the sums: within a process equal calls give equal bits, another process may choose other
    blocks. With `torch.use_deterministic_algorithms` nothing is timed and all processes agree.

    Args:
        own: (n, D) this rank's rows v, float32, D <= `LARGEST_WIDTH`.
        everything: (N, D) the rows of all ranks; ``own`` is the part that starts at ``first``.
        first: position of the own rows in ``everything``.
        n_images: B; the positives of a row are this rank's rows at multiples of B from it.
        ids: must be None.
        cache_mb: without effect: E is made twice.
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
        assert ids is None
        assert own.dtype == everything.dtype == torch.float32
        assert own.shape[1] <= LARGEST_WIDTH
        self.own, self.everything = own.contiguous(), everything.contiguous()
        self.n_images = n_images
        self.numbers = (len(own), len(everything), first, n_images)

    def row_sums(self, statistics: bool) -> RowSums:
        """Sums E over the pairs of each own row.

        Args:
            statistics: also fill the last three fields.
        """
        sums = RowSums(*self.own.new_zeros(7 if statistics else 4, len(self.own)))
        outputs = (sums.negative, sums.largest_negative, sums.spread)
        self._launch(_tuned_sum_rows, *outputs, statistics=statistics)
        add_default_positives(sums, self.own, self.n_images)
        return sums

    def weighted_rows(
        self,
        own_r: Tensor,
        every_r: Tensor,
        of_positives: Callable[[Tensor, Tile], Tensor] | None = None,
    ) -> Tensor:
        """sum_j (r_i + r_j) E_ij v_j over the negatives j of each own row.

        Args:
            own_r: (n,) of the own rows.
            every_r: (N,) of all rows.
            of_positives: must be None.

        Returns:
            (n, D).
        """
        assert of_positives is None
        g = torch.empty_like(self.own)
        padded = max(16, triton.next_power_of_2(g.shape[1]))
        r = (own_r.contiguous(), every_r.contiguous())
        self._launch(_tuned_weigh_rows, *r, g, padded_width=padded)
        return g

    def _launch(self, tuned: Any, *tensors: Tensor | None, **constants: int) -> None:
        arguments = (self.own, self.everything, *tensors, *self.numbers, self.own.shape[1])
        n = len(self.own)
        interpreted = not isinstance(tuned.fn, triton.JITFunction)
        with torch.cuda.device_of(self.own):
            if interpreted or torch.are_deterministic_algorithms_enabled():
                config = tuned.configs[0].all_kwargs()
                grid = (triton.cdiv(n, config["block_rows"]),)
                tuned.fn[grid](*arguments, **constants, **config)
            else:
                tuned[lambda chosen: (triton.cdiv(n, chosen["block_rows"]),)](
                    *arguments, **constants
                )
