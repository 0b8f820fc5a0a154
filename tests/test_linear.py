"""The linear classifier against scikit-learn."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from simclr_pl.linear import linear_predict


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
