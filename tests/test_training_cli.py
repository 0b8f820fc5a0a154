"""`simclr fit` and its like as a user meets them: runs, files, overrides and errors."""

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image
from ranks import processes_of
from trained import simclr

from simclr_pl.callbacks import EvaluationPace
from simclr_pl.cli import main
from simclr_pl.training_cli import _MONITORS, SimCLRCLI

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--config", str(CONFIGS / "quickstart.yaml"), "--model.encoder.width", "4"]
SHORT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"]
SHORT += ["--trainer.log_every_n_steps", "1", "--throughput.every_n_steps", "1"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.check_val_every_n_epoch", "1"]


def fit(folder: Path, *arguments: str) -> Path:
    main(["fit", *QUICK, *SHORT, *QUIET, "--trainer.default_root_dir", str(folder), *arguments])
    return max((folder / "quickstart").iterdir(), key=lambda p: int(p.name.split("_")[1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.argv = ["simclr"]
    return fit(tmp_path_factory.mktemp("runs"))


def test_run_folder_holds_config_metrics_checkpoint_and_summary(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["encoder"]["init_args"]["width"] == 4
    assert config["seed_everything"] == 0
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "train/learning_rate", "knn/top1", "probe/top1"} <= logged
    assert {"throughput/data", "throughput/samples_per_second", "data/unreadable"} <= logged
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    summary = json.loads((run / "summary.json").read_text())
    assert {
        "knn_top1",
        "linear_top1",
        "knn_top1_init",
        "knn_top1_raw",
        "samples_per_second",
        "steps",
        "seconds",
        "time",
        "peak_memory_mib",
        "global_batch_size",
        "version",
    } <= summary.keys()


def test_saved_config_repeats_the_run_bit_for_bit(run: Path, tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    main(["fit", "--config", str(run / "config.yaml"), *root])
    first, second = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, tmp_path / "quickstart/version_0")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validate_test_and_predict_take_the_checkpoint(run: Path, tmp_path: Path) -> None:
    common = [*QUICK, *QUIET, "--trainer.default_root_dir", str(tmp_path)]
    common += ["--ckpt_path", str(run / "checkpoints/last.ckpt")]
    main(["validate", *common])
    main(["test", *common])
    main(["predict", *common])
    with open(run / "metrics.csv") as file:
        trained = [row for row in csv.DictReader(file) if row["knn/top1"]][-1]
    for folder in ("version_0", "version_1"):
        with open(tmp_path / "quickstart" / folder / "metrics.csv") as file:
            (row,) = csv.DictReader(file)
        for key in ("knn/top1", "probe/top1"):
            assert float(row[key]) == pytest.approx(float(trained[key]), abs=1e-6)
    with np.load(tmp_path / "quickstart/version_2/features.npz") as table:
        assert table["features"].shape == (450, 32)


def test_later_configs_and_the_command_line_override(tmp_path: Path) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("data:\n  global_batch_size: 64\nmodel:\n  temperature: 0.3\n")
    folder = fit(tmp_path, "--config", str(extra), "--model.temperature", "0.4")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["global_batch_size"] == 64
    assert config["model"]["temperature"] == 0.4
    assert config["model"]["encoder"]["init_args"]["width"] == 4


def test_seed_reaches_data_and_model_and_changes_the_run(run: Path, tmp_path: Path) -> None:
    other = fit(tmp_path, "--seed_everything", "5")
    a, b = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (run, other)
    )
    assert (a["hyper_parameters"]["seed"], b["hyper_parameters"]["seed"]) == (0, 5)
    weight = "encoder.0.weight"
    assert not torch.equal(a["state_dict"][weight], b["state_dict"][weight])


def test_trackers_write_beside_the_csv(tmp_path: Path) -> None:
    folder = fit(tmp_path, "--track", "[wandb-offline,tensorboard]")
    wandb.finish()  # as the end of the process does
    assert (folder / "metrics.csv").stat().st_size > 0
    assert list(folder.glob("events.out.tfevents.*"))
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # wandb's own process writes, when the machine lets it
    while b"knn/top1" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"knn/top1" in content


def test_monitors_can_be_switched_off(tmp_path: Path) -> None:
    folder = fit(tmp_path, *(a for k in ("probe", "knn", "checkpoint") for a in (f"--{k}", "null")))
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "knn/top1" not in header
    assert "probe" not in header
    assert not (folder / "checkpoints").exists()


class Built(SimCLRCLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize(
    ("verb", "given", "epochs", "interval"),
    [
        ("fit", [], "auto", 1.0),
        ("fit", ["check_val_every_n_epoch", "3"], 3, 1.0),
        ("fit", ["val_check_interval", "0.5"], 1, 0.5),  # of each epoch
        ("fit", ["val_check_interval", "70"], None, 70),
        ("fit", ["check_val_every_n_epoch", "1", "val_check_interval", "7"], 1, 7),
        ("validate", [], 1, 1.0),
    ],
)
def test_evaluation_is_as_often_as_given_or_else_at_its_own_pace(
    verb: str, given: list[str], epochs: Any, interval: Any
) -> None:
    options = [f"--trainer.{word}" if i % 2 == 0 else word for i, word in enumerate(given)]
    unset = ["--trainer.check_val_every_n_epoch", "null"]  # the config's own
    trainer = Built([verb, *QUICK, *unset, *options]).trainer
    paced = any(isinstance(callback, EvaluationPace) for callback in trainer.callbacks)
    assert paced == (epochs == "auto")
    if not paced:
        assert trainer.check_val_every_n_epoch == epochs
    assert trainer.val_check_interval == interval


def test_a_run_at_its_own_pace_is_evaluated_and_checkpointed_and_keeps_null(tmp_path: Path) -> None:
    epochs = ["--trainer.check_val_every_n_epoch", "null", "--trainer.max_epochs", "3"]
    every = ["--checkpoint.save_top_k", "-1", "--checkpoint.every_n_epochs", "1"]
    folder = fit(tmp_path, *epochs, *every)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["check_val_every_n_epoch"] is None
    with open(folder / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["knn/top1"]]
    assert steps == [8]  # the last of 9
    assert len(list((folder / "checkpoints").glob("epoch=*.ckpt"))) == 3


# Errors.


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *QUICK, *SHORT, *QUIET, *arguments])
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr[stderr.index("error:") :].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.temperature", "0"],
            "`temperature` must be > 0; got 0.0. Set `model.temperature`",
        ),
        (["--data.global_batch_size", "2000"], "got 1347 images for `global_batch_size` 2000"),
        (["--data.source", "ImageFolder", "--data.source.root", "/nowhere"], "does not exist"),
        (
            ["--model.encoder", "simclr_pl.Encoder", "--model.encoder.name", "resnet19"],
            "got 'resnet19'",
        ),
        (["--data.global_batch_size", "0"], "`global_batch_size` must be >= 1; got 0"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(capsys, *arguments, "--trainer.default_root_dir", str(tmp_path))
    assert message in error
    assert "\n" not in error


def test_empty_and_unlabelled_folders_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--data.source", "ImageFolder", "--data.source.root", str(tmp_path / "images")]
    common = [*source, "--data.source.grey", "true", "--data.global_batch_size", "4"]
    common += ["--trainer.default_root_dir", str(tmp_path / "runs"), "--data.num_workers", "0"]
    (tmp_path / "images").mkdir()
    assert f"got none under '{tmp_path / 'images'}'" in error_of(capsys, *common)
    for i in range(8):
        Image.new("L", (32, 32), i).save(tmp_path / "images" / f"{i}.png")
    assert "needs labelled images; got none. Set `probe` to null" in error_of(capsys, *common)
    assert "needs labelled images; got none. Set `knn` to null" in error_of(
        capsys, *common, "--probe", "null"
    )


def test_checkpoint_of_another_model_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--model.encoder.width", "8"]
    error = error_of(capsys, *arguments, "--trainer.default_root_dir", str(tmp_path))
    assert "a checkpoint must be of the model that is configured" in error
    assert "\n" not in error


@pytest.mark.parametrize("where", ["command line", "file"])
def test_a_misspelt_key_is_named(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model:\n  temperture: 0.3\n")
    given: dict[str, Any] = {
        "command line": ["--model.temperture", "0.3"],
        "file": ["--config", str(wrong)],
    }
    assert "temperture" in error_of(capsys, *given[where])


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_config_of_the_package_goes_by_its_name(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Built(["fit", "--config", name]).config.fit.name == "quickstart"


def test_a_file_goes_before_a_config_of_the_package(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text(
        "name: mine\ndata: {source: Digits}\nmodel: {encoder: simclr_pl.ConvEncoder}\n"
    )
    assert Built(["fit", "--config", "quickstart"]).config.fit.name == "mine"


def test_an_unknown_config_is_one_line_with_the_nearest_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(capsys, "--config", "quickstrat")
    assert "got 'quickstrat'. Near it: quickstart." in error
    assert "\n" not in error


def test_a_fit_of_nothing_says_what_is_missing_and_how_to_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: simclr fit --config quickstart\n")
    assert "required: fit.model.encoder, fit.data.source" in error


# Help.


def page(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    assert not caught.value.code
    return capsys.readouterr().out


def test_help_opens_with_an_example_and_what_people_set_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = page(capsys, "fit", "--help")
    example, words = text.index("    simclr fit --config quickstart\n"), " ".join(text.split())
    assert example < text.index("--data.global_batch_size INT")
    assert "Samples (not views) of one step over all ranks. (default: 256)" in words
    assert "keeps it within 1 % of the encoder's work" in words
    assert f"sets its options: {', '.join(_MONITORS)}." in words
    assert text.count("\n  --") <= 25
    for leftover in (
        "Lightning Trainer command line tool",
        "known subclasses",
        "full optimization",
    ):
        assert leftover not in text


def test_help_all_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, "fit", "--help_all")
    options = {word.rstrip(",") for word in text.split() if word.startswith("--")}
    config = Built(["fit", *QUICK]).config.fit
    keys = {f"--trainer.{key}" for key in config.trainer.as_dict()}
    keys |= {f"--{key}" for key in _MONITORS}
    keys |= {"--model.temperature", "--data.bank_size", "--resume", "--weights_only"}
    assert keys <= options


def test_options_of_a_class_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.optimizer.trust_coefficient" in page(
        capsys, "fit", "--model.optimizer.help", "LARS"
    )


# The command in processes of its own.


def test_two_ranks_launched_by_the_trainer(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    brief = ["--summary.baselines", "false", "--pictures", "null", "--report", "null"]
    done = simclr("fit", *QUICK, *SHORT, *QUIET, *root, *two, *brief)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "quickstart/version_0/summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 6


def fit_63_images(folder: Path) -> None:
    log = os.open(folder / f"log_{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    root = ["--trainer.default_root_dir", str(folder), "--data.global_batch_size", "63"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    main(["fit", *QUICK, *SHORT, *QUIET, *root, *two])


def test_a_batch_that_does_not_divide_by_the_ranks_is_one_line(tmp_path: Path) -> None:
    ranks = processes_of(2, fit_63_images, tmp_path)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [2, 2]
    for log in tmp_path.glob("log_*.txt"):
        assert "must divide by the number of ranks; got 63 for 2 ranks" in log.read_text()
        assert "Traceback" not in log.read_text()
    assert len(list(tmp_path.glob("log_*.txt"))) == 2
