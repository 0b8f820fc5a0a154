"""`simclr distill` as a user meets it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_commands_finetune import CPU, fitted, tuned

from simclr_pl.cli import main
from simclr_pl.commands.classifiers import load_classifier


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.argv = ["simclr"]
    run = fitted(tmp_path_factory.mktemp("runs"))
    values = tuned(run, "--projector_layers", "1", "--lr", "5.0", "--baselines", "false")
    return Path(values["classifier"])


def test_a_student_like_the_teacher_learns_its_answers_and_is_saved(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["distill", str(teacher), "--epochs", "2", *CPU])
    printed = capsys.readouterr().out
    assert "student" in printed
    assert "teacher" in printed
    assert "chance is 10.0 %" in printed
    values = json.loads(teacher.with_suffix(".distill.json").read_text())
    assert (values["samples"], values["query"], values["top1_chance"]) == (1347, 450, 0.1)
    tuned_values = json.loads(teacher.with_suffix(".json").read_text())
    assert values["top1_teacher"] == tuned_values["top1"]
    subject, student, origin = load_classifier(values["classifier"])
    assert len(student.projector) == 0
    assert (
        torch.load(values["classifier"], weights_only=True)["classifier"]["projector_layers"] == 0
    )
    assert origin.fraction == 0.05
    assert subject.num_features == 32


def test_a_student_may_have_the_architecture_of_another_run_and_learn_labels_too(
    teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "own.json"
    options = ["--student", str(teacher.parents[1]), "--labelled_weight", "0.3", "--epochs", "1"]
    main(["distill", str(teacher), *options, "--out", str(out), *CPU])
    values = json.loads(out.read_text())
    assert values["options"]["labelled_weight"] == 0.3
    assert values["classifier"] == str(tmp_path / "own.ckpt")
    main(["distill", values["classifier"], "--dataset", "Digits", "--epochs", "1", *CPU])  # onwards


def test_a_teacher_must_be_fine_tuned(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["distill", str(teacher.with_name("last.ckpt")), *CPU])
    assert caught.value.code == 2
    assert (
        "a checkpoint that `simclr finetune` or `simclr distill` wrote" in capsys.readouterr().err
    )
