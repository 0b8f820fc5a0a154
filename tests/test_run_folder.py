"""`simclr fit --resume`: the run goes on in its folder, its tables and its tracker's run."""

import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from tiny import tiny_fit

from simclr_pl.callbacks import ExactCheckpoint
from simclr_pl.cli import main
from simclr_pl.run_folder import MetricsTable, Resumed, find_resumed, rewind
from simclr_pl.trackers import wandb_run

CONFIG = """
name: run
model:
  encoder: {class_path: simclr_pl.ConvEncoder, init_args: {width: 4, in_channels: 1}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}
  warmup_epochs: 0
data: {source: {class_path: simclr_pl.data.Digits}, global_batch_size: 64, bank_size: 30}
trainer: {max_epochs: 3, limit_train_batches: 4, log_every_n_steps: 1, accelerator: cpu, devices: 1,
  enable_progress_bar: false, check_val_every_n_epoch: 2, callbacks: [{class_path: KilledOnce}]}
checkpoint: {init_args: {every_n_train_steps: 2, save_last: link}}
collapse: {init_args: {every_n_steps: 1}}
pictures: null
summary: null
"""


class KilledOnce(Callback):
    """Breaks the run off within a step, before its checkpoint and its rows are written."""

    step: int | None = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == KilledOnce.step:
            KilledOnce.step = None
            raise SystemExit(9)


def fit(folder: Path, *arguments: str, killed_at: int | None = None) -> None:
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("KilledOnce", f"{__name__}.KilledOnce"))
    KilledOnce.step = killed_at
    root = ["--trainer.default_root_dir", str(folder)]
    with nullcontext() if killed_at is None else pytest.raises(SystemExit, match="9"):
        main(["fit", "--config", str(config), *root, *arguments])
    wandb.finish()


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as lines:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return [{k: v for k, v in row.items() if "throughput/" not in k} for row in rows]


def histograms(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "histograms.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_in_its_folder_as_if_uninterrupted(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    fit(whole)
    track = ["--track", "[wandb-offline,tensorboard]"]
    fit(killed, *track, "--resume", "auto", killed_at=3)  # nothing to resume: it starts
    run = killed / "run/version_0"
    number = wandb_run(run)
    assert number is not None
    fit(killed, *track, "--resume", "auto", killed_at=9)  # from step 2
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    fit(killed, *track, "--resume", str(run / "checkpoints/last.ckpt"))
    assert [f.name for f in (killed / "run").iterdir()] == ["version_0"]
    assert {f.stem for f in run.glob("wandb/*run-*/*.wandb")} == {f"run-{number}"}
    assert list(run.glob("events.out.tfevents.*"))
    expected = whole / "run/version_0"
    assert table(run) == table(expected)
    assert histograms(run) == histograms(expected)
    names = [sorted(f.name for f in (r / "checkpoints").iterdir()) for r in (run, expected)]
    assert names[0] == names[1]
    a, b = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (run, expected))
    assert a["global_step"] == b["global_step"] == 12
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in b["state_dict"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "resume" not in config  # it repeats the whole run, and other verbs take it, too
    assert config["ckpt_path"] is None


def saved(run: Path, step: int, **content: Any) -> Path:
    file = run / f"checkpoints/{step}.ckpt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}, **content}, file)
    return file


def test_auto_takes_the_newest_version_that_has_a_valid_checkpoint(tmp_path: Path) -> None:
    assert find_resumed("auto", tmp_path / "none") is None
    for n in (2, 9, 10):
        saved(tmp_path / f"version_{n}", n, loops={})
    (tmp_path / "version_11").mkdir()
    (tmp_path / "version_old").mkdir()
    found = find_resumed("auto", tmp_path)
    assert found == Resumed(tmp_path / "version_10/checkpoints/10.ckpt", 10)
    assert found.folder == tmp_path / "version_10"
    shutil.rmtree(tmp_path / "version_10/checkpoints")
    again = find_resumed("auto", tmp_path)
    assert again is not None
    assert again.step == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "no.ckpt"], "`resume` must be auto or a checkpoint; got 'no.ckpt'"),
        (["--resume", "here.ckpt"], "in its run's checkpoints/; got 'here.ckpt'"),
        (["--resume", "checkpoints/torn.ckpt"], "`resume` must be a whole checkpoint of plain"),
        (["--resume", "checkpoints/weights.ckpt"], "weights.ckpt', which has the weights alone"),
        (["--resume", "auto", "--ckpt_path", "a"], "got 'a' for `ckpt_path`"),
        (["--resume", "auto", "--checkpoint.dirpath", "d"], "got 'd' for `ckpt_path` or"),
    ],
)
def test_what_cannot_be_resumed_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here.ckpt").touch()
    weights = saved(tmp_path, 1).rename(tmp_path / "checkpoints/weights.ckpt")
    (tmp_path / "checkpoints/torn.ckpt").write_bytes(weights.read_bytes()[:-100])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace(", callbacks: [{class_path: KilledOnce}]", ""))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_table_loses_repeated_steps_and_lines_that_broke_off_and_nothing_else(
    tmp_path: Path,
) -> None:
    text = "a,b,step\n1,,0\n2,5,1\n3,,2\n4"
    (tmp_path / "metrics.csv").write_text(text)
    (tmp_path / "bad_steps.tsv").write_bytes(b"step\timage\n1\ta,\xff.png\n2\tc.png\n")
    (tmp_path / "histograms.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"st')
    rewind(tmp_path, 2)
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,b,step", "1,,0", "2,5,1"]
    assert (tmp_path / "bad_steps.tsv").read_bytes().split() == b"step image 1 a,\xff.png".split()
    assert (tmp_path / "histograms.jsonl").read_text() == '{"step": 0}\n'


def test_a_row_is_on_disk_at_once_and_a_new_column_keeps_the_old_rows(tmp_path: Path) -> None:
    first = MetricsTable(str(tmp_path), "run")
    first.log_metrics({"a": 1.0}, 0)
    run = tmp_path / "run/version_0"
    resumed = Resumed(run / "checkpoints/1.ckpt", 1)
    second = MetricsTable("elsewhere", "other", resumed)
    assert second.log_dir == str(run)
    second.log_metrics({"a": 2.0}, 1)
    second.log_metrics({"c": 3.0}, 2)
    expected = [{"a": "1.0", "step": "0"}, {"a": "2.0", "step": "1"}, {"c": "3.0", "step": "2"}]
    assert table(run) == expected


def test_a_kill_right_after_a_save_leaves_the_steps_row(tmp_path: Path) -> None:
    class KilledAfterTheSave(Checkpoint):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise SystemExit(9)

    saver = ExactCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    logger = MetricsTable(str(tmp_path), "run")
    with pytest.raises(SystemExit):
        tiny_fit([saver, KilledAfterTheSave()], enable_checkpointing=True, logger=logger)
    assert torch.load(saver.best_model_path, weights_only=True)["global_step"] == 3
    rows = table(tmp_path / "run/version_0")
    assert [row["step"] for row in rows if "train/loss" in row] == ["0", "1", "2"]
