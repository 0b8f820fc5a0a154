"""`simclr knn` against scikit-learn, on the run's images and on others, in one process and two."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from trained import clean_features, digits_folder, digits_run, simclr

from simclr_pl.cli import main
from simclr_pl.commands.encoders import load_subject
from simclr_pl.data import Digits
from simclr_pl.metrics import wilson_interval


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs"))


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints/last.knn.json").read_text())
    return found


def expected(bank: Any, query: Any, k: int, temperature: float) -> float:
    """Top-1 by scikit-learn's neighbours, in float64."""
    (x, y), (q, truth) = bank, query
    model = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    return float((model.fit(x, y).predict(q) == truth).mean())


def test_the_grid_the_best_and_the_baselines_are_scikit_learns(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["knn", str(run), "--k", "[3,20]", "--temperature", "[0.07,0.5]"])
    found = result(run)
    digits = Digits()
    digits.open()
    pixels = [
        (((s.pixels.flatten(1) / 255 - 0.204) / 0.181).double().numpy(), s.labels)
        for s in (digits.bank, digits.query)
    ]
    fresh = load_subject(str(run)).fresh()
    compared = {
        "": [clean_features(run, name) for name in ("bank", "query")],
        "_raw": pixels,
        "_init": [clean_features(run, name, fresh) for name in ("bank", "query")],
    }
    for suffix, (bank, query) in compared.items():
        grid = found[f"grid{suffix}"]
        assert [(c["k"], c["temperature"]) for c in grid] == [
            (k, t) for k in (3, 20) for t in (0.07, 0.5)
        ]
        for cell in grid:  # a tie within rounding may fall to either side
            share = expected(bank, query, cell["k"], cell["temperature"])
            assert cell["top1"] == pytest.approx(share, abs=2 / 450)
        best = max(grid, key=lambda cell: cell["top1"])
        assert found[f"top1{suffix}"] == best["top1"]
        chosen = found[f"chosen{suffix}"]
        assert (chosen["k"], chosen["temperature"]) == (best["k"], best["temperature"])
        assert found[f"top5{suffix}"] == max(cell["top5"] for cell in grid)
        interval = wilson_interval(round(450 * best["top1"]), 450)
        assert found[f"top1_interval{suffix}"] == pytest.approx(interval)
    assert (found["bank"], found["query"], found["classes"]) == (1347, 450, 10)
    assert (found["dataset"], found["step"]) == ("Digits", 6)
    text = capsys.readouterr().out
    for words in ("trained", "at initialisation", "raw pixels", "temperature 0.5", "k = 20"):
        assert words in text
    assert f"{100 * found['top1']:.1f}" in text


def test_baselines_can_be_left_out_the_bank_cut_and_a_tracker_told(
    run: Path, tmp_path: Path
) -> None:
    options = ["--baselines", "false", "--bank_size", "100", "--k", "[5]"]
    main(["knn", str(run), *options, "--out", "mine.json", "--track", "[tensorboard]"])
    found = json.loads((tmp_path / "mine.json").read_text())
    assert found["bank"] == 100
    assert list(run.glob("events.out.tfevents.*"))
    assert not any(key.endswith(("_init", "_raw")) for key in found)


def test_other_images_are_judged_by_their_own_labels(run: Path, tmp_path: Path) -> None:
    config = digits_folder(tmp_path / "images")
    options = ["--dataset", str(config), "--num_workers", "0", "--k", "[5]"]
    main(["knn", str(run), *options, "--temperature", "[0.07]"])
    found = result(run)
    assert (found["dataset"], found["bank"], found["query"]) == (str(config), 60, 60)
    (bank, y), (query, truth) = (clean_features(run, name) for name in ("bank", "query"))
    digits = Digits()
    digits.open()
    # the folders' images are the first 60 of each set
    share = expected((bank[:60], y[:60]), (query[:60], truth[:60]), 5, 0.07)
    assert found["top1"] == pytest.approx(share, abs=1 / 60)


def test_an_encoder_by_name_is_scored_in_the_working_folder(tmp_path: Path) -> None:
    config = digits_folder(tmp_path / "images", 20)
    options = ["--dataset", str(config), "--num_workers", "0", "--size", "16", "--k", "[1]"]
    main(["knn", "timm/resnet18", *options, "--baselines", "false"])
    found = json.loads((tmp_path / "timm-resnet18.knn.json").read_text())
    assert (found["subject"], found["query"], found["step"]) == ("timm/resnet18", 20, 0)
    assert 0 <= found["top1"] <= 1


def test_two_processes_find_what_one_finds(run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    main(["knn", str(run), "--out", str(one)])
    options = ["--devices", "2", "--accelerator", "cpu", "--batch_size", "100"]
    done = simclr("knn", str(run), *options, "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    assert json.loads(two.read_text()) == json.loads(one.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "[0,5]"], "`k` must be numbers >= 1; got [0, 5]. Set `--k`."),
        (["--k", "[]"], "`k` must be numbers >= 1; got []"),
        (["--temperature", "[0.0]"], "`temperature` must be numbers > 0; got [0.0]"),
        (["--out", "no/mine.json"], "`out` must lie in a folder that exists"),
        (["--dataset", "nonsense"], "`src` must be a folder, a YAML config or its name"),
        (["--dataset", "unlabelled.yaml"], "got none in the bank set. Give labels"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images").mkdir()
    for i in range(20):
        Image.new("L", (32, 32), i).save(f"images/{i}.png")
    Path("unlabelled.yaml").write_text(
        "data:\n  source:\n    class_path: ImageFolder\n    init_args: {root: images, grey: true}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["knn", str(run), *options, "--num_workers", "0"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error[error.index("error:") :]
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["knn", "linear", "embed"])
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"simclr {command} runs/simclr/version_0" in text
    for words in ("A checkpoint of `simclr fit`", "--dataset", "--devices", "default:"):
        assert words in text
