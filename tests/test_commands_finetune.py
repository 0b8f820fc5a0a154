"""`simclr finetune` as a user meets it, and the checkpoint that it leaves."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simclr_pl.cli import main
from simclr_pl.commands.classifiers import (
    Origin,
    load_classifier,
    measure,
    save_classifier,
    views_of,
)
from simclr_pl.commands.encoders import clean_views, data_for, load_subject
from simclr_pl.data import Digits
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.finetune import Classification, crop_and_flip

CPU = ["--accelerator", "cpu", "--devices", "1"]
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


def fitted(folder: Path) -> Path:
    """A run of three steps."""
    options = ["--model.encoder.width", "4", "--trainer.max_epochs", "1"]
    options += ["--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.limit_val_batches", "0", "--summary", "null"]
    options += ["--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", str(QUICKSTART), *options])
    return folder / "quickstart/version_0"


def tuned(run: Path, *options: str) -> dict[str, Any]:
    main(["finetune", str(run), "--fraction", "0.05", "--epochs", "2", *CPU, *options])
    values: dict[str, Any] = json.loads((run / "checkpoints/last.finetune.json").read_text())
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.argv = ["simclr"]
    return fitted(tmp_path_factory.mktemp("runs"))


def test_it_prints_a_table_and_writes_scores_and_a_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tuned(run, "--projector_layers", "1")
    printed = capsys.readouterr().out
    assert "fine-tuned" in printed
    assert "from random initialisation" in printed
    assert "last.finetune.ckpt" in printed
    assert (values["labels"], values["query"], values["epochs"]) == (68, 450, 2)
    for suffix in ("", "_random"):
        low, high = values[f"top1_interval{suffix}"]
        assert 0 <= low <= values[f"top1{suffix}"] <= high <= 1
        assert values[f"top1{suffix}"] <= values[f"top5{suffix}"]


def test_the_checkpoint_holds_plain_values_and_gives_the_accuracy_again(run: Path) -> None:
    values = tuned(run, "--projector_layers", "1", "--lr", "2.0", "--baselines", "false")
    assert "top1_random" not in values
    content = torch.load(values["classifier"], weights_only=True)
    assert content["hyper_parameters"]["encoder"]["class_path"] == "simclr_pl.ConvEncoder"
    subject, classifier, origin = load_classifier(values["classifier"])
    assert len(classifier.projector) == 3
    assert origin.fraction == 0.05
    data = data_for(subject, augment=origin.augment())
    devices = {"devices": 1, "accelerator": "cpu"}
    accuracy = measure(Classification(classifier), data, devices)
    assert accuracy.top1 == values["top1"]
    assert accuracy.top5 == values["top5"]


def test_other_commands_take_the_fine_tuned_encoder(run: Path) -> None:
    before = load_subject(str(run)).encoder.state_dict()
    for layers in ("0", "2"):
        file = tuned(run, "--projector_layers", layers, "--baselines", "false")["classifier"]
        subject = load_subject(file)
        assert isinstance(subject.projector, nn.Identity) == (layers == "0")
        assert subject.run == run
        after = subject.encoder.state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_command_gives_the_same_numbers(run: Path) -> None:
    first, second = tuned(run), tuned(run)
    assert first == second


def test_an_encoder_by_name_makes_a_round_trip(tmp_path: Path) -> None:
    subject = load_subject("timm/resnet10t", in_channels=1)
    classifier = Classifier(subject.encoder, 10, zero_head=False).eval()
    augment = crop_and_flip(clean_views(subject, Digits()))
    origin = Origin("Digits", 0.1, None, 3, views_of(augment))
    save_classifier(tmp_path / "a.ckpt", subject, classifier, origin)
    again, other, its_origin = load_classifier(str(tmp_path / "a.ckpt"))
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(other.eval()(x), classifier(x))
    assert again.encoder is other.encoder
    assert its_origin == origin
    assert vars(origin.augment()) == vars(augment) | {"strength": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "0"], "error: `fraction` must be within (0, 1]; got 0.0"),
        (["--files", "none.txt", "--fraction", "1"], "error: `files` must be a text file"),
        (["--projector_layers", "3"], "error: `projector_layers` must be within 0 and"),
        (["--epochs", "0"], "error: `epochs` must be >= 1; got 0"),
        (["--lr", "-1"], "error: `lr` must be > 0"),
    ],
)
def test_a_mistake_ends_with_one_line(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["finetune", str(run), *CPU, *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
