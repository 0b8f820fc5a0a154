"""NT-Xent, the loss of SimCLR, over the rows of all ranks.

Symbols: B images on this rank, V views, D projection width, n = V*B rows here, W ranks, N = W*n rows on
all ranks, u L2-normalised rows, s_ij = u_i . u_j / temperature, P(i) the positives of row i.

    L = mean over rows with a positive of ( lse_i - mean_{p in P(i)} s_ip ),
    lse_i = log sum_{j != i} exp(s_ij)

For V = 2 this is eq. 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations" (arXiv:2002.05709); with several positives it is L_out of Khosla et al., "Supervised
Contrastive Learning" (arXiv:2004.11362, eq. 2); without the positives in lse it is the decoupled loss
of Yeh et al. (arXiv:2110.06848).

Positives are kept apart from the sums over negatives, M. With one positive the loss is
softplus(log M - s_p) and the positive's weight in the gradient -M / (M + e^s_p): nothing cancels,
however sure the model is. The gradient is made in forward, in tiles (`loss_tiles`), and only its
(n, D) numbers are saved. A rank gathers the rows, then a few numbers for each row; with both, the
gradient of its own rows is a local sum, and backward has no collective.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr_pl.distributed import all_reduce_sum, gather_rows, is_distributed, rank, world_size
from simclr_pl.errors import InputError
from simclr_pl.loss_tiles import PairTiles, RowSums, Tile

if TYPE_CHECKING:
    from simclr_pl.loss_triton import PairKernels

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)
# exp2 is taken without subtracting the largest exponent. These bounds on it leave room for the sums.
_LARGEST_EXPONENT = {torch.float32: 120, torch.float64: 1000}


class Statistics(NamedTuple):
    """What the loss saw, over all ranks; scalars.

    Attributes:
        top1: share of the anchors whose nearest other row is a positive.
        positive_similarity: mean cosine of the positive pairs.
        negative_similarity: mean cosine of the negative pairs.
        entropy: mean over the anchors of the entropy of their softmax over all other rows, in nats.
    """

    top1: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    entropy: Tensor


class _Options(NamedTuple):
    n_images: int
    decoupled: bool
    cache_mb: float
    statistics: list[Statistics] | None
    gradient: bool = True


class _Anchors(NamedTuple):
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


class _NTXent(torch.autograd.Function):
    """Loss of all N rows; gradient of this rank's n rows and of the temperature."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, temperature: float | Tensor, ids: Tensor | None, options: _Options
    ) -> Tensor:
        norm = z.norm(dim=1, keepdim=True).clamp_(min=1e-12)  # (n, 1)
        scale = (_LOG2_E / temperature) ** 0.5
        v = z * (scale / norm)  # (n, D)
        everything = gather_rows(v)  # (N, D)
        first = rank() * len(v)
        engine = _engine_for(v, ids)
        tiles = engine(v, everything, first, options.n_images, ids, options.cache_mb)
        sums = tiles.row_sums(options.statistics is not None)
        if ids is None:
            own = _anchors_of_views(sums, len(v) // options.n_images - 1, options.decoupled)
        else:
            own = _anchors_by_ids(sums, options.decoupled)
        every = own
        if is_distributed():
            columns = [column for column in own if column is not None]
            every = _Anchors(*gather_rows(torch.stack(columns, 1)).t().contiguous())  # (N,) each
        n_anchors: Any = len(everything)
        if every.is_anchor is not None:
            n_anchors = every.is_anchor.sum().clamp(min=1)
        if options.statistics is not None:
            options.statistics.append(_statistics(sums, own, everything, scale))
        if options.gradient and any(ctx.needs_input_grad):
            g = tiles.weighted_rows(own.r, every.r, None if ids is None else _weigher(own, every))
            if ids is None:
                _pull_to_views(g, v, own, options.n_images)
            # DistributedDataParallel averages over ranks; the loss is one mean over all of them.
            g *= world_size() / (n_anchors * temperature * scale)
            along = (v * g).sum(1, keepdim=True).div_(scale)  # (n, 1), of g along u
            ctx.save_for_backward(g.addcmul_(v, along / scale, value=-1).div_(norm))
            if isinstance(temperature, Tensor):
                # s is bilinear in u and in 1 / temperature: Euler's theorem gives the latter's part.
                ctx.of_temperature = -along.sum() / (2 * temperature)
        loss: Tensor = every.loss.sum() / n_anchors
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (of_z,) = ctx.saved_tensors
        of_temperature = getattr(ctx, "of_temperature", None)
        if of_temperature is not None:
            of_temperature = of_temperature * upstream[0]
        return of_z * upstream[0], of_temperature, None, None


def _engine_for(own: Tensor, ids: Tensor | None) -> "type[PairTiles | PairKernels]":
    """Triton's kernels where they can serve, else the tiles."""
    if not own.is_cuda or own.dtype != torch.float32 or ids is not None:
        return PairTiles
    try:
        from simclr_pl.loss_triton import LARGEST_WIDTH, PairKernels, can_start
    except ImportError:  # triton comes with torch for some systems only
        return PairTiles
    # Triton compiles for compute capability 7.5 and later.
    recent = torch.cuda.get_device_capability(own.device) >= (7, 5)
    return PairKernels if recent and own.shape[1] <= LARGEST_WIDTH and can_start() else PairTiles


def _anchors_of_views(sums: RowSums, count: int, decoupled: bool) -> _Anchors:
    """Of own rows whose positives are the ``count`` other views of their image."""
    m, p = sums.negative, sums.positive
    if decoupled:
        loss = m.log() - _LN_2 * sums.similarity / count
        return _Anchors(m.reciprocal(), torch.full_like(m, 1 / count), loss)
    r, loss = (m + p).reciprocal_(), (m / p).log1p_()
    if count == 1:
        return _Anchors(r, r * m, loss)
    loss += p.log() - _LN_2 * sums.similarity / count
    return _Anchors(r, r * m / count, loss, q=r, h=p / count)


def _anchors_by_ids(sums: RowSums, decoupled: bool) -> _Anchors:
    """Of own rows with any number of positives."""
    m, p, count = sums.negative, sums.positive, sums.positives.clamp(min=1)
    is_anchor = sums.positives > 0
    if decoupled:
        is_anchor &= m > 0
        columns = (1 / m, 1 / count, m.log() - _LN_2 * sums.similarity / count, 0 * m, m)
    else:
        r, several = 1 / (m + p), sums.positives > 1
        # With one positive log p is its similarity; their difference would be nothing but rounding.
        spread = torch.where(several, p.log() - _LN_2 * sums.similarity / count, 0)
        columns = (r, r * m / count, (m / p).log1p() + spread, r * several, p / count)
    r, k, loss, q, h = (torch.where(is_anchor, column, 0) for column in columns)
    return _Anchors(r, k, loss, q, h, is_anchor.to(m.dtype))


def _weigher(own: _Anchors, every: _Anchors) -> Callable[[Tensor, Tile], Tensor]:
    """The weight of a positive pair in the gradient, both rows as anchors; see `_Anchors`."""
    own_q, own_h, every_q, every_h = own.q, own.h, every.q, every.h
    assert own_q is not None
    assert own_h is not None
    assert every_q is not None
    assert every_h is not None

    def weigh(e: Tensor, tile: Tile) -> Tensor:
        rows, columns = tile.rows, tile.columns
        weight = (e - own_h[rows, None]).mul_(own_q[rows, None])
        weight.addcmul_(e - every_h[columns], every_q[None, columns])
        return weight.sub_(own.k[rows, None]).sub_(every.k[None, columns])

    return weigh


def _pull_to_views(g: Tensor, v: Tensor, own: _Anchors, n_images: int) -> None:
    """Adds the positives' part where they are the views of one image, all on this rank."""
    rows, sums = (part.view(-1, n_images, part.shape[1]) for part in (v, g))  # (V, B, D)
    k = own.k.view(-1, n_images)  # (V, B)
    for a, b in combinations(range(len(rows)), 2):
        weight = k[a] + k[b]
        if own.q is not None and own.h is not None:
            q, h = own.q.view_as(k), own.h.view_as(k)
            e = (rows[a] * rows[b]).sum(1).exp2_()
            weight -= q[a] * (e - h[a]) + q[b] * (e - h[b])
        sums[a].addcmul_(weight[:, None], rows[b], value=-1)
        sums[b].addcmul_(weight[:, None], rows[a], value=-1)


def _statistics(
    sums: RowSums, own: _Anchors, everything: Tensor, scale: float | Tensor
) -> Statistics:
    assert sums.spread is not None
    assert sums.largest_positive is not None
    assert sums.largest_negative is not None
    total = sums.negative + sums.positive
    entropy = total.log() - _LN_2 * sums.spread / total
    hit = (sums.largest_positive > sums.largest_negative).to(total.dtype)
    anchor = torch.ones_like(total) if own.is_anchor is None else own.is_anchor
    columns = (sums.similarity, sums.positives, anchor, anchor * hit, anchor * entropy)
    parts = torch.stack([column.sum() for column in columns])
    similarity, positives, anchors, hits, entropies = all_reduce_sum(parts)
    pairs = everything.sum(0).square().sum() - everything.square().sum()
    negatives = len(everything) * (len(everything) - 1) - positives
    anchors = anchors.clamp(min=1)
    return Statistics(
        hits / anchors,
        similarity / positives.clamp(min=1) / scale**2,
        (pairs - similarity) / negatives.clamp(min=1) / scale**2,
        entropies / anchors,
    )


def nt_xent(
    z: Tensor,
    ids: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    decoupled: bool = False,
    cache_mb: float = 64,
    statistics: list[Statistics] | None = None,
) -> Tensor:
    """NT-Xent loss over the rows of all ranks.

    Args:
        z: (V, B, D) projections of this rank, any float dtype; they are L2-normalised here, in
            float32 also under autocast. V and B are the same on every rank. float64 stays float64,
            and is used where the temperature is too low for float32.
        ids: (V, B) int64; rows with equal ids, on any rank, are positives of each other. By default
            the views of one image are. Rows without a positive leave the mean.
        temperature: divides the similarities, > 0; a scalar tensor may require a gradient.
        decoupled: leave the positives out of the denominator.
        cache_mb: memory for the exponentials kept between the two passes, in MiB; 0 computes all of
            them twice.
        statistics: a list to which the batch's `Statistics` are appended; costs about half as much
            again, so ask for them where they are logged.

    Returns:
        Scalar, the mean over all ranks' rows, equal on every rank. Its gradient in ``z`` is W times
        this rank's part of the global gradient, so that the average over ranks that
        DistributedDataParallel takes is the global gradient. Backward calls no collective.

    Raises:
        InputError: ``z`` is not (V, B, D), has too few rows or a shape that differs between ranks;
            ``ids`` has another shape; temperature <= 0 or too low for float64.
    """
    lowest = temperature.item() if isinstance(temperature, Tensor) else temperature
    _check_temperature(lowest)
    return _apply(z, ids, temperature, lowest, _Options(0, decoupled, cache_mb, statistics))


def _apply(
    z: Tensor, ids: Tensor | None, temperature: float | Tensor, lowest: float, options: _Options
) -> Tensor:
    """`nt_xent` at a temperature that is known not to be under ``lowest``."""
    _check_rows(z, ids, options.decoupled)
    n_views, n_images, width = z.shape
    with torch.autocast(z.device.type, enabled=False):
        exponent = _LOG2_E / lowest + math.log2(world_size() * n_views * n_images)
        wide = z.dtype == torch.float64 or exponent >= _LARGEST_EXPONENT[torch.float32]
        if exponent >= _LARGEST_EXPONENT[torch.float64]:
            raise InputError(
                f"`temperature` must be at least 0.0015; got {lowest}. Set `model.temperature`."
            )
        rows = z.reshape(-1, width).to(torch.float64 if wide else torch.float32)  # (n, D)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(rows)
        all_ids = None if ids is None else gather_rows(ids.reshape(-1))
        # Under no_grad a view of a leaf still asks for its gradient.
        options = options._replace(n_images=n_images, gradient=torch.is_grad_enabled())
        loss: Tensor = _NTXent.apply(rows, temperature, all_ids, options)
        return loss.to(torch.promote_types(z.dtype, torch.float32))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(
            f"`temperature` must be > 0; got {temperature}. Set `model.temperature`, e.g. 0.5."
        )


_agreed_shape: list[torch.Size] = []


def _check_rows(z: Tensor, ids: Tensor | None, decoupled: bool) -> None:
    if z.dim() != 3:
        raise InputError(
            f"`z` must be (V, B, D), views by images by width; got {tuple(z.shape)}. "
            "Reshape the projections with `z.view(V, B, -1)`."
        )
    # On an accelerator reading the answer would wait for the device: there only a new shape is checked.
    if is_distributed() and (z.device.type == "cpu" or _agreed_shape != [z.shape]):
        shapes = gather_rows(torch.tensor([z.shape], device=z.device)).tolist()
        if any(shape != shapes[0] for shape in shapes):
            raise InputError(
                f"`z` must have one shape on all ranks; got {shapes}, rank by rank. Drop the last, "
                "incomplete batch, or use ContrastiveDataModule."
            )
        _agreed_shape[:] = [z.shape]
    if world_size() * z.shape[0] * z.shape[1] < 2:
        raise InputError(
            f"NT-Xent needs at least 2 rows; got {tuple(z.shape)}. Use a larger batch or more views."
        )
    if ids is None and z.shape[0] < 2:
        raise InputError(
            f"without `ids` a row's positives are its other views; got {tuple(z.shape)}. "
            "Use at least 2 views, or give `ids`."
        )
    if decoupled and ids is None and world_size() * z.shape[1] < 2:
        raise InputError(
            f"the decoupled loss needs a negative; got {tuple(z.shape)}. Use at least 2 images."
        )
    if ids is not None and ids.shape != z.shape[:2]:
        raise InputError(
            f"`ids` must be (V, B) = {tuple(z.shape[:2])}; got {tuple(ids.shape)}. "
            "Give one id for each row of `z`."
        )


class NTXentLoss(nn.Module):
    """NT-Xent loss as a module; see `nt_xent`.

    Args:
        temperature: divides the cosine similarities, > 0. The authors' commands use 0.5 for CIFAR-10
            and 0.1 for ImageNet (README of google-research/simclr).
        learnable: train the temperature, as exp of a parameter; this is its value at the start.
        bounds: range in which a learnable temperature is kept.
        decoupled: leave the positives out of the denominator (Yeh et al., arXiv:2110.06848).
        cache_mb: memory for the exponentials kept between the two passes, in MiB; 0 computes all of
            them twice.

    Raises:
        InputError: the temperature or a bound is <= 0, or it lies outside the bounds.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        learnable: bool = False,
        bounds: tuple[float, float] = (0.02, 2.0),
        decoupled: bool = False,
        cache_mb: float = 64,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if learnable and not 0 < bounds[0] <= temperature <= bounds[1]:
            raise InputError(
                "a learnable `temperature` must lie within its bounds, 0 < low <= high; got "
                f"{temperature} and {bounds}. Set `model.loss.bounds`."
            )
        self.bounds, self.decoupled, self.cache_mb = bounds, decoupled, cache_mb
        self.temperature = temperature
        self.log_temperature: nn.Parameter | None = None
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(
        self, z: Tensor, ids: Tensor | None = None, statistics: list[Statistics] | None = None
    ) -> Tensor:
        """Returns the scalar loss of ``z`` (V, B, D) with optional ``ids`` (V, B)."""
        options = _Options(0, self.decoupled, self.cache_mb, statistics)
        if self.log_temperature is None:
            return _apply(z, ids, self.temperature, self.temperature, options)
        with torch.no_grad():
            self.log_temperature.clamp_(*map(math.log, self.bounds))
        return _apply(z, ids, self.log_temperature.exp(), self.bounds[0], options)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        learnable = "" if self.log_temperature is None else f", learnable within {self.bounds}"
        decoupled = ", decoupled" if self.decoupled else ""
        return f"temperature={self.temperature}{learnable}{decoupled}"
