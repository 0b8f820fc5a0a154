"""`simclr linear` against scikit-learn; with augmentation, on fresh crops."""

import json
from pathlib import Path
from typing import Any

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from trained import clean_features, digits_folder, digits_run

from simclr_pl.cli import main
from simclr_pl.commands.encoders import load_subject
from simclr_pl.metrics import wilson_interval


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs"))


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints/last.linear.json").read_text())
    return found


def test_the_classifier_is_scikit_learns_at_the_chosen_penalty(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["linear", str(run), "--l2", "[1000,10,1]"])
    found = result(run)
    assert (found["bank"], found["query"], found["classes"]) == (1347, 450, 10)
    assert (found["dataset"], found["method"]) == ("Digits", "lbfgs")
    assert 130 <= found["held_out"] <= 140
    for suffix, encoder in (("", None), ("_init", load_subject(str(run)).fresh())):
        (x, y), (q, truth) = (clean_features(run, name, encoder) for name in ("bank", "query"))
        grid = {cell["l2"]: cell["held_out"] for cell in found[f"grid{suffix}"]}
        l2 = found[f"chosen{suffix}"]["l2"]
        assert grid.keys() == {1000, 10, 1}
        assert grid[l2] == max(grid.values())
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-6)
        share = (model.fit(scaler.transform(x), y).predict(scaler.transform(q)) == truth).mean()
        assert found[f"top1{suffix}"] == pytest.approx(share, abs=0.005)
        interval = wilson_interval(round(450 * found[f"top1{suffix}"]), 450)
        assert found[f"top1_interval{suffix}"] == pytest.approx(interval)
        assert found[f"top5{suffix}"] > found[f"top1{suffix}"]
    assert 0 < found["top1_raw"] < 0.3  # a shifted digit is no linear matter
    text = capsys.readouterr().out
    for words in ("by lbfgs on 1,347 images", "trained", "at initialisation", "raw pixels", "l2 "):
        assert words in text


def test_sgd_comes_close_to_logistic_regression(run: Path) -> None:
    main(["linear", str(run), "--baselines", "false", "--l2", "[10]"])
    exact = result(run)["top1"]
    options = ["--method", "sgd", "--epochs", "40", "--lr", "[0.03,0.1]", "--weight_decay", "[0.0]"]
    main(["linear", str(run), "--baselines", "false", *options])
    found = result(run)
    assert found["method"] == "sgd"
    assert [(cell["lr"], cell["weight_decay"]) for cell in found["grid"]] == [(0.03, 0), (0.1, 0)]
    assert found["top1"] == pytest.approx(exact, abs=0.05)


def test_on_fresh_crops_of_other_images_all_three_are_compared(run: Path, tmp_path: Path) -> None:
    config = digits_folder(tmp_path / "images", 100)
    options = ["--dataset", str(config), "--augment", "true", "--epochs", "3", "--num_workers", "0"]
    options += ["--lr", "[0.1,0.3]", "--weight_decay", "[0.0]", "--out", "mine.json"]
    main(["linear", str(run), *options])
    found = json.loads((tmp_path / "mine.json").read_text())
    assert (found["method"], found["dataset"]) == ("sgd on fresh views", str(config))
    assert (found["bank"], found["query"], found["classes"]) == (100, 100, 10)
    for suffix in ("", "_init", "_raw"):
        assert len(found[f"grid{suffix}"]) == 2
        assert found[f"top1{suffix}"] <= found[f"top5{suffix}"]
    assert len({found[f"top5{suffix}"] for suffix in ("", "_init", "_raw")}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--l2", "[0.0]"], "`l2` must be numbers > 0; got [0.0]"),
        (["--augment", "true", "--lr", "[]"], "`lr` must be numbers > 0 and `weight_decay` >= 0"),
        (["--augment", "true", "--bank_size", "9"], "got `bank_size` 9. Leave one out"),
        (["--out", "no/mine.json"], "`out` must lie in a folder that exists"),
        (["--epochs", "0"], "`epochs` must be >= 1; got 0"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["linear", str(run), *options, "--baselines", "false"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error[error.index("error:") :]
    assert "Traceback" not in error
