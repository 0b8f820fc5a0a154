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
    assert summary["images_per_second"] * summary["seconds"] == pytest.approx(8 * 64, rel=0.01)
    printed = capsys.readouterr().out
    for word in ("at initialisation", "raw pixels", "effective peak learning rate 0.05", "Digits:"):
        assert word in printed
    for key in ("knn_top1", "linear_top1", "knn_top1_init", "linear_top1_pixels"):
        assert f"{100 * summary[key]:.1f}" in printed


def test_scores_are_those_of_the_three_encoders(tmp_path: Path) -> None:
    summary = fit_with_summary(tmp_path)
    data = tiny_data()
    data.setup()
    for suffix, model in (("_init", tiny_model()), ("", tiny_fit([]).lightning_module)):
        trainer = tiny_trainer([])
        trainer.validate(model, datamodule=data, verbose=False)  # attaches the two
        sets = encode_clean_views(trainer, model, pixels=True)
        expected = score(sets["bank"][0], sets["query"][0], 10)
        assert summary["knn_top1" + suffix] == pytest.approx(expected.knn, abs=1e-6)
        assert summary["linear_top1" + suffix] == pytest.approx(expected.linear, abs=1e-6)
    pixels = sets["bank"][1], sets["query"][1]
    assert torch.equal(pixels[0].labels, sets["bank"][0].labels)
    assert summary["knn_top1_pixels"] == pytest.approx(score(*pixels, 10).knn, abs=1e-6)


def test_two_ranks_write_the_scores_of_one(tmp_path: Path) -> None:
    one = fit_with_summary(tmp_path / "one")
    two, nothing = on_ranks(2, summary_on_a_rank, tmp_path / "two")
    assert nothing == {}
    assert (two["steps"], two["world_size"]) == (8, 2)
    for key in ("knn_top1_init", "linear_top1_init", "knn_top1_pixels"):
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
    resumed = RunSummary()
    more = tiny_trainer([resumed], max_epochs=3)
    more.fit(tiny_model(), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    after = resumed.state_dict()
    assert after["scores"]["knn_top1_init"] == before["scores"]["knn_top1_init"]
    assert after["images"] == before["images"] + 4 * 64
    assert after["seconds"] > before["seconds"]
