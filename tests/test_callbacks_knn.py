"""The kNN monitor: clean features, exact on two ranks, right in bf16."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import Tensor

from simclr_pl import InputError, KNNMonitor, SimCLR


def knn_by_hand(model: SimCLR, k: int, temperature: float, top: int = 1) -> float:
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
        named = [c for c in np.argsort(-votes)[:top] if votes[c] > 0]
        hits += int(truth.item() in named)
    return hits / len(query)


def test_knn_of_a_trained_encoder_equals_a_vote_by_hand() -> None:
    trainer = tiny_fit([KNNMonitor(k=7, temperature=0.1)])
    by_hand = knn_by_hand(trainer.lightning_module, 7, 0.1)
    assert float(trainer.callback_metrics["knn/top1"]) == pytest.approx(by_hand, abs=1 / 450)


PRECISIONS = ("32-true", "bf16-mixed")


def knn_on_a_rank(**options: Any) -> list[dict[str, float]]:
    found = []
    for precision in PRECISIONS:
        # 299 bank images and 7 to a batch: neither falls evenly on two ranks
        trainer = tiny_trainer([KNNMonitor(k=[20, 50])], precision=precision, **options)
        data = tiny_data(bank_size=299, eval_batch_size=7)
        trainer.validate(tiny_model(), datamodule=data, verbose=False)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    return found


def knn_on_two_ranks() -> list[dict[str, float]]:
    return knn_on_a_rank(devices=torch.distributed.get_world_size(), strategy="ddp")


def test_two_ranks_report_what_one_process_does() -> None:
    expected = knn_on_a_rank()
    first, second = on_ranks(2, knn_on_two_ranks)
    assert first == second
    for one, two in zip(expected, first, strict=True):
        assert one == pytest.approx(two, abs=1 / 450)
        assert one.keys() == {"knn/top1", "knn/top5", "knn/k50/top1"}
        assert one["knn/top1"] > 0.13  # chance is 0.1


def test_monitor_leaves_the_encoder_bit_identical() -> None:
    with_knn = weights(tiny_fit([KNNMonitor()]).lightning_module)
    without = weights(tiny_fit([]).lightning_module)
    assert all(torch.equal(with_knn[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be >= 1; got 0"),
        ({"k": [20, 0]}, r"`k` must be >= 1; got \[20, 0\]"),
        ({"k": []}, r"`k` must be >= 1; got \[\]"),
        ({"temperature": 0.0}, "`temperature` must be > 0; got 0.0"),
        ({"chunk": 0}, "`chunk` must be >= 1; got 0"),
    ],
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


def test_one_rank_holds_half_precision_of_its_own_bank_and_nothing_after() -> None:
    held: list[tuple[int, torch.dtype]] = []

    class Watched(KNNMonitor):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            parts = [weakref.ref(part) for part in self._bank._features]
            held.extend((len(part), part.dtype) for part in self._bank._features)
            sizes = {p.untyped_storage().nbytes() - p.nbytes for p in self._bank._features}
            assert sizes == {0}  # no views that would hold float batches
            super().on_validation_epoch_end(trainer, pl_module)
            gc.collect()
            assert not any(part() is not None for part in parts)
            halves = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.float16]
            assert not halves

    tiny_trainer([Watched()]).validate(tiny_model(), datamodule=tiny_data(), verbose=False)
    assert {dtype for _, dtype in held} == {torch.float16}
    assert sum(rows for rows, _ in held) == 300


def test_several_k_are_voted_on_in_one_search() -> None:
    trainer = tiny_fit([KNNMonitor(k=[7, 20, 1000, 7])])
    names = {name for name in trainer.callback_metrics if name.startswith("knn/")}
    assert names == {"knn/top1", "knn/top5", "knn/k20/top1", "knn/k1000/top1"}
    for name, k in (("knn/top1", 7), ("knn/k20/top1", 20), ("knn/k1000/top1", 300)):
        by_hand = knn_by_hand(trainer.lightning_module, k, 0.07)
        assert float(trainer.callback_metrics[name]) == pytest.approx(by_hand, abs=1 / 450)


def test_top5_counts_the_five_classes_with_most_votes() -> None:
    trainer = tiny_fit([KNNMonitor(k=7, temperature=0.1)])
    by_hand = knn_by_hand(trainer.lightning_module, 7, 0.1, 5)
    assert float(trainer.callback_metrics["knn/top5"]) == pytest.approx(by_hand, abs=1 / 450)
    assert by_hand > knn_by_hand(trainer.lightning_module, 7, 0.1) + 0.1


def test_five_classes_have_no_top5() -> None:
    data = tiny_data()
    data.source.open()
    for images in (data.source.train, data.source.bank, data.source.query):
        images.labels[:] //= 2
    data.source.open = lambda: None  # type: ignore[method-assign]
    trainer = tiny_trainer([KNNMonitor()])
    trainer.validate(tiny_model(), datamodule=data, verbose=False)
    assert {n for n in trainer.callback_metrics if n.startswith("knn/")} == {"knn/top1"}


class Steps(Callback):
    """After which steps a validation voted, and what came of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["knn/top1"])))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [8, 16]),
        ({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 5}, [5, 10]),
    ],
)
def test_it_runs_every_n_epochs_or_every_n_steps(options: Any, steps: list[int]) -> None:
    watch = Steps()
    tiny_fit([KNNMonitor(), watch], num_sanity_val_steps=0, **options)
    assert [step for step, _ in watch.seen] == steps
    assert len({top1 for _, top1 in watch.seen}) == 2  # not the same features again


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    class Saved(Steps):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 4:  # the end of an epoch, between validations
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    whole, resumed = Saved(), Steps()
    options = {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 3}
    tiny_fit([KNNMonitor(), whole], num_sanity_val_steps=0, **options)
    trainer = tiny_trainer([KNNMonitor(), resumed], num_sanity_val_steps=0, **options)
    trainer.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=tmp_path / "mid.ckpt")
    assert [step for step, _ in whole.seen] == [3, 6, 9, 12]
    assert resumed.seen == whole.seen[1:]


def test_one_line_says_the_memory_once(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_fit([KNNMonitor(chunk=512)], max_epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "kNN bank" in line]
    width = tiny_model().num_features
    mib = f"{300 * width * 2 / 2**20:.1f}"
    assert lines == [
        f"kNN bank of 300 images x {width} features: {mib} MiB on each rank in half precision, "
        "2.0 MiB for similarities"
    ]


def test_the_test_set_is_scored_as_in_validation() -> None:
    trainer = tiny_trainer([KNNMonitor()])
    validated = trainer.validate(tiny_model(), datamodule=tiny_data(), verbose=False)[0]
    tested = trainer.test(tiny_model(), datamodule=tiny_data(), verbose=False)
    top1 = {name: value for result in tested for name, value in result.items() if "knn" in name}
    assert top1["knn/top1"] == validated["knn/top1"]


def test_unlabelled_queries_are_left_out() -> None:
    data = tiny_data()
    data.source.open()
    data.source.query.labels[100:] = -1
    data.source.open = lambda: None  # type: ignore[method-assign]
    trainer = tiny_trainer([KNNMonitor(k=7, temperature=0.1)])
    metrics = trainer.validate(tiny_model(), datamodule=data, verbose=False)[0]
    assert metrics["knn/top1"] * 100 == pytest.approx(round(metrics["knn/top1"] * 100), abs=1e-4)
    data.source.query.labels[:] = -1
    with pytest.raises(InputError, match="kNN monitor needs labelled images"):
        trainer.validate(tiny_model(), datamodule=data, verbose=False)
