"""The online probe: right on two ranks and in bf16, and never felt by the encoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import Tensor, nn

from simclr_pl import InputError, OnlineLinearProbe


class Recorder(Callback):
    """Keeps what each training step returns."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append({k: v.detach().clone() for k, v in outputs.items()})


def probe_state(probe: OnlineLinearProbe) -> tuple[Tensor, Tensor]:
    assert probe.head is not None
    return probe.head.weight.detach().clone(), probe.head.bias.detach().clone()


def test_probe_equals_torch_sgd_on_the_recorded_features() -> None:
    recorder, probe = Recorder(), OnlineLinearProbe(lr=0.2, momentum=0.8, weight_decay=0.01)
    tiny_fit([recorder, probe])
    torch.manual_seed(0)
    head = nn.Linear(32, 10)
    solver = torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01)
    for out in recorder.outputs:
        solver.zero_grad()
        F.cross_entropy(head(out["features"]), out["label"].repeat(2)).backward()
        solver.step()
    weight, bias = probe_state(probe)
    torch.testing.assert_close(weight, head.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, head.bias.detach(), rtol=1e-5, atol=1e-6)


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


def head_on_a_rank(precision: str) -> tuple[tuple[Tensor, Tensor], float]:
    probe = OnlineLinearProbe()
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = tiny_fit(
        [probe],
        tiny_model(batch_norm=False),
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=precision,
    )
    return probe_state(probe), float(trainer.callback_metrics["probe/top1"])


def test_two_ranks_train_the_head_of_one_process() -> None:
    (weight, bias), top1 = head_on_a_rank("32-true")
    ranks = on_ranks(2, head_on_a_rank, "32-true")
    assert torch.equal(ranks[0][0][0], ranks[1][0][0])  # identical across ranks
    assert torch.equal(ranks[0][0][1], ranks[1][0][1])
    torch.testing.assert_close(ranks[0][0][0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks[0][0][1], bias, rtol=1e-5, atol=1e-5)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(top1, abs=0.005)


def test_heads_are_identical_across_ranks_in_bf16() -> None:
    ((weight_0, bias_0), _), ((weight_1, bias_1), _) = on_ranks(2, head_on_a_rank, "bf16-mixed")
    assert weight_0.dtype == torch.float32
    assert torch.equal(weight_0, weight_1)
    assert torch.equal(bias_0, bias_1)


def update_with_nan_on_rank_1() -> tuple[bool, bool]:
    probe = OnlineLinearProbe()
    probe._build(4, 3, torch.device("cpu"))
    features, label = torch.ones(5, 4), torch.tensor([0, 1, 2, -1, 0])
    start = probe_state(probe)
    features[0, 0] = torch.nan if torch.distributed.get_rank() == 1 else 1.0
    probe._update(features, label)
    skipped = all(torch.equal(a, b) for a, b in zip(start, probe_state(probe), strict=True))
    probe._update(torch.ones(5, 4), label)
    moved = not torch.equal(start[0], probe_state(probe)[0])
    return skipped, moved


def test_a_nan_on_one_rank_skips_the_update_on_all() -> None:
    assert on_ranks(2, update_with_nan_on_rank_1) == [(True, True), (True, True)]


def test_unlabelled_rows_are_ignored() -> None:
    probes = [OnlineLinearProbe(), OnlineLinearProbe()]
    features, label = torch.randn(6, 4), torch.tensor([0, -1, 2, 1, -1, 0])
    for probe, rows in zip(probes, (torch.arange(6), label >= 0), strict=True):
        probe._build(4, 3, torch.device("cpu"))
        stats = probe._update(features[rows], label[rows])
        assert stats[2] == 4
    torch.testing.assert_close(probe_state(probes[0]), probe_state(probes[1]))


def test_a_batch_without_labels_changes_nothing() -> None:
    probe = OnlineLinearProbe()
    probe._build(4, 3, torch.device("cpu"))
    start = probe_state(probe)
    probe._update(torch.randn(3, 4), torch.full((3,), -1))
    torch.testing.assert_close(probe_state(probe), start, rtol=0, atol=0)


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
    for a, b in zip(probe_state(whole), probe_state(resumed), strict=True):
        assert torch.equal(a, b)


def test_probe_of_another_width_is_an_error() -> None:
    small, large = OnlineLinearProbe(), OnlineLinearProbe()
    small._build(4, 3, torch.device("cpu"))
    large.load_state_dict(small.state_dict())
    with pytest.raises(InputError, match=r"got \(3, 4\) in the checkpoint for \(3, 8\)"):
        large._build(8, 3, torch.device("cpu"))


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


def test_probe_learns_separable_features() -> None:
    probe = OnlineLinearProbe(lr=0.5)
    probe._build(3, 3, torch.device("cpu"))
    label = torch.arange(3).repeat(20)
    for _ in range(50):
        stats = probe._update(F.one_hot(label, 3).float(), label)
    assert stats[1] == stats[2] == 60
