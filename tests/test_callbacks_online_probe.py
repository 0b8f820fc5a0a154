"""The online probe: right on two ranks and in bf16, and never felt by the encoder."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import Tensor

from simclr_pl import InputError, OnlineLinearProbe
from simclr_pl.heads import LinearHeads
from simclr_pl.linear import Deal, train_heads


class Recorder(Callback):
    """Keeps what each training step returns."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append({k: v.detach().clone() for k, v in outputs.items()})


def probe_state(probe: OnlineLinearProbe) -> dict[str, Tensor]:
    assert probe.heads is not None
    return {name: value.clone() for name, value in probe.heads.state_dict().items()}


def test_probe_trains_the_heads_on_the_recorded_features() -> None:
    recorder = Recorder()
    probe = OnlineLinearProbe([0.05, 0.2], momentum=0.8, weight_decay=0.01, hidden_features=6)
    tiny_fit([recorder, probe])
    heads = LinearHeads(32, 10, [0.05, 0.2], [0.01, 0.01], 0.8, 6, online=True)
    for out in recorder.outputs:
        heads.update(out["features"], out["label"].repeat(2))
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(probe_state(probe)[name], value, rtol=0, atol=0)


def test_a_view_that_stands_in_for_anothers_has_its_own_samples_label() -> None:
    recorder, probe = Recorder(), OnlineLinearProbe(0.1)
    data = tiny_data(replace_probability=0.5)
    tiny_trainer([recorder, probe]).fit(tiny_model(), datamodule=data)
    heads, labels = (
        LinearHeads(32, 10, [0.1], [0.0], 0.9, online=True),
        data.samples("train").labels,
    )
    for out in recorder.outputs:
        assert not torch.equal(out["ids"][0], out["ids"][1])
        heads.update(out["features"], torch.from_numpy(labels[out["ids"].numpy()]).flatten())
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(probe_state(probe)[name], value, rtol=0, atol=0)


class Clean(Callback):
    """Keeps what the last validation says of the images of one loader."""

    def __init__(self, loader: int = 1) -> None:
        self.loader = loader

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.features: list[Tensor] = []
        self.label: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == self.loader:
            self.features.append(outputs["features"])
            self.label.append(outputs["label"])


def test_probe_reports_the_best_head_on_the_query_images() -> None:
    queries, probe = Clean(), OnlineLinearProbe([1e-6, 0.1])
    metrics = tiny_fit([queries, probe], max_epochs=5).callback_metrics
    label = torch.cat(queries.label)
    assert probe.heads is not None
    logits = probe.heads.logits(torch.cat(queries.features))
    top1 = [float((each.argmax(1) == label).float().mean()) for each in logits]
    best = int(np.argmax(top1))
    top5 = (logits[best].topk(5).indices == label[:, None]).any(1).float().mean()
    assert top1[0] != top1[1]
    assert float(metrics["probe/top1"]) == pytest.approx(max(top1), abs=1e-6)
    assert float(metrics["probe/top5"]) == pytest.approx(float(top5), abs=1e-6)
    assert float(metrics["probe/best_lr"]) == pytest.approx([1e-6, 0.1][best])
    assert float(metrics["probe/lr_1e-06/top1"]) == pytest.approx(top1[0], abs=1e-6)
    assert float(metrics["probe/lr_0.1/top1"]) == pytest.approx(top1[1], abs=1e-6)


def test_probe_reports_the_training_views_before_each_step() -> None:
    recorder = Recorder()
    metrics = tiny_fit([recorder, OnlineLinearProbe([0.01, 0.5])]).callback_metrics
    heads = LinearHeads(32, 10, [0.01, 0.5], [0.0, 0.0], online=True)
    for out in recorder.outputs:
        stats = heads.update(out["features"], out["label"].repeat(2))
    loss, hits, count = max(stats.tolist(), key=lambda each: each[1])
    assert float(metrics["probe/loss"]) == pytest.approx(loss / count, rel=1e-5)
    assert float(metrics["probe/train_top1"]) == pytest.approx(hits / count, rel=1e-5)


def test_one_rate_and_few_classes_have_no_further_curves() -> None:
    data = tiny_data()
    data.setup()
    for images in data._sets.values():
        images.labels[:] = images.labels % 3
    trainer = tiny_trainer([OnlineLinearProbe(0.1)], max_epochs=1)
    trainer.fit(tiny_model(), datamodule=data)
    names = {name for name in trainer.callback_metrics if name.startswith("probe/")}
    assert names == {"probe/loss", "probe/train_top1", "probe/top1", "probe/best_lr"}


def encoder_with_and_without_probe(precision: str = "32-true") -> list[dict[str, Tensor]]:
    runs: list[list[Callback]] = [[OnlineLinearProbe()], []]
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy = "ddp" if devices > 1 else "auto"
    return [
        weights(
            tiny_fit(
                callbacks,
                tiny_model(),
                devices=devices,
                strategy=strategy,
                precision=precision,
                limit_train_batches=2,
            ).lightning_module
        )
        for callbacks in runs
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_probe_leaves_the_encoder_bit_identical(precision: str) -> None:
    with_probe, without = encoder_with_and_without_probe(precision)
    assert with_probe.keys() == without.keys()
    assert all(torch.equal(with_probe[name], without[name]) for name in without)


def test_probe_leaves_the_encoder_bit_identical_on_two_ranks() -> None:
    for with_probe, without in on_ranks(2, encoder_with_and_without_probe):
        assert all(torch.equal(with_probe[name], without[name]) for name in without)


def head_on_a_rank(precision: str, unlabelled: str = "") -> tuple[dict[str, Tensor], float]:
    probe = OnlineLinearProbe()
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = tiny_trainer(
        [probe],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=precision,
    )
    trainer.fit(tiny_model(batch_norm=False), datamodule=data_without(unlabelled))
    return probe_state(probe), float(trainer.callback_metrics["probe/top1"])


def data_without(labels: str) -> Any:
    """The digits; "most" training labels hidden, or "train": all but the bank's."""
    data = tiny_data(bank_size=301)  # uneven on two ranks
    if labels:
        source, open_source = data.source, data.source.open

        def open_without() -> None:
            open_source()
            source.bank = source.bank.subset(np.arange(len(source.bank)))
            hidden = source.train.labels.copy()
            hidden[np.arange(len(hidden)) % 10 > 0 if labels == "most" else slice(None)] = -1
            source.train.labels = hidden

        source.open = open_without  # type: ignore[method-assign]
    return data


@pytest.mark.parametrize("unlabelled", ["", "most", "train"])
def test_two_ranks_train_the_heads_of_one_process(unlabelled: str) -> None:
    state, top1 = head_on_a_rank("32-true", unlabelled)
    ranks = on_ranks(2, head_on_a_rank, "32-true", unlabelled)
    for name, value in state.items():
        assert torch.equal(ranks[0][0][name], ranks[1][0][name])  # identical across ranks
        # after 120 steps with a rate of 1 rounding has grown
        tolerance = 1e-3 if unlabelled == "train" else 1e-5
        torch.testing.assert_close(ranks[0][0][name], value, rtol=tolerance, atol=tolerance)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(top1, abs=0.005)


def test_heads_are_identical_across_ranks_in_bf16() -> None:
    (state_0, _), (state_1, _) = on_ranks(2, head_on_a_rank, "bf16-mixed")
    for name, value in state_0.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state_1[name])


def test_without_training_labels_the_heads_learn_from_the_clean_bank() -> None:
    bank, queries, probe = Clean(0), Clean(1), OnlineLinearProbe([0.1])
    trainer = tiny_trainer([bank, queries, probe])
    data = data_without("train")
    trainer.fit(tiny_model(), datamodule=data)
    assert "probe/loss" not in trainer.callback_metrics
    heads = LinearHeads(32, 10, [0.1], [0.0], online=True)
    features, label = torch.cat(bank.features).half(), torch.cat(bank.label)
    train_heads(heads, features, label, Deal(301, label.device), np.arange(301), 10, 256, data.seed)
    assert torch.equal(probe_state(probe)["weights"], heads.weights)
    predicted = heads.logits(torch.cat(queries.features))[0].argmax(1)
    top1 = (predicted == torch.cat(queries.label)).float().mean()
    assert float(trainer.callback_metrics["probe/top1"]) == pytest.approx(float(top1), abs=1e-6)


def test_validation_from_a_checkpoint_gives_the_accuracy_of_the_run(tmp_path: Any) -> None:
    for unlabelled in ("", "train"):
        trainer = tiny_trainer([OnlineLinearProbe()])
        trainer.fit(tiny_model(), datamodule=data_without(unlabelled))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = tiny_trainer([OnlineLinearProbe()])
        again.validate(
            tiny_model(),
            datamodule=data_without(unlabelled),
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
            verbose=False,
        )
        for name in ("probe/top1", "probe/top5", "probe/best_lr"):
            assert again.callback_metrics[name] == trainer.callback_metrics[name]


def test_probe_continues_from_a_checkpoint(tmp_path: Any) -> None:
    whole = OnlineLinearProbe()
    tiny_fit([whole])

    class SaveAfterFirstEpoch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    tiny_fit([OnlineLinearProbe(), SaveAfterFirstEpoch()])
    resumed = OnlineLinearProbe()
    trainer = tiny_trainer([resumed])
    trainer.fit(
        tiny_model(), datamodule=tiny_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for name, value in probe_state(whole).items():
        assert torch.equal(value, probe_state(resumed)[name])


@pytest.mark.parametrize("other", [{"features": 8}, {"lr": [0.1, 0.2]}, {"hidden_features": 2}])
def test_probe_of_another_shape_is_an_error(other: dict[str, Any]) -> None:
    features = other.pop("features", 4)
    ours, theirs = OnlineLinearProbe(0.1), OnlineLinearProbe(**{"lr": 0.1, **other})
    theirs._build(features, 3, torch.device("cpu"))
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(InputError, match=r"probe must fit the features.*got heads of.*Set `data"):
        ours._build(4, 3, torch.device("cpu"))


def test_probe_without_labels_is_an_error() -> None:
    data = tiny_data()
    data.setup()
    data.source.bank.labels[:] = -1
    data.source.train.labels[:] = -1
    data._sets = {}
    data.source.open = lambda: None  # type: ignore[method-assign]
    trainer = tiny_trainer([OnlineLinearProbe()])
    with pytest.raises(InputError, match=r"online probe needs labelled.*Set `probe` to null"):
        trainer.fit(tiny_model(), datamodule=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": []}, r"`lr` must be > 0.*got \[\]. Set `probe.lr`"),
        ({"lr": 0.0}, r"`lr` must be > 0"),
        ({"lr": [0.1, 0.1]}, r"different numbers > 0"),
        ({"momentum": 1.0}, r"`momentum` must be within \[0, 1\); got 1.0. Set `probe.momentum`"),
        ({"weight_decay": -1.0}, r"`weight_decay` must be >= 0; got -1.0"),
        ({"hidden_features": 0}, r"`hidden_features` must be >= 1; got 0"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnlineLinearProbe(**options)
