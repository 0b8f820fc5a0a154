"""Logistic regression against scikit-learn; heads on sets that are dealt out to ranks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from simclr_pl import linear
from simclr_pl.heads import LinearHeads
from simclr_pl.keyed_random import Stream, permutation
from simclr_pl.linear import Deal, fit_logistic, linear_predict, standardise, train_heads


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits, 1,000 to fit and 797 to classify, with a few constant pixels."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    return x[:1000], y[:1000], x[1000:], y[1000:]


def sklearn_predict(features: Tensor, labels: Tensor, query: Tensor, l2: float) -> Tensor:
    scaler = StandardScaler().fit(features.double().numpy())
    classifier = LogisticRegression(C=1 / l2, max_iter=2000, tol=1e-8)
    classifier.fit(scaler.transform(features.double().numpy()), labels.numpy())
    return torch.from_numpy(classifier.predict(scaler.transform(query.double().numpy())))


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0, 1000.0])
def test_linear_equals_sklearn_logistic_regression(l2: float) -> None:
    features, labels, query, truth = digits()
    expected = sklearn_predict(features, labels, query, l2)
    predicted = linear_predict(features, labels, query, 10, l2)
    assert (predicted == expected).float().mean() >= 0.99
    accuracy, expected_accuracy = (
        float((p == truth).float().mean()) for p in (predicted, expected)
    )
    assert abs(accuracy - expected_accuracy) <= 0.005


def test_l2_changes_the_classes_so_that_agreement_with_sklearn_means_something() -> None:
    features, labels, query, _ = digits()
    weak, strong = (sklearn_predict(features, labels, query, l2) for l2 in (1.0, 1000.0))
    assert (weak == strong).float().mean() < 0.985


def test_linear_does_not_depend_on_the_scale_of_the_features() -> None:
    features, labels, query, _ = digits()
    expected = linear_predict(features, labels, query, 10)
    for scale, offset in ((1e-9, 0.0), (1e4, 0.0), (3.0, 20.0)):
        predicted = linear_predict(features * scale + offset, labels, query * scale + offset, 10)
        assert (predicted == expected).float().mean() >= 0.99


@pytest.mark.parametrize("constant", [0.0, -1.127, 1000.1, 12345.678])
def test_a_constant_feature_does_not_sway_queries_where_it_differs(constant: float) -> None:
    features, labels, query, _ = digits()
    expected = linear_predict(features, labels, query, 10)
    features = torch.cat([features, torch.full((len(features), 3), constant)], 1)
    query = torch.cat([query, torch.full((len(query), 3), constant + 0.5)], 1)
    predicted = linear_predict(features, labels, query, 10)
    assert (predicted == expected).float().mean() >= 0.99


def test_linear_works_without_gradient_and_leaves_none_behind() -> None:
    features, labels, query, _ = digits()
    features.requires_grad_()
    expected = linear_predict(features.detach(), labels, query, 10)
    with torch.no_grad():
        assert torch.equal(linear_predict(features, labels, query, 10), expected)
        assert not torch.is_grad_enabled()
    assert features.grad is None


def test_linear_is_computed_in_float32_under_bf16_autocast() -> None:
    features, labels, query, _ = digits()
    expected = linear_predict(features, labels, query, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_predict(features, labels, query, 10), expected)
        half = linear_predict(features.bfloat16(), labels, query.bfloat16(), 10)
    assert torch.equal(half, expected)  # the pixels 0 to 16 are exact in bfloat16


def test_linear_fits_labels_that_skip_a_class() -> None:
    features, labels, query, truth = digits()
    keep, keep_query = labels != 4, truth != 4
    predicted = linear_predict(features[keep], labels[keep], query[keep_query], 10)
    expected = sklearn_predict(features[keep], labels[keep], query[keep_query], 1.0)
    assert (predicted == expected).float().mean() >= 0.99


def correlated() -> tuple[Tensor, Tensor]:
    """Features as an encoder's: few directions hold most of the variance."""
    rng = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -2, 40)
    x = torch.randn(600, 40, generator=rng) * spectrum @ torch.randn(40, 40, generator=rng)
    label = (
        x @ torch.randn(40, 6, generator=rng) + 0.5 * torch.randn(600, 6, generator=rng)
    ).argmax(1)
    return standardise(x)[0], label


def gradient_norm(x: Tensor, label: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    parameters = [weight.double().requires_grad_(), bias.double().requires_grad_()]
    loss = F.cross_entropy(F.linear(x.double(), *parameters), label)
    loss = loss + l2 / (2 * len(label)) * parameters[0].square().sum()
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).norm())


@pytest.mark.parametrize("l2", [0.1, 10.0, 1000.0])
def test_logistic_regression_reaches_the_minimum_of_correlated_features(l2: float) -> None:
    x, label = correlated()
    weight, bias = fit_logistic(x, label, 6, l2)
    start = gradient_norm(x, label, torch.zeros(6, 40), torch.zeros(6), l2)
    assert gradient_norm(x, label, weight, bias, l2) < 2e-3 * start


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    x, label = correlated()
    cold = fit_logistic(x, label, 6, 1.0)
    warm = fit_logistic(x, label, 6, 1.0, fit_logistic(x, label, 6, 100.0))
    torch.testing.assert_close(F.linear(x, *warm), F.linear(x, *cold), rtol=0.02, atol=0.05)


def test_a_start_at_the_minimum_spares_the_way_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    penalised = linear._penalised

    def counted(*args: Any) -> Any:
        calls.append(1)
        return penalised(*args)

    monkeypatch.setattr(linear, "_penalised", counted)
    x, label = correlated()
    cold = fit_logistic(x, label, 6, 1.0)
    passes = len(calls)
    fit_logistic(x, label, 6, 1.0, cold)
    assert len(calls) - passes < passes / 3


def test_logistic_regression_takes_fewer_rows_than_features_and_copies_of_features() -> None:
    x, label = correlated()
    weight, bias = fit_logistic(x[:20].repeat(1, 3), label[:20], 6, 1e-7)
    assert (F.linear(x[:20].repeat(1, 3), weight, bias).argmax(1) == label[:20]).all()


def share_of(rows: Tensor) -> Tensor:
    """Every second row on each of two ranks; all rows in a single process."""
    return rows[dist.get_rank() :: 2] if dist.is_initialized() else rows


def standardised_on_a_rank() -> tuple[Tensor, Tensor]:
    x = digits()[0][:101]
    ours, other = standardise(share_of(x), x[:3], dealt=True)
    return Deal(len(ours), ours.device).gather(ours), other


def test_dealt_features_are_standardised_by_those_of_all_ranks() -> None:
    whole = standardise(digits()[0][:101], digits()[0][:3])
    for rank in on_ranks(2, standardised_on_a_rank):
        for ours, expected in zip(rank, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def deal_on_a_rank(counts: list[int]) -> tuple[np.ndarray, Tensor, Tensor]:
    r = dist.get_rank()
    rows = torch.arange(counts[r]) * 2 + r  # the value of a row says where it was dealt
    deal = Deal(counts[r], rows.device)
    return deal.places, deal.mine(np.arange(deal.total)[::-1]), deal.gather(rows)


@pytest.mark.parametrize(("counts", "order"), [([3, 2], [0, 1, 2, 3, 4]), ([0, 3], [1, 3, 5])])
def test_rows_dealt_in_turns_come_back_in_the_order_of_the_set(
    counts: list[int], order: list[int]
) -> None:
    ranks = on_ranks(2, deal_on_a_rank, counts)
    for r, (places, mine, gathered) in enumerate(ranks):
        assert gathered.tolist() == order
        assert [order[p] for p in places] == [2 * i + r for i in range(counts[r])]
        assert mine.tolist() == list(range(counts[r]))[::-1]


def heads_on_a_rank() -> Tensor:
    features, labels, query, _ = digits()
    x, y, query = features[:101] / 16, labels[:101], query[:5] / 16
    heads = LinearHeads(64, 10, [0.05, 0.2], [0.0, 1e-3])
    deal = Deal(len(share_of(y)), y.device)
    train_heads(heads, share_of(x), share_of(y), deal, np.arange(7, 101), 3, 10, seed=4)
    return heads.logits(query)


def test_heads_trained_on_two_ranks_equal_one_process_and_the_schedule_by_hand() -> None:
    features, labels, query, _ = digits()
    x, y = features[:101] / 16, labels[:101]
    heads = LinearHeads(64, 10, [0.05, 0.2], [0.0, 1e-3])
    for epoch in range(3):
        order = 7 + permutation(94, 4, Stream.HEADS, epoch)
        for i in range(10):
            rows = order[10 * i : 10 * i + 10]
            angle = torch.tensor(torch.pi * (10 * epoch + i) / 30)
            heads.update(x[rows], y[rows], float(0.5 + 0.5 * angle.cos()))
    expected = heads.logits(query[:5] / 16)
    torch.testing.assert_close(heads_on_a_rank(), expected, rtol=1e-5, atol=1e-5)
    for logits in on_ranks(2, heads_on_a_rank):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
