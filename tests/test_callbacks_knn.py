"""The kNN monitor: clean features, exact on two ranks, right in bf16."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import Tensor

from simclr_pl import InputError, KNNMonitor, SimCLR


def knn_by_hand(model: SimCLR, k: int, temperature: float) -> float:
    """Votes query by query, in float64, with features in evaluation mode."""
    data = tiny_data()
    data.setup()
    sets: list[tuple[Tensor, Tensor]] = []
    for name, loader in zip(("bank", "query"), data.val_dataloader(), strict=True):
        batches = [data.make_views(batch, name) for batch in loader]
        with torch.no_grad():
            features = torch.cat([model.eval()(b["views"])[b["index"] >= 0] for b in batches])
        labels = torch.cat([b["label"][b["index"] >= 0] for b in batches])
        sets.append((torch.nn.functional.normalize(features.double(), dim=1), labels))
    (bank, bank_labels), (query, query_labels) = sets
    hits = 0
    for row, truth in zip(query, query_labels, strict=True):
        similarity = bank @ row
        nearest = similarity.argsort(descending=True)[:k]
        votes = np.zeros(10)
        for j in nearest:
            votes[bank_labels[j]] += np.exp(similarity[j].item() / temperature)
        hits += int(votes.argmax() == truth.item())
    return hits / len(query)


def test_knn_of_a_trained_encoder_equals_a_vote_by_hand() -> None:
    trainer = tiny_fit([KNNMonitor(k=7, temperature=0.1)])
    by_hand = knn_by_hand(trainer.lightning_module, 7, 0.1)
    assert float(trainer.callback_metrics["knn/top1"]) == pytest.approx(by_hand, abs=1 / 450)


def knn_on_a_rank(precision: str) -> float:
    world_size = torch.distributed.get_world_size()
    trainer = tiny_trainer([KNNMonitor()], devices=world_size, strategy="ddp", precision=precision)
    (metrics, *_) = trainer.validate(tiny_model(), datamodule=tiny_data(), verbose=False)
    return float(metrics["knn/top1"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_ranks_report_what_one_process_does(precision: str) -> None:
    one = tiny_trainer([KNNMonitor()], precision=precision)
    expected = float(
        one.validate(tiny_model(), datamodule=tiny_data(), verbose=False)[0]["knn/top1"]
    )
    first, second = on_ranks(2, knn_on_a_rank, precision)
    assert first == second == pytest.approx(expected, abs=1 / 450)
    assert expected > 0.13  # chance is 0.1


def test_monitor_leaves_the_encoder_bit_identical() -> None:
    with_knn = weights(tiny_fit([KNNMonitor()]).lightning_module)
    without = weights(tiny_fit([]).lightning_module)
    assert all(torch.equal(with_knn[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "`k` must be >= 1; got 0"), ({"temperature": 0.0}, "`temperature` must be > 0")],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KNNMonitor(**options)


def test_monitor_without_labels_is_an_error() -> None:
    data = tiny_data()
    data.source.open()
    data.source.bank.labels[:] = -1
    data.source.open = lambda: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"kNN monitor needs labelled images.*Set `knn` to null"):
        tiny_trainer([KNNMonitor()]).fit(tiny_model(), datamodule=data)
