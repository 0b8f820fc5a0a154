"""What the trackers of a run hold, read back from their files."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import QUICKSTART, digits_run
from wandb_file import WandbRun, wandb_runs

from simclr_pl.cli import main
from simclr_pl.trackers import wandb_run

SMALL = """
model: {encoder: {init_args: {width: 4}}, warmup_epochs: 0}
trainer: {limit_train_batches: 3, log_every_n_steps: 1, check_val_every_n_epoch: 1,
  enable_progress_bar: false, accelerator: cpu, devices: 1}
checkpoint: {init_args: {monitor: knn/top1, save_top_k: -1, every_n_epochs: 1}}
track: [wandb-offline, tensorboard]
track_checkpoint: true
report: null
"""


def fit(folder: Path, *arguments: str, finish: bool = True) -> Path:
    sys.argv = ["simclr"]  # LightningCLI warns of pytest's own arguments
    folder.mkdir(exist_ok=True)
    config = folder / "small.yaml"
    config.write_text(SMALL)
    root = ["--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", QUICKSTART, "--config", str(config), *root, *arguments])
    if finish:
        wandb.finish()  # as the end of the process does
    return folder / "quickstart/version_0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of three steps, the second after a resumption, and then a command's result."""
    folder = tmp_path_factory.mktemp("tracked")
    fit(folder, "--trainer.max_epochs", "1")
    found = fit(folder, "--trainer.max_epochs", "2", "--resume", "auto")
    main(["knn", str(found), "--track", "[wandb-offline,tensorboard]"])
    return found


@pytest.fixture(scope="module")
def tracked(run: Path) -> list[WandbRun]:
    return wandb_runs(run)


def history(runs: list[WandbRun]) -> list[dict[str, Any]]:
    return [row for each in runs for row in each.rows]


def steps_of(runs: list[WandbRun], key: str) -> list[int]:
    """Of the rows with a key, or with one below it."""
    rows = history(runs)
    return [r["global_step"] for r in rows if any(k == key or k.startswith(f"{key}.") for k in r)]


def scalars(rows: list[dict[str, Any]], axis: str) -> dict[tuple[str, int], float]:
    """Numbers by key and step; of the keys that are measured, not of wandb's own."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if ("/" in key and "." not in key.rpartition("/")[2]) or key == "epoch":
                found[key, int(row[axis])] = float(value)
    return found


def test_a_resumed_run_and_its_commands_are_one_run_with_one_axis(
    run: Path, tracked: list[WandbRun]
) -> None:
    assert len(tracked) == 3
    assert {each.id for each in tracked} == {wandb_run(run)}
    assert {each.project for each in tracked} == {"quickstart"}
    assert all("global_step" in row for row in history(tracked))
    assert steps_of(tracked, "train/loss") == [0, 1, 2, 3, 4, 5]
    metrics = tracked[0].metrics
    assert {axis for key, (axis, _) in metrics.items() if key != "global_step"} == {"global_step"}
    assert "*" in metrics


def test_pictures_tables_and_histograms_stand_at_the_steps_of_the_numbers(
    run: Path, tracked: list[WandbRun]
) -> None:
    for key in ("knn/top1", "pictures/neighbours", "pictures/map", "pictures/queries"):
        assert steps_of(tracked[:2], key) == [2, 5], key
    assert steps_of(tracked[:2], "pictures/views")[0] == 0
    for key in ("collapse/positives", "collapse/negatives", "collapse/feature_rank"):
        assert steps_of(tracked[:2], key) == [0], key
    assert {p.name.partition("_")[0] for p in run.glob("wandb/*/files/media/images/*/*.png")} == {
        "views",
        "neighbours",
        "map",
    }


def test_the_table_says_of_each_query_image_what_lies_nearest(run: Path) -> None:
    files = sorted(run.glob("wandb/*/files/media/table/pictures/queries_*.json"))
    table = json.loads(files[-1].read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["image"] for row in rows] == list(range(450))
    assert {row["class"] for row in rows} == {str(digit) for digit in range(10)}
    for row in rows:
        other = rows[row["nearest"]]
        assert other is not row
        assert row["nearest_class"] == other["class"]
        assert 0 <= row["same_class"] <= 1
        assert -1 <= row["similarity"] <= 1.001
    assert sum(row["nearest_class"] == row["class"] for row in rows) > 60  # chance: 45


def test_three_trackers_hold_the_same_keys_and_values(run: Path, tracked: list[WandbRun]) -> None:
    with (run / "metrics.csv").open() as lines:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
    table = scalars(rows, "step")
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    board = {(tag, e.step): e.value for tag in tags for e in events.Scalars(tag)}
    biases = scalars(history(tracked[:2]), "global_step")
    assert {key for key, _ in table} > {"train/loss", "knn/top1", "probe/top1", "epoch"}
    # wandb forgets nothing: the scores after the first three steps are still there
    redone = {key for key in biases if key[1] == 3 and key[0].startswith("summary/")}
    assert redone.isdisjoint(table)
    assert set(biases) - redone == set(table)
    assert {key for key in board if not key[0].startswith("results/")} == set(table)
    results = scalars(tracked[2].rows, "global_step")
    assert {step for _, step in results} == {6}
    assert {key for key in board if key[0].startswith("results/")} == set(results)
    assert ("results/knn_top1", 6) in results
    for key, value in table.items():
        assert biases[key] == pytest.approx(value, rel=1e-6), key
        assert board[key] == pytest.approx(value, rel=1e-6), key


def test_config_and_summary_are_those_of_the_whole_run(tracked: list[WandbRun]) -> None:
    config = tracked[1].config
    assert config["model"]["encoder"]["init_args"]["width"] == 4
    assert config["data"]["global_batch_size"] == 128
    assert config["checkpoint"]["init_args"]["monitor"] == "knn/top1"
    assert "temperature" not in config  # under `model` alone
    first, second = (each.summary for each in tracked[:2])
    rows = [row for row in history(tracked[:1]) if "train/loss" in row]
    losses = [row["train/loss"] for row in rows]
    assert first["train/loss"] == {"min": min(losses), "last": losses[-1]}
    assert set(second["knn/top1"]) == {"max", "last"}
    assert {"summary/knn_top1", "summary/linear_top1", "summary/knn_top1_raw"} <= set(second)


def test_the_newest_checkpoint_and_the_best_of_a_metric_are_artifacts(
    run: Path, tracked: list[WandbRun]
) -> None:
    name = f"checkpoint-{wandb_run(run)}"
    first, second = (
        [(facts["file"], aliases) for found, aliases, facts in each.artifacts if found == name]
        for each in tracked[:2]
    )
    files = {3: "epoch=0-step=3.ckpt", 6: "epoch=1-step=6.ckpt"}
    assert first == [(files[3], {"best", "latest"})]
    accuracy = {
        row["global_step"] + 1: row["knn/top1"] for row in history(tracked[:2]) if "knn/top1" in row
    }
    best = max(accuracy, key=accuracy.__getitem__)
    assert second[-1][0] == files[6]
    assert [file for file, aliases in second if "best" in aliases] == [files[best]]
    facts = next(f for _, aliases, f in tracked[1].artifacts if "best" in aliases)
    assert facts["knn/top1"] == pytest.approx(accuracy[best])


def test_tensorboard_shows_the_config(run: Path) -> None:
    events = EventAccumulator(str(run), {"tensors": 0}).Reload()
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "global_batch_size: 128" in text


def test_the_second_run_of_a_process_is_another_one(tmp_path: Path) -> None:
    quick = ["--track", "[wandb-offline]", "--trainer.max_epochs", "1", "--pictures", "null"]
    quick += ["--summary", "null", "--track_checkpoint", "false"]
    first = fit(tmp_path / "a", *quick, finish=False)
    second = fit(tmp_path / "b", *quick)
    (a,), (b,) = wandb_runs(first), wandb_runs(second)
    assert a.id != b.id
    assert steps_of([a], "train/loss") == steps_of([b], "train/loss") == [0, 1, 2]


def test_without_being_asked_no_checkpoint_is_handed_over(tmp_path: Path) -> None:
    found = digits_run(tmp_path, "--track", "[wandb-offline]", "--pictures", "null")
    wandb.finish()
    (only,) = wandb_runs(found)
    assert only.rows
    assert not only.artifacts


def test_a_checkpoint_for_no_wandb_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--track", "[tensorboard]", "--track_checkpoint", "true"]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", QUICKSTART, *arguments])
    assert end.value.code == 2
    assert "`track_checkpoint` needs wandb or wandb-offline" in capsys.readouterr().err
