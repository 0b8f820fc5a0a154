"""kNN against a float64 brute force and scikit-learn, on one rank and on two."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from simclr_pl import neighbours
from simclr_pl.distributed import rank
from simclr_pl.neighbour_kernels import multiplies_bytes, nearest_rows
from simclr_pl.neighbours import (
    Neighbours,
    find_neighbours,
    hits,
    knn_predict,
    normalised_half,
    vote,
)

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


def brute_search(bank: Tensor, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (Q, k) and rows (Q, k) in float64, equal ones in the order of the bank."""
    bank, query = bank.double(), query.double()
    rows = bank / bank.norm(dim=1, keepdim=True)
    cosines = (query / query.norm(dim=1, keepdim=True) @ rows.T).numpy()
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, nearest, 1), nearest


def brute_scores(
    bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float
) -> np.ndarray:
    """Votes (Q, K), query by query and neighbour by neighbour, in float64."""
    scores = np.zeros((len(query), CLASSES))
    for i, (cosines, nearest) in enumerate(zip(*brute_search(bank, query, k), strict=True)):
        for cosine, j in zip(cosines, nearest, strict=True):
            scores[i, labels[j]] += np.exp((cosine - cosines[0]) / temperature)
    return scores


def brute_force(*args: Any) -> list[int]:
    return brute_scores(*args).argmax(1).tolist()


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


# The search. Every way of it: products of bytes, of float32, and torch alone as on other devices.


def wide(count: int, seed: int, spread: float = 1.0) -> Tensor:
    """Rows (count, 67) about one direction: the narrower, the more alike all are."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(67, generator=torch.Generator().manual_seed(3))
    rows = direction + spread * torch.randn(count, 67, generator=generator)
    return rows * (0.1 + torch.rand(count, 1, generator=generator))


def search(way: str, bank: Tensor, query: Tensor, k: int, chunk: int, part: int) -> tuple:
    if way == "torch":
        before, neighbours.BANK_CHUNK = neighbours.BANK_CHUNK, part
        try:
            return neighbours._nearest_rows_on_device(bank, query, k, chunk)
        finally:
            neighbours.BANK_CHUNK = before
    return nearest_rows(bank, query, k, chunk, part, in_bytes=way == "bytes")


needs_bytes = pytest.mark.skipif(not multiplies_bytes(), reason="no exact products of bytes")
WAYS = [pytest.param("bytes", marks=needs_bytes), "float32", "torch"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", [3.0, 0.3, 0.02])
@pytest.mark.parametrize("k", [1, 7, 301])
def test_the_search_equals_brute_force_float64_in_every_chunking(
    way: str, spread: float, k: int
) -> None:
    bank, query = wide(301, 5, spread), wide(43, 6, spread)
    expected, nearest = brute_search(bank, query, k)
    unit = [rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (query, bank)]
    all_cosines = (unit[0] @ unit[1].T).numpy()
    for chunk, part in ((1, 301), (43, 1000), (16, 1), (10, 64), (42, 100)):
        similarity, row = search(way, bank, query, k, chunk, part)
        assert similarity.numpy() == pytest.approx(expected, abs=1e-6)
        found = np.take_along_axis(all_cosines, row.numpy(), 1)
        assert found == pytest.approx(expected, abs=1e-6)
        assert all(len(set(line)) == k for line in row.tolist())
        if spread > 1:
            assert (row.numpy() == nearest).mean() > 0.999


@pytest.mark.parametrize("chunk", [2, 16, 100])
def test_threads_change_no_bit_of_what_is_found_and_are_as_many_afterwards(chunk: int) -> None:
    one = nearest_rows(wide(301, 5), wide(43, 6), 20, chunk, 64, multiplies_bytes())
    torch.set_num_threads(3)
    with torch.inference_mode():  # as in validation; it does not reach into other threads
        three = nearest_rows(wide(301, 5), wide(43, 6), 20, chunk, 64, multiplies_bytes())
    assert torch.get_num_threads() == 3
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_chunks_change_no_bit_of_what_is_found(way: str) -> None:
    bank, query = wide(301, 5), wide(43, 6)
    first = search(way, bank, query, 20, 43, 301)
    for chunk, part in ((5, 17), (1, 300)):
        similarity, row = search(way, bank, query, 20, chunk, part)
        assert torch.equal(row, first[1])
        # products by torch differ in the last bit with their shape
        assert torch.allclose(similarity, first[0], rtol=0, atol=1e-6 if way == "torch" else 0)


def test_the_rough_products_are_rough_and_the_result_is_not() -> None:
    # Rows with one large number each round all others coarsely; rankings by bytes alone are wrong.
    bank, query = wide(500, 1), wide(60, 2)
    bank[:, 0] *= 40
    query[:, 0] *= 40
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (bank, query)]
    coarse = [(127 * rows).round() / 127 for rows in unit]
    expected, nearest = brute_search(bank, query, 10)
    by_bytes = (coarse[1] @ coarse[0].T).topk(10, dim=1).indices
    assert (by_bytes.numpy() != nearest).mean() > 0.5
    similarity, row = nearest_rows(bank, query, 10, 64, 64, multiplies_bytes())
    assert similarity.numpy() == pytest.approx(expected, abs=1e-6)
    assert (row.numpy() == nearest).mean() > 0.99


@pytest.mark.parametrize("in_bytes", [pytest.param(True, marks=needs_bytes), False])
def test_of_equal_similarities_the_first_rows_are_taken(in_bytes: bool) -> None:
    bank = wide(30, 4).repeat(7, 1)  # every row seven times
    _, row = nearest_rows(bank, wide(20, 8), 10, 6, 50, in_bytes)
    _, once = brute_search(bank[:30], wide(20, 8), 2)
    for found, (best, second) in zip(row.tolist(), once, strict=True):
        assert found == [*range(best, 210, 30), *range(second, 90, 30)]


@pytest.mark.parametrize("way", WAYS)
def test_rows_with_nan_are_nobodys_neighbours(way: str) -> None:
    bank, query = wide(150, 1), wide(20, 2)
    bank[[0, 3, 64, 149]] = torch.nan
    bank[70, 5] = torch.inf
    query[11] = torch.nan
    fine = [i for i in range(150) if i not in (0, 3, 64, 70, 149)]
    similarity, row = search(way, bank, query, 145, 7, 40)
    assert (similarity[11] == -torch.inf).all()
    assert (vote(Neighbours(similarity, row % 5), 5, 20, 0.07)[11] == 0).all()
    for i in set(range(20)) - {11}:
        assert sorted(row[i].tolist()) == fine
        assert similarity[i].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_encoder_has_neighbours_of_similarity_one(way: str) -> None:
    bank, query = torch.full((150, 40), 0.3), torch.full((9, 40), 2.0)
    similarity, row = search(way, bank, query, 10, 4, 33)
    assert torch.allclose(similarity, torch.ones(9, 10), atol=1e-6)
    assert all(len(set(line)) == 10 for line in row.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype_are_compared_as_they_are_stored(dtype: torch.dtype) -> None:
    bank, query = wide(301, 5).to(dtype), wide(43, 6).to(dtype)
    found = find_neighbours(bank, torch.arange(301), query, 20)
    expected, nearest = brute_search(bank, query, 20)
    assert found.similarity.dtype == torch.float32
    assert found.similarity.numpy() == pytest.approx(expected, abs=1e-6)
    assert (found.payload.numpy() == nearest).mean() > 0.99


def test_payload_of_indices_names_sklearns_neighbours() -> None:
    index = torch.arange(150) * 1000 + 2**40  # more than float32 or int32 holds
    found = find_neighbours(BANK, index, QUERY, 9)
    search = NearestNeighbors(n_neighbors=9, metric="cosine").fit(BANK.double().numpy())
    distance, nearest = search.kneighbors(QUERY.double().numpy())
    assert found.payload.tolist() == index.numpy()[nearest].tolist()
    assert found.similarity.numpy() == pytest.approx(1 - distance, abs=1e-6)


def test_normalised_half_keeps_directions_of_any_scale() -> None:
    for scale in (1e-12, 1.0, 1e12):  # float16 itself ends at 65504 and at 6e-8
        rows = normalised_half(QUERY * scale)
        assert rows.dtype == torch.float16
        expected = QUERY.double() / QUERY.double().norm(dim=1, keepdim=True)
        assert (rows.double() - expected).abs().max() < 2**-11
    assert (normalised_half(torch.zeros(2, 3)) == 0).all()


# Votes.


def test_one_search_serves_a_grid_of_k_and_temperatures() -> None:
    found = find_neighbours(BANK, LABELS, QUERY, 100)
    for k in (1, 3, 20, 100, 500):
        for temperature in (0.02, 0.07, 1.0):
            scores = vote(found, CLASSES, k, temperature)
            expected = brute_scores(BANK, LABELS, QUERY, min(k, 100), temperature)
            assert scores.numpy() == pytest.approx(expected, rel=2e-4)


def test_a_class_without_a_vote_is_never_named() -> None:
    scores = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 1.0, 0.7]])
    truth = torch.arange(4)
    named = torch.stack([hits(row.expand(4, 4), truth, 3) for row in scores])
    assert named.tolist() == [[False, False, True, False], [True, False, True, True]]
    assert not hits(torch.zeros(4, 4), truth, 4).any()
    assert hits(scores[1].expand(4, 4), truth, 1).tolist() == [False, False, True, False]
    assert hits(scores[1].expand(4, 4), truth, 2).tolist() == [False, False, True, True]
    assert hits(scores[1].expand(4, 4), truth, 9).tolist() == [True, False, True, True]


def test_a_neighbours_vote_is_never_lost_to_a_low_temperature() -> None:
    found = Neighbours(torch.tensor([[0.9, 0.5, -0.9]]), torch.tensor([[2, 0, 3]]))
    scores = vote(found, CLASSES, 3, 1e-5)
    assert (scores > 0).tolist() == [[True, False, True, True, False]]
    assert scores.argmax() == 2


# Two real ranks with uneven shards: (bank rows, queries) of rank 0; rank 1 has the others.

CASES = [
    (75, 35, 20, 0.07),
    (4, 61, 20, 0.07),  # rank 0 has fewer rows than k
    (150, 0, 20, 0.07),  # rank 1 has no bank, rank 0 no query
    (60, 10, 400, 0.5),  # all ranks together have fewer rows than k
    (4, 61, 20, 0.001),
]


def on_a_rank() -> list[Any]:
    results: list[Any] = []
    for bank_split, query_split, k, temperature in CASES:
        bank = (slice(bank_split), slice(bank_split, None))[rank()]
        query = (slice(query_split), slice(query_split, None))[rank()]
        parts = BANK[bank], LABELS[bank], QUERY[query]
        classes = knn_predict(*parts, CLASSES, k, temperature, chunk=32)
        index = torch.arange(150)[bank]
        lists = [
            find_neighbours(dtype(BANK[bank]), index, dtype(QUERY[query]), k, chunk=32)
            for dtype in (torch.Tensor.bfloat16, normalised_half)
        ]
        results.append((classes, *lists))
    return results


def test_two_ranks_with_uneven_shards_equal_brute_force_on_one() -> None:
    first, second = on_ranks(2, on_a_rank)
    for case, one, other in zip(CASES, first, second, strict=True):
        _, _, k, temperature = case
        assert torch.equal(one[0], other[0])
        assert one[0].tolist() == brute_force(BANK, LABELS, QUERY, k, temperature), case
        for dtype, found, same in zip(
            (torch.Tensor.bfloat16, normalised_half), one[1:], other[1:], strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
            cosines, nearest = brute_search(dtype(BANK), dtype(QUERY), k)
            assert found.similarity.numpy() == pytest.approx(cosines, abs=1e-6), case
            assert (found.payload.numpy() == nearest).mean() > 0.99, case
