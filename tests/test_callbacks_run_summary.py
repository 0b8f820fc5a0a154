"""The summary: true scores, true counts, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from ranks import on_ranks
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights

import simclr_pl
from simclr_pl import RunSummary
from simclr_pl.callbacks import EvaluationPace
from simclr_pl.callbacks.flops import batch_flops
from simclr_pl.evaluation import encode_clean_views, score


def fit_with_summary(folder: Path, **options: Any) -> dict[str, Any]:
    trainer = tiny_fit([RunSummary()], logger=CSVLogger(folder, name="run", version=0), **options)
    if not trainer.is_global_zero:
        return {}
    result: dict[str, Any] = json.loads((folder / "run/version_0/summary.json").read_text())
    return result


def test_summary_holds_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = fit_with_summary(tmp_path)
    assert summary["steps"] == 8
    assert summary["global_batch_size"] == 64
    assert summary["world_size"] == 1
    assert summary["version"] == simclr_pl.__version__
    # Both are rounded in the file.
    assert summary["samples_per_second"] * summary["seconds"] == pytest.approx(8 * 64, rel=0.01)
    assert list(summary["time"]) == ["data", "augment", "compute", "monitors", "other"]
    assert sum(summary["time"].values()) == pytest.approx(1, abs=1e-3)
    assert summary["time"]["compute"] > 0.1
    assert summary["peak_memory_mib"] > 50
    printed = capsys.readouterr().out
    share, memory = summary["time"]["compute"], summary["peak_memory_mib"]
    assert f", {100 * share:.0f} % compute, " in printed
    assert f"; peak memory {memory:,.0f} MiB" in printed
    step = batch_flops(tiny_trainer([]), tiny_model(), {"views": torch.rand(128, 1, 32, 32)})
    assert summary["gflops"] * summary["seconds"] == pytest.approx(8 * step / 1e9, rel=0.01)
    share = 100 * summary["flop_utilisation"]
    assert f"{summary['gflops']:,.1f} GFLOP/s in encoder and head, {share:.0f} % of what" in printed
    for word in ("at initialisation", "raw pixels", "effective peak learning rate 0.05", "Digits:"):
        assert word in printed
    for key in ("knn_top1", "linear_top1", "knn_top1_init", "linear_top1_raw"):
        assert f"{100 * summary[key]:.1f}" in printed


def test_scores_are_those_of_the_three_encoders(tmp_path: Path) -> None:
    summary = fit_with_summary(tmp_path)
    data = tiny_data()
    data.setup()
    for suffix, model in (("_init", tiny_model()), ("", tiny_fit([]).lightning_module)):
        trainer = tiny_trainer([])
        trainer.validate(model, datamodule=data, verbose=False)  # attaches the two
        sets = encode_clean_views(trainer, model, raw=True)
        expected = score(sets["bank"][0], sets["query"][0], 10)
        assert summary["knn_top1" + suffix] == pytest.approx(expected.knn, abs=1e-6)
        assert summary["linear_top1" + suffix] == pytest.approx(expected.linear, abs=1e-6)
    pixels = sets["bank"][1], sets["query"][1]
    assert torch.equal(pixels[0].labels, sets["bank"][0].labels)
    assert summary["knn_top1_raw"] == pytest.approx(score(*pixels, 10).knn, abs=1e-6)


def test_two_ranks_write_the_scores_of_one(tmp_path: Path) -> None:
    one = fit_with_summary(tmp_path / "one")
    two, nothing = on_ranks(2, summary_on_a_rank, tmp_path / "two")
    assert nothing == {}
    assert (two["steps"], two["world_size"]) == (8, 2)
    for key in ("knn_top1_init", "linear_top1_init", "knn_top1_raw"):
        assert two[key] == pytest.approx(one[key], abs=1 / 450 + 1e-6)


def summary_on_a_rank(folder: Path) -> dict[str, Any]:
    return fit_with_summary(folder, devices=2, strategy="ddp")


def test_summary_leaves_the_encoder_bit_identical() -> None:
    with_summary = weights(tiny_fit([RunSummary()], fast_dev_run=True).lightning_module)
    without = weights(tiny_fit([], fast_dev_run=True).lightning_module)
    assert all(torch.equal(with_summary[name], without[name]) for name in without)


def test_unlabelled_images_give_a_summary_without_scores(tmp_path: Path) -> None:
    data = tiny_data()
    data.source.open()
    data.source.bank.labels[:] = -1
    data.source.open = lambda: None  # type: ignore[method-assign]
    trainer = tiny_trainer([RunSummary()], logger=CSVLogger(tmp_path, name="run", version=0))
    trainer.fit(tiny_model(), datamodule=data)
    summary = json.loads((tmp_path / "run/version_0/summary.json").read_text())
    assert summary["steps"] == 8
    assert not any("top1" in key for key in summary)


def test_resumed_run_keeps_baselines_and_clock(tmp_path: Path) -> None:
    trainer = tiny_fit([RunSummary()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = trainer.callbacks[0].state_dict()  # type: ignore[attr-defined]
    assert before["batches"] == 8
    resumed = RunSummary()
    more = tiny_trainer([resumed], max_epochs=3)
    more.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    after = resumed.state_dict()
    assert after["scores"]["knn_top1_init"] == before["scores"]["knn_top1_init"]
    assert after["samples"] == before["samples"] + 4 * 64
    assert after["batches"] == 12
    assert after["peak_mib"] >= before["peak_mib"] > 0
    for part in ("wait", "augment", "compute", "evaluation"):
        assert after["time"][part] > before["time"][part] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "evaluated every epoch"),
        ({"check_val_every_n_epoch": 3}, "evaluated every 3 epochs"),
        (
            {"check_val_every_n_epoch": 2, "val_check_interval": 0.5},
            "evaluated every 2 epochs, within it every 2 batches",
        ),
        ({"check_val_every_n_epoch": None, "val_check_interval": 7}, "evaluated every 7 batches"),
        (
            {"check_val_every_n_epoch": None, "val_check_interval": "00:00:10:00"},
            "evaluated by the clock",
        ),
        ({"limit_val_batches": 0}, "not evaluated while it trains"),
        ({"callbacks": [EvaluationPace()]}, "evaluated every 49 epochs and after the last step"),
    ],
)
def test_it_says_how_often_the_run_is_evaluated(
    options: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(options)  # 750 images, 3 * 2 * 4 * 64 forward passes of training an epoch
    callbacks = [*options.pop("callbacks", []), RunSummary(baselines=False)]
    tiny_fit(callbacks, max_epochs=1, num_sanity_val_steps=0, **options)
    assert f"precision 32-true; {text}\n" in capsys.readouterr().out


def peak_on_a_rank(folder: Path) -> float:
    block = torch.ones((1 + torch.distributed.get_rank()) * 300 * 2**18)  # 300 MiB, 600 MiB
    summary = RunSummary(baselines=False)
    options = {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    tiny_fit([summary], devices=2, strategy="ddp", **options)
    assert block[-1] == 1
    return float(summary.state_dict()["peak_mib"])


def test_the_peak_is_that_of_the_rank_with_the_most(tmp_path: Path) -> None:
    first, second = on_ranks(2, peak_on_a_rank, tmp_path)
    assert first == second > 600
