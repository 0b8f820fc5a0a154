"""The speed run, at a length that a CPU manages: from its config to its tables."""

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import noise, write
from rich.console import Console

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "speedrun.py"


@pytest.fixture(scope="module")
def speedrun() -> Any:
    spec = importlib.util.spec_from_file_location("speedrun", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(table: Any) -> str:
    stream = io.StringIO()
    Console(width=150, file=stream).print(table)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:.*comes after epoch 350", "ignore:.*smaller than the logging")
def test_a_run_goes_from_images_of_mixed_sizes_to_its_figures(
    speedrun: Any, tmp_path: Path
) -> None:
    for split, count in (("train", 10), ("test", 3)):
        for i in range(2 * count):
            write(tmp_path / "set" / split / f"class {i % 2}" / f"{i}.png", noise(i, 40, 30 + i))
    short = {"trainer.max_steps": 5, "data.global_batch_size": 4, "data.bank_size": 12}
    silent = {"trainer.enable_progress_bar": "false", "checkpoint": "null", "report": "null"}
    chosen = speedrun.source_of(str(tmp_path / "set")) | speedrun.TOY | short | silent
    parts = speedrun.profile(["--config", "speedrun/cifar10", *speedrun.words(chosen)], tmp_path)
    shares = {row.split("│")[1].strip(): row for row in printed(parts).splitlines() if "│" in row}
    encoder = [
        float(shares[f"encoder and head, {way}ward"].split("│")[2]) for way in ("for", "back")
    ]
    assert sum(encoder) > 50
    assert {"loss", "optimiser", "views", "loader", "FiniteGuard"} <= shares.keys()
    (file,) = tmp_path.rglob("summary.json")
    summary = json.loads(file.read_text())
    assert summary["steps"] == 5
    assert summary["gflops"] > 0
    rows = {0: summary | {"wall": 40.0}, 1: summary | {"wall": 50.0}}
    *_, first, second, mean = (
        r for r in printed(speedrun.report(rows, "")).splitlines() if "│" in r
    )
    assert [row.split("│")[2].strip() for row in (first, second, mean)] == ["40", "50", "45"]
    assert f"{100 * summary['knn_top1']:.1f}" in mean
