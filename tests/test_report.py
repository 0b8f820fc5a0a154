"""What the report reads from a run's folder, and what it makes of it."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from simclr_pl.report import read_run, write_report
from simclr_pl.report.configs import ABSENT, differences, flattened
from simclr_pl.report.curves import curve_of, grouped, thinned
from simclr_pl.report.images import picture, sheet, spread
from simclr_pl.report.outcome import outcome_of
from simclr_pl.report.page import _map
from simclr_pl.report.reading import Run
from simclr_pl.report.results import result_rows
from simclr_pl.report.ridges import ridges_of

SCORES = {"knn_top1": 0.9, "knn_top1_init": 0.4, "knn_top1_raw": 0.6}
SCORES |= {
    "raw_name": "raw pixels",
    "linear_top1": 0.95,
    "linear_top1_init": 0.7,
    "linear_top1_raw": 0.2,
}


def write_run(folder: Path, **files: str) -> Path:
    """A run of four steps by hand; ``files`` take the place of those that are there, - for a dot."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "pictures").mkdir()
    shares = {"data": 0.1, "augment": 0.1, "compute": 0.6, "monitors": 0.1, "other": 0.1}
    texts = {
        "summary.json": json.dumps({**SCORES, "steps": 4, "seconds": 3.0, "time": shares}),
        "environment.json": json.dumps({"python": "3.11.7", "git": None}),
        "config.yaml": "model: {temperature: 0.2}\ndata: {source: {token: hush-hush}}\n",
        "metrics.csv": "knn/top1,step,train/loss\n,0,3.5\n,1,2.5\n0.75,2,\n,3,1.5\n",
        "histograms.jsonl": '{"step": 0, "positive": [0, 2, 6], "negative": [1, 4, 1]}\n',
        "checkpoints/last.linear.json": json.dumps({"top1": 0.5, "top1_interval": [0.4, 0.6]}),
    }
    for name, text in {**texts, **files}.items():
        (folder / name).write_text(text)
    for name in ("views", "neighbours_2", "neighbours_4", "map_4"):
        Image.new("RGB", (8, 6), "red").save(folder / f"pictures/{name}.png")
    write_map(folder, 3)
    return folder


def write_map(folder: Path, n: int, side: int = 2) -> None:
    """Points on a line, each with the next one as its neighbour, and its thumbnail of its own grey."""
    nearest = (np.arange(n)[:, None] + 1) % n
    similarity = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    xy = np.stack([np.arange(n), np.zeros(n)], 1).astype(np.float32)
    numbers: dict[str, Any] = {"xy": xy, "label": np.arange(n) % 2, "index": 10 * np.arange(n)}
    numbers |= {"neighbours": nearest, "similarity": similarity, "step": 4}
    np.savez(
        folder / "pictures/map.npz", **numbers, classes=["cat", "dog"], axes=["first", "second"]
    )
    columns = int(np.ceil(np.sqrt(n)))
    cells = np.zeros(columns * columns, np.uint8)
    cells[:n] = np.linspace(10, 250, n)
    grey = cells.reshape(columns, columns).repeat(side, 0).repeat(side, 1)
    Image.fromarray(grey[: -(-n // columns) * side]).convert("RGB").save(
        folder / "pictures/map_thumbnails.jpg", quality=100
    )


def page(folder: Path) -> str:
    return write_report([folder], folder / "report.html").read_text()


# Curves.


def test_thinning_keeps_the_extremes_and_ends_of_every_part() -> None:
    values = np.random.default_rng(0).normal(size=100_003)
    kept = thinned(values, 400)
    assert len(kept) <= 400
    assert (np.diff(kept) > 0).all()
    for part in np.array_split(np.arange(len(values)), 100):
        inside = set(kept[(kept >= part[0]) & (kept <= part[-1])].tolist())
        extremes = {part[values[part].argmin()], part[values[part].argmax()]}
        assert extremes | {part[0], part[-1]} <= inside
    assert thinned(values[:400], 400).tolist() == list(range(400))


def test_a_curve_takes_the_last_value_of_a_step_and_leaves_out_what_is_no_number() -> None:
    curve = curve_of([5, 1, 5, 2, 3], [1.0, 2.0, 3.0, float("nan"), float("inf")], 100)
    assert curve.steps.tolist() == [1, 5]
    assert curve.values.tolist() == [2.0, 3.0]
    assert (curve.total, curve.not_finite) == (2, 2)


def test_a_table_of_100000_rows_is_read_soon_and_takes_little_room(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    small = len(page(run))
    waves = np.sin(np.arange(100_000)[:, None] / 999 + np.arange(8)).round(9).tolist()
    rows = (f"{step},{','.join(map(str, row))}" for step, row in enumerate(waves))
    head = ",".join(["step", *(f"train/k{i}" for i in range(8))])
    (run / "metrics.csv").write_text("\n".join([head, *rows]))
    start = time.process_time()
    text = page(run)
    assert time.process_time() - start < 10
    assert len(text) - small < 300_000
    assert "of 100,000 points, extremes kept" in text


def test_curves_are_grouped_with_what_one_looks_for_first_in_front() -> None:
    keys = [
        "zebra",
        "summary/knn_top1",
        "probe/lr_1/top1",
        "probe/top1",
        "probe/loss",
        "train/loss",
    ]
    keys += ["probe/best_lr", "my/own"]
    assert grouped(keys) == {
        "train": ["train/loss"],
        "probe": ["probe/loss", "probe/top1", "probe/best_lr", "probe/lr_1/top1"],
        "my": ["my/own"],
        "other": ["zebra"],
    }


# Configurations.


def test_differences_are_the_keys_whose_values_are_not_the_same() -> None:
    a = {"model": {"lr": 1e-3, "layers": [1, 2]}, "seed": 0, "track": [], "x": None}
    b = {"model": {"lr": 0.002, "layers": [1, 2]}, "seed": 0, "track": [], "y": {"z": True}}
    assert differences([a, b]) == [
        ("model.lr", ["0.001", "0.002"]),
        ("x", ["null", ABSENT]),
        ("y.z", [ABSENT, "true"]),
    ]
    assert differences([a, a]) == []


def test_flattened_lists_of_mappings_have_numbers() -> None:
    value = {"callbacks": [{"class_path": "A"}, {"class_path": "B"}], "empty": {}, "k": [1, 0.5]}
    assert flattened(value) == {
        "callbacks[0].class_path": "A",
        "callbacks[1].class_path": "B",
        "empty": "{}",
        "k": "[1, 0.5]",
    }


# Outcome.


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (SCORES, "Training gained 30.0 points of kNN and 25.0 points of linear accuracy over the"),
        ({**SCORES, "knn_top1": 0.5, "linear_top1": 0.7}, "Training gained nothing: 10.0 points"),
        ({**SCORES, "knn_top1": 0.5}, "Training changed -10.0 points of kNN and +25.0 points of"),
        ({"linear_top1": 0.5}, "There are no baselines to compare the scores with."),
        ({}, "There are no scores of the trained encoder."),
        ({"knn_top1": "0.9", "knn_top1_init": None}, "There are no scores of the trained encoder."),
    ],
)
def test_the_meaning_compares_with_the_better_baseline(summary: Any, text: str) -> None:
    assert outcome_of(Run(Path("run"), "run", summary=summary)).meaning.startswith(text)


def test_the_state_says_whether_a_run_is_finished(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert outcome_of(run)[:2] == ("finished", "Finished after 4 steps")
    run.environment = {"stopped": {"step": 3, "reason": "Preempted: 85"}}
    assert outcome_of(run)[:2] == ("stopped", "Stopped at step 3: Preempted: 85")
    run.environment, run.summary = {}, {"steps": 2}
    assert (
        outcome_of(run).status == "Went on after its summary of step 2: the last logged step is 3"
    )
    run.summary = None
    outcome = outcome_of(run)
    assert outcome.state == "unfinished"
    assert outcome.status.endswith("the last logged step is 3")
    assert outcome.meaning.endswith("latest of the monitors: kNN 75.0 % at step 2.")


def test_results_of_commands_have_their_intervals_and_what_they_compare_with() -> None:
    values = {"top1": 0.5, "top1_interval": [0.4, 0.6], "top5": 0.9, "step": 1200, "labels": 130}
    values |= {"top1_random": 0.25, "top1_interval_random": "torn"}
    assert result_rows([("last.finetune.json", values), ("x.json", {"top1": "?"})]) == [
        [
            "finetune",
            "last",
            "this encoder (step 1,200, 130 labels)",
            "50.0",
            "40.0 to 60.0",
            "90.0",
        ],
        ["", "", "from random initialisation", "25.0", ABSENT, ABSENT],
    ]


def test_outlines_of_histograms_reach_their_own_greatest_height() -> None:
    first = {"step": 0, "positive": [0, 1, 1], "negative": [2, 2, 0]}
    last = {"step": 9, "positive": [0, 0, 4], "negative": [2, 2, 0]}
    drawn = ridges_of([first, last])
    assert drawn is not None
    tops = [
        min(float(p.split(",")[1]) for p in row["positive"].split()[:-1]) for row in drawn["rows"]
    ]
    heights = [row["y"] - top for row, top in zip(drawn["rows"], tops, strict=True)]
    assert heights == [27, 54]  # half of the images in a bin, and all of them
    assert len(ridges_of([first] * 500)["rows"]) == 14  # type: ignore[index]
    assert ridges_of([]) is None


# Pictures.


def test_of_many_items_some_are_taken_at_equal_distances_with_both_ends() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


def test_a_picture_is_scaled_down_to_the_width_of_a_page(tmp_path: Path) -> None:
    Image.new("RGB", (2560, 100), "blue").save(tmp_path / "wide.png")
    address, width, height = picture(tmp_path / "wide.png")
    assert (width, height) == (1280, 50)
    assert address.startswith("data:image/")


def test_a_map_with_fewer_points_keeps_neighbours_and_thumbnails_together(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_map(run, 9)
    found = _map(read_run(run), 5)
    assert found is not None
    assert found["image"] == [0, 20, 40, 60, 80]
    assert found["total"] == 9
    assert found["neighbours"] == [[-1], [-1], [-1], [-1], [0]]  # 0 follows 8; 1, 3, 5, 7 are out
    address, columns = sheet(run / "pictures/map_thumbnails.jpg", 9, [0, 2, 4, 6, 8])
    assert columns == 3
    assert address.startswith("data:image/jpeg;base64,")
    from base64 import b64decode
    from io import BytesIO

    pixels = np.asarray(Image.open(BytesIO(b64decode(address.partition(",")[2]))).convert("L"))
    cells = pixels.reshape(2, 2, 3, 2).mean((1, 3)).reshape(-1)[:5]
    np.testing.assert_allclose(cells, np.linspace(10, 250, 9)[[0, 2, 4, 6, 8]], atol=20)


# What is missing or damaged.


def test_a_whole_run_has_nothing_to_complain_of_and_its_secrets_are_masked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert read_run(folder).problems == []
    text = page(folder)
    assert "missing or damaged in" not in text
    assert "hush-hush" not in text
    assert "data.source.token" in text


def test_an_empty_folder_has_a_page_that_names_what_is_missing(tmp_path: Path) -> None:
    problems = read_run(tmp_path).problems
    for name in ("summary.json", "environment.json", "config.yaml", "metrics.csv", "map.npz"):
        assert any(name in line for line in problems)
    text = page(tmp_path)
    for line in ("metrics.csv is missing", "No numbers were logged", "pictures/ has no views"):
        assert line in text


TORN = {
    "summary.json": '{"knn_top1": 0.',
    "environment.json": "[1, 2]",
    "config.yaml": "a: [1",
    "checkpoints/last.linear.json": "",
    "pictures/map.npz": "no zip",
    "pictures/map_thumbnails.jpg": "no picture",
    "pictures/views.png": "no picture",
}


@pytest.mark.parametrize("name", TORN)
def test_a_damaged_file_is_named_and_the_rest_is_shown(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(TORN[name])
    text = page(folder)
    assert f"{name} cannot be read" in text
    assert "1 thing missing or damaged" in text
    assert "train/loss" in text


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    files = {
        "metrics.csv": "step,train/loss\n0,3.5\n1,nan\n2,2.5\n3,1.5x\n\0\n4",
        "histograms.jsonl": '{"step": 0, "positive": [1, 2], "negative": [2, 1]}\n'
        '{"step": 1, "positive": [0, 0], "negative": [2, 1]}\n{"step": 2, "posi',
    }
    run = read_run(write_run(tmp_path / "run", **files))
    assert run.curves["train/loss"].values.tolist() == [3.5, 2.5]
    assert run.curves["train/loss"].not_finite == 1
    assert [h["step"] for h in run.histograms] == [0]
    assert run.problems == [
        "metrics.csv: 2 damaged rows are left out",
        "histograms.jsonl: 2 damaged lines are left out",
    ]
    assert "1 values are no finite numbers" in page(run.folder)


def test_a_map_whose_numbers_do_not_fit_together_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with np.load(folder / "pictures/map.npz") as table:
        numbers = dict(table)
    for change in (
        {"label": np.zeros(2, int)},
        {"neighbours": np.full((3, 1), 3)},
        {"xy": np.full((3, 2), np.nan)},
    ):
        np.savez(folder / "pictures/map.npz", **{**numbers, **change})
        run = read_run(folder)
        assert run.map is None
        assert run.problems[0].startswith("pictures/map.npz cannot be read")


def test_the_map_of_an_older_version_has_no_neighbours_but_points(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    old = {"xy": np.eye(3, 2), "label": np.array([0, 2, -1]), "index": np.arange(3), "step": 4}
    np.savez(folder / "pictures/map.npz", **old)  # type: ignore[arg-type]
    found = read_run(folder).map
    assert found is not None
    assert found.neighbours.shape == (3, 0)
    assert found.classes == ["0", "1", "2"]
    assert "report" in page(folder)


def test_unreadable_images_and_bad_steps_are_listed_up_to_a_number(tmp_path: Path) -> None:
    lines = "".join(f"image {i}.jpg\tbroken & torn\n" for i in range(60))
    bad = "step\tloss\tgradient_norm\tscale\timage\n7\tnan\t1.5\t1.0\tcat.png\n"
    folder = write_run(tmp_path / "run", **{"unreadable.tsv": lines, "bad_steps.tsv": bad})
    text = page(folder)
    assert "60 unreadable samples" in text
    assert text.count("broken &amp; torn") == 50
    assert "The first 50; unreadable.tsv has all." in text
    assert "<td>cat.png</td>" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "a/version_0") for part in ("x", "y")]
    text = write_report(folders, tmp_path / "report.html").read_text()
    assert "a/version_0 (2)" in text
    assert yaml.safe_load((folders[0] / "config.yaml").read_text())["data"]  # untouched
