"""Nearest neighbours among frozen features, over a grid of k and temperatures.

Symbols: M bank samples, Q query samples, E feature width, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.evaluation.features import Labelled
from simclr_pl.neighbours import find_neighbours, hits, vote


class KNNScore(NamedTuple):
    """How one choice of k and temperature does.

    Attributes:
        k: neighbours.
        temperature: of their votes.
        top1: queries whose class has the most votes.
        top5: queries whose class is among the five with the most votes, and has any.
    """

    k: int
    temperature: float
    top1: int
    top5: int


def knn_grid(
    bank: Labelled,
    query: Labelled,
    num_classes: int,
    k: Sequence[int],
    temperature: Sequence[float],
) -> list[KNNScore]:
    """Scores every pair of k and temperature after one search; collective, the same on every rank.

    Votes are those of Wu et al. 2018 (arXiv:1805.01978, section 3.4): see
    `simclr_pl.neighbours.vote`.

    Args:
        bank: (M, E) of this rank.
        query: (Q, E) of this rank.
        num_classes: K.
        k: neighbours, each >= 1.
        temperature: of the votes, each > 0.
    """
    neighbours = find_neighbours(bank.features, bank.labels, query.features, max(k))
    truth = gather_uneven_rows(query.labels)  # (Q of all ranks,)
    scores = []
    for each in k:
        for t in temperature:
            votes = vote(neighbours, num_classes, each, t)  # (Q, K)
            top1, top5 = (int(hits(votes, truth, n).sum()) for n in (1, 5))
            scores.append(KNNScore(each, t, top1, top5))
    return scores
