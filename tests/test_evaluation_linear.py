"""The linear protocol against scikit-learn, on one rank and on two."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from simclr_pl import InputError
from simclr_pl.evaluation.features import Labelled
from simclr_pl.evaluation.linear import LinearResult, hold_out, linear_protocol
from simclr_pl.metrics import wilson_interval

SGD: dict[str, Any] = {"method": "sgd", "epochs": 20, "batch_size": 64}


def share_of(rows: Tensor) -> Tensor:
    """Every second row on each of two ranks; all rows in a single process."""
    return rows[dist.get_rank() :: 2] if dist.is_initialized() else rows


def digits(classes: int = 10) -> tuple[Labelled, Labelled]:
    """scikit-learn's digits, about 1,000 to fit and 797 to score, an odd number of both."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    bank, query = (
        Labelled(share_of(rows[label < classes]), share_of(label[label < classes]))
        for rows, label in ((x[:1001], y[:1001]), (x[1000:], y[1000:]))
    )
    return bank, query


def sklearn_top1(bank: Labelled, query: Labelled, l2: float) -> float:
    scaler = StandardScaler().fit(bank.features.double().numpy())
    model = LogisticRegression(C=1 / l2, max_iter=2000)
    model.fit(scaler.transform(bank.features.double().numpy()), bank.labels.numpy())
    return float(
        model.score(scaler.transform(query.features.double().numpy()), query.labels.numpy())
    )


@pytest.mark.parametrize("options", [{}, SGD])
def test_protocol_is_within_half_a_point_of_sklearn(options: dict[str, Any]) -> None:
    bank, query = digits()
    result = linear_protocol(bank, query, 10, **options)
    best = linear_protocol(bank, query, 10).chosen["l2"]  # SGD has no l2 of its own
    assert abs(result.top1.value - sklearn_top1(bank, query, best)) <= 0.005
    assert result.top5 is not None
    assert 0.98 < result.top5.value < 1
    assert (result.bank, result.held_out, result.query) == (1001, 100, 797)


def test_held_out_accuracies_are_those_of_sklearn_fitted_without_them() -> None:
    bank, query = digits()
    held = hold_out(bank.labels)
    rest = np.setdiff1d(np.arange(1001), held)
    parts = [Labelled(bank.features[rows], bank.labels[rows]) for rows in (rest, held)]
    result = linear_protocol(bank, query, 10, l2=[3.0, 3000.0])
    assert [option["l2"] for option in result.grid] == [3000.0, 3.0]
    for option in result.grid:
        assert abs(option["held_out"] - sklearn_top1(*parts, option["l2"])) <= 0.011  # of 100
    best = max(result.grid, key=lambda option: option["held_out"])
    assert result.chosen == {"l2": best["l2"]}
    assert result.grid[0]["held_out"] != result.grid[1]["held_out"]


def test_intervals_are_wilsons() -> None:
    result = linear_protocol(*digits(), 10, l2=[30.0])
    hits = round(result.top1.value * 797)
    assert (result.top1.low, result.top1.high) == wilson_interval(hits, 797)


@pytest.mark.parametrize("options", [{}, SGD])
def test_the_choice_uses_no_query_label(options: dict[str, Any]) -> None:
    bank, query = digits()
    result = linear_protocol(bank, query, 10, **options)
    wrong = linear_protocol(bank, Labelled(query.features, (query.labels + 1) % 10), 10, **options)
    assert (wrong.chosen, wrong.grid) == (result.chosen, result.grid)
    assert wrong.top1.value < 0.1 < result.top1.value


@pytest.mark.parametrize("options", [{}, SGD])
def test_the_final_classifier_is_fitted_on_the_whole_bank(options: dict[str, Any]) -> None:
    bank, query = digits()
    held = hold_out(bank.labels)
    labels = bank.labels.clone()
    labels[held] = (labels[held] + 1) % 10
    one = {"l2": [10.0], "lr": [0.03], "weight_decay": [0.0], **options}
    right = linear_protocol(bank, query, 10, **one)
    wrong = linear_protocol(Labelled(bank.features, labels), query, 10, **one)
    assert wrong.top1.value < right.top1.value - 0.01


def result_on_a_rank(options: dict[str, Any]) -> LinearResult:
    return linear_protocol(*digits(), 10, **options)


@pytest.mark.parametrize("options", [{"l2": [300.0, 10.0]}, {**SGD, "epochs": 5}])
def test_two_ranks_equal_one_process(options: dict[str, Any]) -> None:
    one = result_on_a_rank(options)
    ranks = on_ranks(2, result_on_a_rank, options)
    assert ranks[0] == ranks[1]
    assert ranks[0][3:] == one[3:]  # grid and counts
    assert ranks[0].chosen == one.chosen
    assert abs(ranks[0].top1.value - one.top1.value) <= 1.01 / 797


def test_hold_out_takes_a_tenth_of_each_class_and_depends_on_the_seed() -> None:
    labels = torch.arange(7).repeat_interleave(torch.tensor([10, 100, 40, 30, 20, 200, 3]))
    held = hold_out(labels)
    assert (np.diff(held) > 0).all()
    counts = torch.bincount(labels[held], minlength=7).tolist()
    assert counts[:6] == pytest.approx([1, 10, 4, 3, 2, 20], abs=1)
    assert sum(counts) == 40
    assert np.array_equal(held, hold_out(labels))
    assert not np.array_equal(held, hold_out(labels, seed=1))


def test_five_classes_have_no_top_5() -> None:
    assert linear_protocol(*digits(5), 5, l2=[10.0]).top5 is None


@pytest.mark.parametrize(("options", "total"), [({"l2": [1.0, 2.0]}, 3), (SGD, 20 * (15 + 16))])
def test_progress_counts_all_work(options: dict[str, Any], total: int) -> None:
    seen: list[tuple[int, int]] = []
    linear_protocol(*digits(), 10, **options, progress=lambda *now: seen.append(now))
    assert seen == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": [0.0]}, r"`l2` must be numbers > 0; got \[0.0\]. Set `l2`"),
        ({"lr": []}, r"`lr` must be numbers > 0; got \[\]"),
        ({"weight_decay": [-1.0]}, r"`weight_decay` must be numbers >= 0; got \[-1.0\]"),
        ({"epochs": 0}, r"`epochs` must be >= 1; got 0"),
        ({"batch_size": 0}, r"`batch_size` must be >= 1; got 0"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_protocol(*digits(), 10, **options)


def test_no_labelled_images_is_an_error() -> None:
    bank, query = digits()
    none = Labelled(torch.empty(0, 64), torch.empty(0, dtype=torch.int64))
    for sets in ((none, query), (bank, none)):
        with pytest.raises(InputError, match=r"needs at least 2 labelled bank samples and 1 query"):
            linear_protocol(*sets, 10)
