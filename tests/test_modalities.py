"""Every monitor and every command, on samples that are no images."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

from simclr_pl.cli import main
from simclr_pl.commands.encoders import clean_example, load_subject, source_for
from simclr_pl.data import AudioFolder, ImageFolder, TextFile
from simclr_pl.data.commands import source_of
from simclr_pl.doctor import sample, step

TRAIN = ["--config", "quickstart", "--data.global_batch_size", "24", "--data.num_workers", "0"]
TRAIN += [
    "--model.warmup_epochs",
    "0",
    "--trainer.max_epochs",
    "2",
    "--trainer.log_every_n_steps",
    "1",
]
TRAIN += ["--trainer.check_val_every_n_epoch", "1", "--trainer.enable_progress_bar", "false"]
TRAIN += ["--trainer.accelerator", "cpu", "--data.max_bad_fraction", "0.1"]


def rows(folder: Path) -> list[str]:
    """A user's own: no class of the package knows it."""
    data = ["--data.source", "my_table.Rows3", "--data.augment", "my_table.Masks"]
    return [*data, "--model.encoder", "my_table.RowEncoder", "--model.encoder.width", "8"]


def clips(folder: Path) -> list[str]:
    """Two digits spoken by three people: two chords, each at its own pitch."""
    rng = np.random.default_rng(0)
    (folder / "sounds").mkdir()
    for i in range(48):
        digit, speaker = i % 2, "abc"[i % 3]
        time = np.arange(1600 + 40 * i) / 8000
        pitch = 200 + 50 * (i % 3)
        tones = [np.sin(2 * np.pi * pitch * k * time) for k in ((1, 3) if digit else (2, 5))]
        wave = 0.2 * sum(tones) + 0.02 * rng.normal(size=len(time))
        soundfile.write(folder / "sounds" / f"{digit}_{speaker}_{i}.wav", wave, 8000)
    data = ["--data.source", "SpokenDigits", "--data.source.root", str(folder / "sounds")]
    data += ["--data.augment", "simclr_pl.AudioAugment", "--data.augment.sample_rate", "8000"]
    data += ["--data.augment.seconds", "0.4", "--data.augment.n_mels", "16"]
    return [*data, "--data.global_batch_size", "16", "--model.encoder.width", "4"]


def documents(folder: Path) -> list[str]:
    """Sentences of two kinds in a table."""
    words = ("red green blue pink grey", "one two three four five")
    rng = np.random.default_rng(0)
    table = [f"{' '.join(rng.permutation(words[i % 2].split()))} {i},{i % 2}" for i in range(400)]
    (folder / "texts.csv").write_text("\n".join(["text,kind", *table]) + "\n")
    source = ["--data.source", "TextFile", "--data.source.path", str(folder / "texts.csv")]
    source += ["--data.source.label_column", "kind", "--data.source.vocab_size", "300"]
    augment = ["--data.augment", "simclr_pl.TextAugment", "--data.augment.vocab_size", "300"]
    encoder = ["--model.encoder", "simclr_pl.TextEncoder", "--model.encoder.vocab_size", "300"]
    encoder += [
        "--model.encoder.width",
        "8",
        "--model.encoder.depth",
        "1",
        "--model.encoder.heads",
        "2",
    ]
    return [*source, *augment, *encoder]


KINDS = {"rows": rows, "clips": clips, "documents": documents}


class Trained:
    """A run of all monitors, and what it said."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.options = KINDS[kind](folder)
        self.records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = self.records.append  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            main(["fit", *TRAIN, *self.options, "--trainer.default_root_dir", str(folder)])
        finally:
            logging.getLogger().removeHandler(handler)
        self.folder = folder / "quickstart" / "version_0"
        self.summary = json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=list(KINDS))
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    sys.argv = ["simclr"]  # LightningCLI warns of pytest's own arguments
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def simclr(*words: Any) -> int | str | None:
    """The command's exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as leaving:
        return leaving.code
    return 0


# The monitors.


def test_all_monitors_run_and_speak_of_what_there_is(run: Trained) -> None:
    unit, raw = run.summary["unit"], run.summary["raw_name"]
    assert unit != "images"
    assert raw != "raw pixels"
    for key in ("knn_top1", "linear_top1", "knn_top1_raw", "linear_top1_init", "probe_top1"):
        assert 0 <= run.summary[key] <= 1
    head = (run.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    for key in (
        "knn/top1",
        "probe/loss",
        "collapse/top1",
        "collapse/uniformity",
        "data/unreadable",
    ):
        assert key in head
    report = (run.folder / "report.html").read_text()
    assert f"{unit} per second" in report
    assert f"the encoder at initialisation and {raw}" in report
    assert "missing or damaged" not in report


def test_only_what_can_be_seen_is_drawn_and_nobody_is_alarmed(run: Trained) -> None:
    drawn = {
        path.name.partition("_")[0].partition(".")[0]
        for path in (run.folder / "pictures").iterdir()
    }
    augment = load_subject(str(run.folder)).config["data"]["augment"]["class_path"]
    assert drawn == ({"map", "views", "neighbours"} if "Audio" in augment else {"map"})
    alarms = [r.getMessage() for r in run.records if r.levelno >= logging.WARNING]
    assert [line for line in alarms if "cannot read" not in line and "commas" not in line] == []


# The commands.


def test_knn_and_linear_score_it_beside_both_baselines(
    run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--num_workers", "0"]
    knn = ["knn", run.folder, "--k", "[5]", "--temperature", "[0.07]", *few]
    fresh = ["--augment", "true", "--epochs", "1", "--lr", "[0.1]", "--weight_decay", "[0.0]"]
    fresh += ["--sgd_batch_size", "16"]
    for words in (
        knn,
        ["linear", run.folder, "--l2", "[10]", *few],
        ["linear", run.folder, *fresh, *few],
    ):
        assert simclr(*words) == 0
        found = json.loads((run.folder / f"checkpoints/last.{words[0]}.json").read_text())
        assert found["raw_name"] == run.summary["raw_name"]
        for suffix in ("", "_init", "_raw"):
            assert 0 <= found[f"top1{suffix}"] <= 1
        said = capsys.readouterr().out
        assert run.summary["unit"] in said
        assert "image" not in said


def test_it_is_fine_tuned_distilled_and_embedded(
    run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--epochs", "1", "--num_workers", "0"]
    assert simclr("finetune", run.folder, *few) == 0
    assert simclr("distill", run.folder / "checkpoints/last.finetune.ckpt", *few) == 0
    result = json.loads((run.folder / "checkpoints/last.finetune.distill.json").read_text())
    assert 0 <= result["top1"] <= 1
    assert simclr("embed", run.folder, "--num_workers", "0") == 0
    assert "image" not in capsys.readouterr().out
    table = pq.read_table(run.folder / "checkpoints/last.query.parquet")
    subject = load_subject(str(run.folder))
    with torch.no_grad():
        expected = subject.encoder.eval()(clean_example(subject, 3))
    found = np.stack(table["features"].to_pylist()[:3])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_it_is_exported_and_the_files_give_its_features(run: Trained) -> None:
    subject = load_subject(str(run.folder))
    views = clean_example(subject, 5)
    with torch.no_grad():
        expected = subject.encoder.eval()(views)
    forms = ["safetensors", "torch"] if views.is_floating_point() else ["safetensors", "onnx"]
    for form in forms:
        assert simclr("export", run.folder, "--format", form) == 0
    file = run.folder / "checkpoints/last"
    weights = subject.encoder.state_dict()
    assert load_file(file.with_suffix(".safetensors")).keys() == weights.keys()
    if "torch" in forms:
        found = torch.export.load(file.with_suffix(".pt2")).module()(views)
    else:  # a text of another length than the example that was traced
        views = torch.cat([views, views.new_zeros(5, 7)], 1)
        session = onnxruntime.InferenceSession(file.with_suffix(".onnx"))
        found = torch.from_numpy(session.run(None, {"views": views.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert simclr("export", run.folder, "--format", "huggingface", "--out", "hf") == 2
    assert not Path("hf").exists()


def test_the_doctor_measures_its_own_views(run: Trained) -> None:
    """In this process: `simclr doctor` looks and measures in children, which only take longer."""
    arguments = [*TRAIN, *run.options]
    sent: list[Any] = []
    sample.look(sent.append, 0, arguments, 16, 1.0)
    found = {key: value for part in sent for key, value in part.items()}
    (kind,) = found["kinds"]
    view = clean_example(load_subject(str(run.folder)), 1)
    assert kind.number == 2
    assert len(kind.shape) == view.dim() - 1
    assert (kind.highest is None) == view.is_floating_point()
    said = [line.text for line in sample.lines_of(found, 0.2, 24)]
    assert f"{run.summary['unit']} to learn from" in said[0]
    assert "channel" not in said[0]
    sent.clear()
    step.measure(sent.append, 0, arguments, [kind], 24, 2**40, 60.0, 1)
    assert [m[0] for m in sent[1:]] == [0, 2, 4, 8, 16, 24]


def test_other_data_are_made_as_those_of_the_run(run: Trained) -> None:
    subject = load_subject(str(run.folder))
    own = source_for(subject, None)
    if own.unit == "rows":
        return
    path = str(own.root if own.unit == "clips" else own.path)  # type: ignore[attr-defined]
    other = source_for(subject, path)
    assert type(other) is (AudioFolder if own.unit == "clips" else TextFile)
    name = "sample_rate" if own.unit == "clips" else "vocab_size"
    assert getattr(source_of(path), name) != getattr(other, name) == getattr(own, name)


def test_check_lists_what_a_source_of_ones_own_holds(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workers", "0", "--report", "found.json"]
    assert simclr("data", "check", "my_table.Rows3", *options) == 1
    said = capsys.readouterr().out
    assert "Not all rows are usable." in said
    assert "image" not in said
    found = json.loads(Path("found.json").read_text())
    assert found["rows"] == {"train": 300, "query": 150}
    lines = [(f["kind"], f["path"], f["detail"]) for f in found["findings"]]
    assert lines == [
        ("unreadable", "table.csv:head", "it has no numbers"),
        ("converted", "Rows3", "2 rows had commas for points"),
        ("unreadable", "table.csv:7", "a cell has no number"),
        ("duplicate", "table.csv:50", "the same bytes as table.csv:3, of another class"),
    ]
    assert simclr("data", "info", "my_table.Rows3", "--workers", "0") == 0
    assert "rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["pack", "SRC", "out"], ["stats", "SRC"], ["check", "SRC", "--fix", "o"]]
)
def test_what_rewrites_images_refuses_other_samples(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert simclr("data", *[word.replace("SRC", "my_table.Rows3") for word in words]) == 2
    error = capsys.readouterr().err
    assert "`src` must hold images; got rows, of Rows3." in error
    assert "Traceback" not in error


def test_a_folder_or_a_file_says_what_it_holds(tmp_path: Path) -> None:
    clips(tmp_path)
    documents(tmp_path)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.txt").write_text("one\n")
    for name, kind in (("sounds", AudioFolder), ("texts.csv", TextFile), ("lines", TextFile)):
        assert type(source_of(str(tmp_path / name))) is kind
    Image.new("L", (8, 8)).save(tmp_path / "sounds/cover.png")
    assert type(source_of(str(tmp_path / "sounds"))) is ImageFolder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "32"], "`size` is of images; got 32 for "),
        (["--dataset", "Digits"], "`dataset` must hold what the encoder was trained on, "),
    ],
)
def test_what_is_of_images_alone_is_one_line(
    options: list[str], message: str, run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simclr("knn", run.folder, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
