"""The command line as a user meets it: runs, files, overrides and errors."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from packing import flip_byte, image_folder, started
from PIL import Image

from simclr_pl.augment import Augment
from simclr_pl.callbacks import EvaluationPace
from simclr_pl.cli import _MONITORS, SimCLRCLI, main
from simclr_pl.data import Digits

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
    assert {"throughput/data", "throughput/images_per_second", "data/unreadable"} <= logged
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    summary = json.loads((run / "summary.json").read_text())
    assert {
        "knn_top1",
        "linear_top1",
        "knn_top1_init",
        "knn_top1_pixels",
        "images_per_second",
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


# The command in processes of its own.


def simclr(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simclr_pl", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_help_lists_the_commands_and_the_monitors() -> None:
    assert "fit,validate,test,predict" in simclr("--help").stdout.replace(" ", "")
    text = simclr("fit", "--help").stdout
    for word in ("--name", "--track", "global_batch_size", "temperature"):
        assert word in text
    for key in _MONITORS:
        assert f"--{key}" in text
    assert "keeps it within 1 % of the encoder's work" in " ".join(text.split())


def test_help_lists_the_other_verbs_and_teaches_them(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    assert "data Pack, describe and check sets of images." in help_of()
    for command in ("pack", "info", "check", "stats"):
        assert command in help_of("data")
    text = help_of("data", "pack")
    for words in (
        "src out",
        "--short_side",
        "256 suits crops of 224",
        "default: 90",
        "litdata for",
    ):
        assert words in text


def test_data_commands_in_processes_of_their_own(tmp_path: Path) -> None:
    source, out = image_folder(tmp_path / "source", 8), tmp_path / "out"
    (source / "train/ants/bad.jpg").write_bytes(b"bad")
    options = ["--short_side", "20", "--workers", "1"]
    done = simclr("data", "pack", str(source), str(out), *options)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("Packed 8 train, 2 query images in 2 shards, ")
    assert second == f"Left out 1 that cannot be read; all are in {out}/index.json:"
    assert third == "  train/ants/bad.jpg: of no known image format"
    flip_byte(out / "query-00000.arrow", b"JFIF")
    done = simclr("data", "check", str(out), "--report", str(tmp_path / "report.json"))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"damaged: {out}/query-00000.arrow: the shard is not what was written" in done.stdout
    assert "damaged: query: test/ants/001.jpg (query-00000.arrow, row 0): its bytes" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["usable"]
    assert report["counts"]["damaged"] == 2
    assert report["findings"][0]["path"] == f"{out}/query-00000.arrow"


def test_data_check_says_yes_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "check", str(image_folder(tmp_path / "source", 8)), "--workers", "0"])
    assert "Every image is usable." in capsys.readouterr().out


@pytest.mark.parametrize(
    "source",
    ["Digits", "simclr_pl.data.Digits", str(CONFIGS / "quickstart.yaml"), "packed", "run"],
)
def test_data_stats_takes_any_source(
    source: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "packed":
        source = str(tmp_path / "packed")
        main(["data", "pack", "Digits", source, "--workers", "0"])
        capsys.readouterr()
    elif source == "run":
        source = str(run / "config.yaml")
    main(["data", "stats", source, "--workers", "0"])
    comment, *lines = capsys.readouterr().out.splitlines()
    assert comment == f"# {source}: 1,347 training images, 1,379,328 pixels"
    digits = Digits()
    digits.open()
    pixels = digits.train.pixels.double() / 255
    expected = {"mean": [round(pixels.mean().item(), 4)], "std": [round(pixels.std().item(), 4)]}
    assert yaml.safe_load("\n".join(lines)) == expected


def test_data_stats_can_be_pasted_into_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "stats", "Digits", "--max_images", "50", "--workers", "0"])
    table = yaml.safe_load(capsys.readouterr().out)
    augment = Augment(**table)
    assert augment.mean == table["mean"]


def test_data_info_shows_folders_and_packs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "source", 8)
    main(["data", "pack", str(source), str(tmp_path / "out"), "--shard_mb", "0.004"])
    capsys.readouterr()
    for root in ("source", "out"):
        main(["data", "info", str(tmp_path / root), "--workers", "0"])
        text = capsys.readouterr().out
        (row,) = (line for line in text.splitlines() if "train" in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert (cells[:3], cells[-1]) == (["train", "8", "2"], "50 x 40")
    assert "packed as arrow: " in text
    assert "short_side 256, quality 90, shard_mb 0.004" in text


def test_an_interrupted_pack_ends_at_once_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["data", "pack", str(image_folder(tmp_path / "source", 200)), str(out)]
    process = started(main, [*arguments, "--workers", "1", "--shard_mb", "0.0001"])
    while not list(out.glob("*.arrow")):
        assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(4)
    assert process.exitcode == 130
    assert capfd.readouterr().err.strip().endswith("interrupted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nonsense"], "`src` must be a folder, a YAML config or a source (CIFAR10, "),
        (["check", "no/such/config.yaml"], "a config must be readable; got no/such/config.yaml"),
        (["check", "empty.yaml"], "a config must have `data.source`; got none in empty.yaml"),
        (["check", "wrong.yaml"], "`src` 'wrong.yaml' must describe a source; got: "),
        (["check", "ImageFolder"], "`src` 'ImageFolder' must describe a source; got: "),
        (["stats", "no.such.Source"], "`src` 'no.such.Source' must describe a source; got: "),
        (["check", "s3://bucket/set"], "an object store needs a local folder"),
        (["pack", "images", "out", "--quality", "0"], "`quality` must be within [1, 100]; got 0"),
        (["info", "images"], "must hold images"),
        (
            ["pack", "Digits", "empty.yaml/out"],
            "must be writable; got Not a directory for 'empty.yaml",
        ),
        (
            ["check", "Digits", "--report", "no/report.json"],
            "`report` must lie in a folder that exists",
        ),
    ],
)
def test_a_mistake_in_a_data_command_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "wrong.yaml").write_text(
        "data:\n  source: {class_path: Digits, init_args: {a: 1}}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["data", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_two_ranks_launched_by_the_trainer(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = simclr("fit", *QUICK, *SHORT, *QUIET, *root, *two)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "quickstart/version_0/summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 6


def test_a_batch_that_does_not_divide_by_the_ranks_is_one_line(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path), "--data.global_batch_size", "63"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    failed = simclr("fit", *QUICK, *SHORT, *QUIET, *root, *two)
    assert failed.returncode == 2
    assert "must divide by the number of ranks; got 63 for 2 ranks" in failed.stderr
    assert "Traceback" not in failed.stderr
