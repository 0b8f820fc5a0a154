"""How good frozen features are, by kNN and a linear classifier."""

from typing import NamedTuple

from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.evaluation.features import Labelled
from simclr_pl.linear import linear_predict
from simclr_pl.neighbours import knn_predict


class Scores(NamedTuple):
    """Shares of the query samples that are classified right, in [0, 1].

    Attributes:
        knn: by weighted nearest neighbours in the bank.
        linear: by logistic regression on the bank.
    """

    knn: float
    linear: float


def score(bank: Labelled, query: Labelled, num_classes: int) -> Scores:
    """Scores features; collective, the same result on every rank.

    Args:
        bank: of this rank.
        query: of this rank.
        num_classes: number of classes.
    """
    truth = gather_uneven_rows(query.labels)
    by_knn = knn_predict(*bank, query.features, num_classes)
    features, labels = (gather_uneven_rows(part) for part in bank)
    queries = gather_uneven_rows(query.features)
    by_line = linear_predict(features, labels, queries, num_classes)
    return Scores(*(float((p == truth).float().mean()) for p in (by_knn, by_line)))
