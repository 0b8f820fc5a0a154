"""The report of a fit, however it ends."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import tiny_fit

from simclr_pl.callbacks import Preemption, RunReport


class At(Callback):
    """Does something at the start of a batch."""

    def __init__(self, batch: int, what: Any) -> None:
        self.batch, self.what = batch, what

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            self.what()


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Path:
    logger = CSVLogger(folder, name="run", version=0)
    tiny_fit([RunReport(), *callbacks], logger=logger, num_sanity_val_steps=0, **options)
    return folder / "run/version_0"


def test_a_fit_ends_with_a_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path)
    assert f"report: {run / 'report.html'}\n" in capsys.readouterr().out
    assert "train/loss" in (run / "report.html").read_text()
    found = json.loads((run / "environment.json").read_text())
    assert found["packages"]["torch"]
    assert "stopped" not in found


def fail() -> None:
    raise RuntimeError("a <cable> broke")


def test_a_run_that_fails_has_a_page_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cable"):
        fit(tmp_path, At(3, fail))
    run = tmp_path / "run/version_0"
    stopped = json.loads((run / "environment.json").read_text())["stopped"]
    assert stopped == {"step": 3, "reason": "RuntimeError: a <cable> broke"}
    text = (run / "report.html").read_text()
    assert "Stopped at step 3: RuntimeError: a &lt;cable&gt; broke" in text


def test_a_run_that_is_told_to_stop_has_a_page(tmp_path: Path) -> None:
    ask = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(tmp_path, ask, Preemption(), max_epochs=4, enable_checkpointing=True)
    assert "Stopped at step" in (tmp_path / "run/version_0/report.html").read_text()


def test_a_run_that_fails_before_its_first_step_has_none(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fit(tmp_path, At(0, fail))
    run = tmp_path / "run/version_0"
    assert (run / "environment.json").exists()
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, At(1, (tmp_path / "run/version_0/report.html").mkdir))
    assert "the report is not written: IsADirectoryError" in caplog.text


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    run = fit(tmp_path, fast_dev_run=True)
    assert not list(run.glob("*.html")) + list(run.glob("environment.json"))
