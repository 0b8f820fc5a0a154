"""The linear protocol: a classifier on frozen features, its options chosen on held-out samples.

Symbols: n bank rows of this rank, M of all ranks, q query rows of this rank, E feature width, K classes,
G options tried.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_pl.distributed import all_reduce_sum
from simclr_pl.errors import InputError
from simclr_pl.evaluation.features import Labelled
from simclr_pl.heads import LinearHeads
from simclr_pl.keyed_random import Stream, permutation
from simclr_pl.linear import Deal, fit_logistic, standardise, train_heads
from simclr_pl.metrics import wilson_interval

_HELD_OUT = 10  # one in so many bank samples chooses the options
_SPLIT = -1  # in the place of the epoch, in the key of the split
_ROWS = 1024  # scored at a time

_Options = list[dict[str, float]]
_Logits = Callable[[Tensor], Tensor]  # (r, E) -> (G, r, K)
_Fit = Callable[[np.ndarray, _Options], _Logits]  # on the rows at these places


class Share(NamedTuple):
    """A share of the query samples, in [0, 1], with its 95 % interval.

    Attributes:
        value: hits / samples.
        low: lower end, by `simclr_pl.metrics.wilson_interval`.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, total: int) -> "Share":
        """The share that ``hits`` are of ``total``."""
        return cls(hits / total, *wilson_interval(hits, total))


class LinearResult(NamedTuple):
    """What the protocol found; the same on every rank.

    Attributes:
        top1: query samples whose class is the first answer.
        top5: among the first five; None for five classes or fewer.
        chosen: the options with the best held-out accuracy.
        grid: all options, each with its ``held_out`` accuracy in [0, 1], in the order tried.
        bank: samples of all ranks that the reported classifier is fitted on.
        held_out: how many of these the options were chosen on.
        query: samples of all ranks that it is scored on.
    """

    top1: Share
    top5: Share | None
    chosen: dict[str, float]
    grid: list[dict[str, float]]
    bank: int
    held_out: int
    query: int


class _Recipe(NamedTuple):
    """How SGD goes over the bank: passes, rows of a step over all ranks, seed of the order."""

    epochs: int
    batch_size: int
    seed: int

    def steps(self, rows: int) -> int:
        return self.epochs * -(-rows // self.batch_size)


def linear_protocol(
    bank: Labelled,
    query: Labelled,
    num_classes: int,
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    l2: Sequence[float] = (1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1),
    lr: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    weight_decay: Sequence[float] = (0.0, 1e-4, 1e-3, 1e-2),
    epochs: int = 30,
    batch_size: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LinearResult:
    """Fits a linear classifier on the bank and scores it on the query. Collective.

    A keyed tenth of the bank, of each class alike, is held out. The options that do best on it are
    fitted again on the whole bank, and only then is the query scored, once. The features are
    standardised by the bank.

    "lbfgs" is logistic regression over the penalties ``l2`` (as Kornblith et al. 2019,
    arXiv:1805.08974, section 3); each rank then holds the features of all, M * E * 4 bytes, twice. "sgd"
    trains all pairs of ``lr`` and ``weight_decay`` at once, with momentum and a cosine, and leaves the
    features where they are.

    Args:
        bank: (n, E) of this rank, dealt out in turns as evaluation's batches are.
        query: (q, E) of this rank.
        num_classes: K.
        method: how to fit.
        l2: penalties on the summed cross-entropy, l2 / 2 * |weight|^2, > 0.
        lr: learning rates, > 0.
        weight_decay: of SGD, >= 0.
        epochs: passes of SGD over the bank.
        batch_size: rows of a step of SGD over all ranks.
        seed: of the split and of SGD's order.
        progress: called with the work done and all work, in fits of L-BFGS or steps of SGD.

    Raises:
        InputError: an option out of its range; no query sample, or fewer than two bank samples.
    """
    _check(l2, lr, weight_decay, epochs, batch_size)
    deal = Deal(len(bank.labels), bank.labels.device)
    queries = int(all_reduce_sum(torch.tensor(len(query.labels), device=query.labels.device)))
    if deal.total < 2 or not queries:
        raise InputError(
            "the linear protocol needs at least 2 labelled bank samples and 1 query sample; got "
            f"{deal.total} and {queries}. Give labelled samples."
        )
    labels = deal.gather(bank.labels)  # (M,)
    held = hold_out(labels, seed)
    fitted = np.setdiff1d(np.arange(deal.total), held)
    x, xq = standardise(bank.features, query.features, dealt=True)
    if method == "lbfgs":
        options: _Options = [{"l2": value} for value in sorted(l2, reverse=True)]
        tick = _ticker(progress, len(options) + 1)
        fit: _Fit = partial(_lbfgs, Labelled(deal.gather(x), labels), num_classes, tick)
    else:
        options = [{"lr": rate, "weight_decay": decay} for rate in lr for decay in weight_decay]
        recipe = _Recipe(epochs, batch_size, seed)
        tick = _ticker(progress, recipe.steps(len(fitted)) + recipe.steps(deal.total))
        fit = partial(_sgd, Labelled(x, bank.labels), deal, num_classes, recipe, tick)
    mine = deal.mine(held).to(x.device)
    hits = _hits(fit(fitted, options), x[mine], bank.labels[mine])  # (G, 2)
    accuracy = [h / len(held) for h in hits[:, 0].tolist()]
    chosen = options[int(np.argmax(accuracy))]
    final = fit(np.arange(deal.total), [chosen])
    top1, top5 = (Share.of(int(h), queries) for h in _hits(final, xq, query.labels)[0])
    return LinearResult(
        top1,
        top5 if num_classes > 5 else None,
        chosen,
        [{**o, "held_out": share} for o, share in zip(options, accuracy, strict=True)],
        deal.total,
        len(held),
        queries,
    )


def hold_out(labels: Tensor, seed: int = 0) -> np.ndarray:
    """Which of M samples choose the options: a tenth, of each class alike, at least one.

    Args:
        labels: (M,) int64 of all ranks, in the order of the set.
        seed: of the choice.

    Returns:
        Their ascending places, int64.
    """
    order = permutation(len(labels), seed, Stream.HEADS, _SPLIT)
    by_class = order[np.argsort(labels.cpu().numpy()[order], kind="stable")]
    return np.sort(by_class[_HELD_OUT // 2 :: _HELD_OUT] if len(labels) > 5 else by_class[:1])


def _lbfgs(
    bank: Labelled,
    num_classes: int,
    tick: Callable[[], None],
    places: np.ndarray,
    options: _Options,
) -> _Logits:
    """Logistic regression on gathered rows, each penalty from the weights of the one before."""
    some = torch.from_numpy(places).to(bank.labels.device)
    x, y = bank.features[some], bank.labels[some]
    fits: list[tuple[Tensor, Tensor]] = []
    for option in options:
        start = fits[-1] if fits else None
        fits.append(fit_logistic(x, y, num_classes, option["l2"], start))
        tick()
    weight, bias = (torch.stack(part) for part in zip(*fits, strict=True))  # (G, K, E), (G, K)
    return lambda rows: rows @ weight.mT + bias[:, None]


def _sgd(
    bank: Labelled,
    deal: Deal,
    num_classes: int,
    recipe: _Recipe,
    tick: Callable[[], None],
    places: np.ndarray,
    options: _Options,
) -> _Logits:
    """Heads trained on this rank's rows, all options at once."""
    heads = LinearHeads(
        bank.features.shape[1],
        num_classes,
        [option["lr"] for option in options],
        [option["weight_decay"] for option in options],
        device=bank.features.device,
    )
    train_heads(heads, *bank, deal, places, *recipe, tick)
    return heads.logits


def _hits(logits: _Logits, features: Tensor, labels: Tensor) -> Tensor:
    """Hits of all ranks among the first and the first five answers, (G, 2), summed over the ranks."""
    hits = []
    with torch.autocast(features.device.type, enabled=False):
        for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            answers = logits(x)  # (G, r, K)
            right = answers.topk(min(5, answers.shape[-1])).indices == y[:, None]  # (G, r, 5)
            hits.append(torch.stack([right[..., 0].sum(1), right.sum((1, 2))], 1))
    return all_reduce_sum(torch.stack(hits).sum(0))


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """Counts the work done, and tells it."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _check(
    l2: Sequence[float],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    epochs: int,
    batch_size: int,
) -> None:
    for name, values in (("l2", l2), ("lr", lr)):
        if not values or not all(value > 0 for value in values):
            raise InputError(f"`{name}` must be numbers > 0; got {list(values)}. Set `{name}`.")
    if not weight_decay or not all(value >= 0 for value in weight_decay):
        raise InputError(
            f"`weight_decay` must be numbers >= 0; got {list(weight_decay)}. Set `weight_decay`."
        )
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"`{name}` must be >= 1; got {number}. Set `{name}`.")
