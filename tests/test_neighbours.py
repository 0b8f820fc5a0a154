"""kNN against a float64 brute force and scikit-learn, on one rank and on two."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from simclr_pl.distributed import rank
from simclr_pl.neighbours import knn_predict

CLASSES = 5


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters, each row at a scale of its own: (count, 12) and (count,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    return features * (0.1 + 10 * torch.rand(count, 1, generator=generator)), labels


BANK, LABELS = clusters(150, seed=1)
QUERY, TRUTH = clusters(70, seed=2)


def brute_force(
    bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float
) -> list[int]:
    """Query by query and neighbour by neighbour, in float64."""
    rows = [row / np.linalg.norm(row) for row in bank.double().numpy()]
    classes = []
    for q in query.double().numpy():
        cosines = np.array([row @ q / np.linalg.norm(q) for row in rows])
        nearest = np.argsort(-cosines)[:k]
        votes = np.zeros(CLASSES)
        for i in nearest:
            votes[labels[i]] += np.exp((cosines[i] - cosines[nearest[0]]) / temperature)
        classes.append(int(votes.argmax()))
    return classes


@pytest.mark.parametrize("temperature", [0.001, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 2, 20, 150])
def test_knn_equals_brute_force_float64(k: int, temperature: float) -> None:
    predicted = knn_predict(BANK, LABELS, QUERY, CLASSES, k, temperature)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == brute_force(BANK, LABELS, QUERY, k, temperature)


def test_the_clusters_tell_a_classifier_from_a_guess_and_from_a_perfect_one() -> None:
    right = (knn_predict(BANK, LABELS, QUERY, CLASSES) == TRUTH).float().mean()
    assert 0.4 < right < 0.98
    assert brute_force(BANK, LABELS, QUERY, 1, 0.07) != brute_force(BANK, LABELS, QUERY, 20, 0.07)
    assert brute_force(BANK, LABELS, QUERY, 20, 0.07) != brute_force(BANK, LABELS, QUERY, 20, 10.0)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_equals_sklearn_with_weighted_cosine_votes(temperature: float) -> None:
    classifier = KNeighborsClassifier(
        20, weights=lambda distance: np.exp(-distance / temperature), metric="cosine"
    )
    expected = classifier.fit(BANK.double().numpy(), LABELS.numpy()).predict(QUERY.double().numpy())
    assert knn_predict(BANK, LABELS, QUERY, CLASSES, 20, temperature).tolist() == expected.tolist()


def test_k_larger_than_the_bank_takes_the_whole_bank() -> None:
    bank, labels = BANK[:13], LABELS[:13]
    predicted = knn_predict(bank, labels, QUERY, CLASSES, k=200, temperature=0.3)
    assert predicted.tolist() == brute_force(bank, labels, QUERY, 13, 0.3)


@pytest.mark.parametrize("chunk", [1, 7, 69, 70, 1000])
def test_knn_does_not_depend_on_the_chunk(chunk: int) -> None:
    predicted = knn_predict(BANK, LABELS, QUERY, CLASSES, chunk=chunk)
    assert predicted.tolist() == brute_force(BANK, LABELS, QUERY, 20, 0.07)


def test_knn_of_no_queries_is_empty() -> None:
    predicted = knn_predict(BANK, LABELS, QUERY[:0], CLASSES)
    assert predicted.shape == (0,)
    assert predicted.dtype == torch.int64


@pytest.mark.parametrize("temperature", [0.001, 1e-5])
def test_low_temperature_gives_the_nearest_neighbour_and_no_nan(temperature: float) -> None:
    # exp(1 / 0.001) overflows even float64; NaN votes would put every query into one class.
    predicted = knn_predict(BANK, LABELS, QUERY, CLASSES, 20, temperature)
    assert predicted.tolist() == brute_force(BANK, LABELS, QUERY, 20, temperature)
    assert len(set(predicted.tolist())) == CLASSES


def test_knn_is_computed_in_float32_under_bf16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        predicted = knn_predict(BANK, LABELS, QUERY, CLASSES)
    assert predicted.tolist() == brute_force(BANK, LABELS, QUERY, 20, 0.07)


# Two real ranks with uneven shards: (bank rows, queries) of rank 0; rank 1 has the others.


def knn_on_a_rank(bank_split: int, query_split: int, k: int, temperature: float) -> list[int]:
    bank = (slice(bank_split), slice(bank_split, None))[rank()]
    query = (slice(query_split), slice(query_split, None))[rank()]
    parts = BANK[bank], LABELS[bank], QUERY[query]
    return knn_predict(*parts, CLASSES, k, temperature, chunk=32).tolist()


@pytest.mark.parametrize(
    ("bank_split", "query_split", "k", "temperature"),
    [
        (75, 35, 20, 0.07),
        (4, 61, 20, 0.07),  # rank 0 has fewer rows than k
        (150, 0, 20, 0.07),  # rank 1 has no bank, rank 0 no query
        (60, 10, 400, 0.5),  # all ranks together have fewer rows than k
        (4, 61, 20, 0.001),
    ],
)
def test_knn_on_two_ranks_equals_brute_force_on_one(
    bank_split: int, query_split: int, k: int, temperature: float
) -> None:
    expected = brute_force(BANK, LABELS, QUERY, k, temperature)
    assert on_ranks(2, knn_on_a_rank, bank_split, query_split, k, temperature) == [expected] * 2
