"""NT-Xent, the loss of SimCLR, over the rows of all ranks.

Symbols: B images on this rank, V views, D projection width, n = V*B rows here, W ranks, N = W*n rows on
all ranks, u L2-normalised rows, s_ij = u_i . u_j / temperature, P(i) the positives of row i.

    L = mean over rows with a positive of ( lse_i - mean_{p in P(i)} s_ip ),
    lse_i = log sum_{j != i} exp(s_ij)

For V = 2 this is eq. 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations" (arXiv:2002.05709); with several positives it is L_out of Khosla et al., "Supervised
Contrastive Learning" (arXiv:2004.11362, eq. 2); without the positives in lse it is the decoupled loss
of Yeh et al. (arXiv:2110.06848). With the "contrast degree" D(x, y) = -||f(x) - f(y)||^2 / sigma as s,
and the negatives z of both rows of a pair below,

    log( e^D(x,y) / sum_z (e^D(x,z) + e^D(y,z)) )

is, negative and averaged over pairs, ``similarity="euclidean"``, ``denominator="both_negatives"``.
Distances of normalised rows are cosines at half the temperature, as -||u_i - u_j||^2 / sigma =
(2 u_i . u_j - 2) / sigma and what is the same for all pairs cancels. `loss_distances` has the other rows.

Positives are kept apart from the sums over negatives, M. With one positive the loss is
softplus(log M - s_p) and the positive's weight in the gradient -M / (M + e^s_p): nothing cancels,
however sure the model is. The gradient is made in forward, in tiles (`loss_tiles`), and only its
(n, D) numbers are saved. A rank gathers the rows, then a few numbers for each row (`loss_anchors`); with
both, the gradient of its own rows is a local sum, and backward has no collective.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from simclr_pl.distributed import gather_rows, is_distributed, rank, world_size
from simclr_pl.errors import InputError
from simclr_pl.gpu import triton_serves
from simclr_pl.loss_anchors import (
    LN_2,
    LOG2_E,
    Anchors,
    Denominator,
    GradientInForward,
    Options,
    anchors_by_ids,
    anchors_of_views,
    summarise,
)
from simclr_pl.loss_anchors import Statistics as Statistics
from simclr_pl.loss_distances import DistanceLoss
from simclr_pl.loss_tiles import PairTiles, RowSums, Tile

if TYPE_CHECKING:
    from simclr_pl.loss_triton import PairKernels

Similarity = Literal["cosine", "euclidean"]
# exp2 is taken without subtracting the largest exponent. These bounds on it leave room for the sums.
_LARGEST_EXPONENT = {torch.float32: 120, torch.float64: 1000}


class _NTXent(GradientInForward):
    """Loss of all N rows; gradient of this rank's n rows and of the temperature."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, temperature: float | Tensor, ids: Tensor | None, options: Options
    ) -> Tensor:
        norm = z.norm(dim=1, keepdim=True).clamp_(min=1e-12)  # (n, 1)
        scale = (LOG2_E / temperature) ** 0.5
        v = z * (scale / norm)  # (n, D)
        everything = gather_rows(v)  # (N, D)
        first = rank() * len(v)
        engine = _engine_for(v, ids)
        tiles = engine(v, everything, first, options.n_images, ids, options.cache_mb)
        sums = tiles.row_sums(options.statistics is not None)
        if ids is None:
            every = anchors_of_views(sums, options.n_images, options.denominator)
        else:
            every = anchors_by_ids(sums, ids, options.denominator)
        own, n_anchors = every.part(first, len(v)), every.number()
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


def _engine_for(own: Tensor, ids: Tensor | None) -> "type[PairTiles | PairKernels]":
    """Triton's kernels where they can serve, else the tiles."""
    if own.dtype != torch.float32 or ids is not None or not triton_serves(own.device):
        return PairTiles
    from simclr_pl.loss_triton import LARGEST_WIDTH, PairKernels  # triton is not everywhere

    return PairKernels if own.shape[1] <= LARGEST_WIDTH else PairTiles


def _weigher(own: Anchors, every: Anchors) -> Callable[[Tensor, Tile], Tensor]:
    """The weight of a positive pair in the gradient, both rows as anchors; see `Anchors`."""

    def weigh(e: Tensor, tile: Tile) -> Tensor:
        weight = torch.zeros_like(e)
        ends = ((own, (tile.rows, None)), (every, (None, tile.columns)))
        for anchors, at in ends:
            if anchors.q is not None and anchors.h is not None:
                weight.addcmul_(e - anchors.h[at], anchors.q[at])
        for anchors, at in ends:
            weight -= anchors.k[at]
        return weight

    return weigh


def _pull_to_views(g: Tensor, v: Tensor, own: Anchors, n_images: int) -> None:
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
    sums: RowSums, own: Anchors, everything: Tensor, scale: float | Tensor
) -> Statistics:
    assert sums.spread is not None
    total = sums.negative + sums.positive
    entropy = total.log() - LN_2 * sums.spread / total
    all_pairs = everything.sum(0).square().sum() - everything.square().sum()
    return summarise(sums, own, entropy, all_pairs, scale**2)


def nt_xent(
    z: Tensor,
    ids: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    similarity: Similarity = "cosine",
    normalise: bool = True,
    denominator: Denominator = "all",
    cache_mb: float = 64,
    statistics: list[Statistics] | None = None,
) -> Tensor:
    """NT-Xent loss over the rows of all ranks.

    Args:
        z: (V, B, D) projections of this rank, any float dtype; they are worked on in float32, also
            under autocast. V and B are the same on every rank. float64 stays float64, and is used
            where float32 does not do: temperatures that are too low, distances that are too large.
        ids: (V, B) int64; rows with equal ids, on any rank, are positives of each other. By default
            the views of one image are. Rows without a positive leave the mean.
        temperature: divides the similarities, > 0; a scalar tensor may require a gradient.
        similarity: "cosine", or "euclidean" for the negative squared distance, -||z_i - z_j||^2.
        normalise: scale the rows to length 1 first; cosines always do.
        denominator: what a positive pair is compared with, besides itself: "all" other rows of its
            first row; that row's "negatives" alone (decoupled); or "both_negatives", the negatives of
            either row, without the pair itself.
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
            ``ids`` has another shape; temperature <= 0 or too low for float64; cosines that are not to
            be normalised; an unknown similarity or denominator.
    """
    lowest = temperature.item() if isinstance(temperature, Tensor) else temperature
    _check_temperature(lowest)
    _check_variant(similarity, normalise, denominator)
    options = Options(0, denominator, cache_mb, statistics)
    return _apply(z, ids, temperature, lowest, similarity, normalise, options)


def _apply(
    z: Tensor,
    ids: Tensor | None,
    temperature: float | Tensor,
    lowest: float,
    similarity: Similarity,
    normalise: bool,
    options: Options,
) -> Tensor:
    """`nt_xent` at a temperature that is known not to be under ``lowest``."""
    _check_rows(z, ids, options.denominator)
    n_views, n_images, width = z.shape
    with torch.autocast(z.device.type, enabled=False):
        per_cosine = 2 if similarity == "euclidean" else 1  # see the module
        exponent = per_cosine * LOG2_E / lowest + math.log2(world_size() * n_views * n_images)
        wide = z.dtype == torch.float64
        if normalise:
            _check_exponent(exponent, lowest, per_cosine)
            wide |= exponent >= _LARGEST_EXPONENT[torch.float32]
        rows = z.reshape(-1, width).to(torch.float64 if wide else torch.float32)  # (n, D)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(rows)
        all_ids = None if ids is None else gather_rows(ids.reshape(-1))
        # Under no_grad a view of a leaf still asks for its gradient.
        options = options._replace(n_images=n_images, gradient=torch.is_grad_enabled())
        loss: Tensor
        if normalise:
            loss = _NTXent.apply(rows, temperature / per_cosine, all_ids, options)
        else:
            loss = DistanceLoss.apply(rows, temperature, all_ids, options)
        return loss.to(torch.promote_types(z.dtype, torch.float32))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(
            f"`temperature` must be > 0; got {temperature}. Set `model.temperature`, e.g. 0.5."
        )


def _check_exponent(exponent: float, lowest: float, per_cosine: int) -> None:
    if exponent >= _LARGEST_EXPONENT[torch.float64]:
        raise InputError(
            f"`temperature` must be at least {0.0015 * per_cosine}; got {lowest}. "
            "Set `model.temperature`."
        )


def _check_variant(similarity: str, normalise: bool, denominator: str) -> None:
    known = {"similarity": get_args(Similarity), "denominator": get_args(Denominator)}
    for name, got in (("similarity", similarity), ("denominator", denominator)):
        if got not in known[name]:
            raise InputError(
                f"`{name}` must be one of {', '.join(known[name])}; got {got!r}. "
                f"Set `model.loss.{name}`."
            )
    if similarity == "cosine" and not normalise:
        raise InputError(
            "the cosine always normalises; got `normalise` false. Set `model.loss.normalise` to true, "
            "or `model.loss.similarity` to euclidean."
        )


_agreed_shape: list[torch.Size] = []


def _check_rows(z: Tensor, ids: Tensor | None, denominator: Denominator) -> None:
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
    if denominator != "all" and ids is None and world_size() * z.shape[1] < 2:
        raise InputError(
            f"the denominator {denominator} needs a negative; got {tuple(z.shape)}. Use at least 2 "
            "images, or set `model.loss.denominator` to all."
        )
    if ids is not None and ids.shape != z.shape[:2]:
        raise InputError(
            f"`ids` must be (V, B) = {tuple(z.shape[:2])}; got {tuple(ids.shape)}. "
            "Give one id for each row of `z`."
        )


class NTXentLoss(nn.Module):
    """NT-Xent loss as a module; see `nt_xent`.

    Args:
        temperature: divides the similarities, > 0. The authors' commands use 0.5 for CIFAR-10 and 0.1
            for ImageNet (README of google-research/simclr). For distances of rows that are not
            normalised take one of the size of their squares.
        learnable: train the temperature, as exp of a parameter; this is its value at the start.
        bounds: range in which a learnable temperature is kept.
        similarity: cosine, or euclidean for the negative squared distance.
        normalise: scale the projections to length 1 first; with cosine it must be true.
        denominator: what a positive pair is compared with, besides itself. all: every other row;
            negatives: only rows of other images (decoupled, Yeh et al., arXiv:2110.06848);
            both_negatives: the negatives of both rows of the pair, without the pair itself.
        cache_mb: memory for the exponentials kept between the two passes, in MiB; 0 computes all of
            them twice.

    Raises:
        InputError: the temperature or a bound is <= 0, or it lies outside the bounds; a cosine that is
            not to be normalised; an unknown similarity or denominator.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        learnable: bool = False,
        bounds: tuple[float, float] = (0.02, 2.0),
        similarity: Similarity = "cosine",
        normalise: bool = True,
        denominator: Denominator = "all",
        cache_mb: float = 64,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        _check_variant(similarity, normalise, denominator)
        if learnable and not 0 < bounds[0] <= temperature <= bounds[1]:
            raise InputError(
                "a learnable `temperature` must lie within its bounds, 0 < low <= high; got "
                f"{temperature} and {bounds}. Set `model.loss.bounds`."
            )
        self.bounds, self.cache_mb = bounds, cache_mb
        self.similarity, self.normalise, self.denominator = similarity, normalise, denominator
        self.temperature = temperature
        self.log_temperature: nn.Parameter | None = None
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(
        self, z: Tensor, ids: Tensor | None = None, statistics: list[Statistics] | None = None
    ) -> Tensor:
        """Returns the scalar loss of ``z`` (V, B, D) with optional ``ids`` (V, B)."""
        temperature: float | Tensor = self.temperature
        lowest = self.temperature
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.clamp_(*map(math.log, self.bounds))
            temperature, lowest = self.log_temperature.exp(), self.bounds[0]
        options = Options(0, self.denominator, self.cache_mb, statistics)
        return _apply(z, ids, temperature, lowest, self.similarity, self.normalise, options)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        learnable = "" if self.log_temperature is None else f", learnable within {self.bounds}"
        defaults = {"similarity": "cosine", "normalise": True, "denominator": "all"}
        others = (f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)
        return f"temperature={self.temperature}{learnable}{''.join(others)}"
