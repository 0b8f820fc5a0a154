"""The page on a modality of one's own keeps its word: its one file learns, by the very commands there."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from test_documents import blocks, commands

from simclr_pl.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "fourth-modality.md"
# What makes it a matter of seconds.
SHORT = {
    "fit": "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 2 --data.num_workers 0 "
    "--trainer.enable_progress_bar false",
    "knn": "--num_workers 0 --k [20] --temperature [0.07]",
    "linear": "--num_workers 0 --l2 [10]",
    "report": "",
}


def test_three_classes_in_under_sixty_lines_learn_and_are_judged_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text()
    (block,) = (b for b in blocks(text) if b.language == "python")
    assert len(block.text.splitlines()) < 60
    classes = [node.name for node in ast.parse(block.text).body if isinstance(node, ast.ClassDef)]
    assert classes == ["Waves", "SeriesAugment", "SeriesEncoder"]
    Path(block.title).write_text(block.text)
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(sys, "argv", ["simclr"])  # LightningCLI warns of pytest's own
    shell = "\n".join(b.text for b in blocks(text) if not b.language)
    found = [line.split()[1:] for line in commands(shell)]
    assert [words[0] for words in found] == list(SHORT)
    for words in found:
        main([*words, *SHORT[words[0]].split()])
    run = Path("runs/waves/version_0")
    scores = json.loads((run / "summary.json").read_text())
    assert scores["knn_top1"] > max(0.65, scores["knn_top1_init"], scores["knn_top1_raw"])
    assert (scores["unit"], scores["raw_name"]) == ("series", "raw series")
    for name in ("knn", "linear"):
        result = json.loads((run / f"checkpoints/last.{name}.json").read_text())
        assert result["top1"] > max(result["top1_init"], result["top1_raw"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("Accuracy on the query series", "series per second", "480 query series"):
        assert words in said
    report = (run / "report.html").read_text()
    assert "the better of the encoder at initialisation and raw series" in report
    assert "missing or damaged" not in report  # there are no pictures to be missed
