"""Linear classifiers of a whole set of features, on one rank or dealt out to several.

Symbols: n rows on this rank, M rows to fit, Q query rows, W ranks, E feature width, K classes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from simclr_pl.distributed import (
    all_reduce_sum,
    gather_rows,
    gather_uneven_rows,
    rank,
    world_size,
)
from simclr_pl.heads import LinearHeads
from simclr_pl.keyed_random import Stream, permutation

_CURVATURE_ROWS = 16_384  # rows that the curvature is estimated from
_TOLERANCE = 1e-6  # change of the mean loss at which L-BFGS stops


class Deal:
    """Where the rows of each rank are in a set that was dealt out in turns, as evaluation's batches are.

    Row i of rank r is at place i * W + r, closed up where a rank lacks rows; so what is chosen by
    place is the same at every rank count. Collective.

    Args:
        count: n, rows of this rank.
        device: where the ranks can exchange numbers.

    Attributes:
        total: M, rows of all ranks.
        places: (n,) int64, of this rank's rows, ascending.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        counts = gather_rows(torch.tensor([count], device=device)).tolist()
        every = [np.arange(n) * world_size() + r for r, n in enumerate(counts)]
        self._order = np.argsort(np.concatenate(every))  # (M,) of gathered rows
        self.total = len(self._order)
        self.places = np.searchsorted(np.sort(np.concatenate(every)), every[rank()])
        self._row = np.full(self.total, -1)
        self._row[self.places] = np.arange(count)

    def mine(self, places: np.ndarray) -> Tensor:
        """This rank's rows at some places, in their order: at most (len(places),) int64."""
        rows = self._row[places]
        return torch.from_numpy(rows[rows >= 0])

    def gather(self, rows: Tensor) -> Tensor:
        """All rows of all ranks (M, ...) in the order of the set, from this rank's (n, ...)."""
        order = torch.from_numpy(self._order).to(rows.device)
        return gather_uneven_rows(rows)[order]


def train_heads(
    heads: LinearHeads,
    features: Tensor,
    labels: Tensor,
    deal: Deal,
    places: np.ndarray,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> None:
    """Trains heads on some rows of a dealt-out set, with a cosine from the learning rates to 0.

    The minibatches depend on the seed alone, whatever the number of ranks. Collective.

    Args:
        heads: to train.
        features: (n, E) of this rank, of any precision.
        labels: (n,) int64 in [0, K).
        deal: of the n rows.
        places: of the rows to train on, the same on all ranks.
        epochs: passes over these rows.
        batch_size: rows of a step over all ranks.
        seed: of the order.
        tick: called after each step.
    """
    per_epoch = -(-len(places) // batch_size)
    total, step = epochs * per_epoch, 0
    for epoch in range(epochs):
        order = places[permutation(len(places), seed, Stream.HEADS, epoch)]
        for start in range(0, len(order), batch_size):
            rows = deal.mine(order[start : start + batch_size]).to(features.device)
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            heads.update(features[rows], labels[rows], factor)
            step += 1
            if tick is not None:
                tick()


def standardise(features: Tensor, *others: Tensor, dealt: bool = False) -> list[Tensor]:
    """Subtracts the features' mean and divides by their standard deviation.

    Args:
        features: (M, E), or (n, E) of this rank.
        others: (Q, E), treated by the same numbers.
        dealt: each rank has a part of the features; then collective.

    Returns:
        All of them, float32.
    """
    count = torch.tensor(float(len(features)), device=features.device)
    features = features.detach().float()

    def mean(rows: Tensor) -> Tensor:
        total = rows.sum(0)
        return all_reduce_sum(total) / count if dealt else total / count

    count = all_reduce_sum(count) if dealt else count
    centre = mean(features)
    std = mean((features - centre).square()).sqrt()
    # A constant feature has no scale: dividing it by rounding noise would blow up the queries'.
    std = torch.where(std > 1e-5 * centre.abs(), std, 1.0)
    return [(x.detach().float() - centre) / std for x in (features, *others)]


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float = 1.0,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS.

    Minimises the summed cross-entropy plus l2 / 2 * |weight|^2, as scikit-learn's
    `LogisticRegression(C=1 / l2)`. The features of an encoder are far from independent, so plain L-BFGS
    needs hundreds of passes; here the weights are sought in coordinates in which the curvature at the
    start, that is the features' covariance / K, is the identity: the same minimum in tens.

    Args:
        features: (M, E) float32, centred and of similar scales; see `standardise`.
        labels: (M,) int64 in [0, K).
        num_classes: K.
        l2: weight of the penalty, > 0.
        start: weight and bias to start from, for example those of a neighbouring l2.

    Returns:
        Weight (K, E) and bias (K,).
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        factor = _curvature_factor(features, l2 / len(labels), num_classes)  # (E, E), lower
        zeros = features.new_zeros(num_classes, features.shape[1] + 1)
        weight, bias = start or (zeros[:, 1:], zeros[:, 0])
        inner, bias = weight @ factor, bias.clone()
        solver = torch.optim.LBFGS(
            [inner, bias],
            max_iter=200,
            history_size=10,
            tolerance_change=_TOLERANCE,
            line_search_fn="strong_wolfe",
        )

        def outer() -> Tensor:
            weight: Tensor = torch.linalg.solve_triangular(factor, inner, upper=False, left=False)
            return weight

        def closure() -> Tensor:
            loss, slope, bias.grad = _penalised(outer(), bias, features, labels, l2)
            slope = torch.linalg.solve_triangular(factor.mT, slope, upper=True, left=False)
            inner.grad = slope.contiguous()
            return loss

        solver.step(closure)
        return outer(), bias


def _penalised(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, l2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss with its penalty, and the gradients of weight and bias.

    By hand: quicker than autograd, and it works in inference mode.
    """
    count, rows = len(labels), torch.arange(len(labels), device=labels.device)
    # Classes first: the softmax then runs along the rows, which is twice as quick for few classes.
    log_p = torch.addmm(bias[:, None], weight, features.T).log_softmax(0)  # (K, M)
    loss = -log_p[labels, rows].mean() + l2 / (2 * count) * weight.square().sum()
    slope = log_p.exp_()
    slope[labels, rows] -= 1
    return loss, (slope @ features + l2 * weight) / count, slope.sum(1) / count


def _curvature_factor(features: Tensor, ridge: float, num_classes: int) -> Tensor:
    """Cholesky factor (E, E) of the mean loss's curvature where all classes are equally likely."""
    some = features[:: max(1, len(features) // _CURVATURE_ROWS)]
    curvature = (some.T @ some).double() / (len(some) * num_classes)
    diagonal = curvature.diagonal()
    diagonal += ridge + 1e-4 * diagonal.mean() + 1e-12  # float64 and the margin: always definite
    factor: Tensor = torch.linalg.cholesky(curvature)
    return factor.float()


def linear_predict(
    features: Tensor, labels: Tensor, query: Tensor, num_classes: int, l2: float = 1.0
) -> Tensor:
    """Classes of the queries by logistic regression on the standardised features.

    Args:
        features: (M, E) of the images to fit.
        labels: (M,) int64 in [0, K).
        query: (Q, E).
        num_classes: K.
        l2: weight of the penalty; see `fit_logistic`.

    Returns:
        (Q,) int64 predicted classes.
    """
    features, query = standardise(features, query)
    weight, bias = fit_logistic(features, labels, num_classes, l2)
    with torch.autocast(query.device.type, enabled=False):
        return (query @ weight.T + bias).argmax(1)
