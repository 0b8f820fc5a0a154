"""Sources of sounds: what is found and said, and runs on them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from sounds import BAD, RATE, digits, pitch_of, spoilt, tone, write
from test_resume import checkpoint, deviations, fit
from tiny import tiny_model, tiny_trainer

from simclr_pl import AudioAugment, ContrastiveDataModule
from simclr_pl.data import AudioFolder, SpokenDigits
from simclr_pl.errors import InputError

# What is found


def test_the_three_layouts_and_every_format_are_read(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            for label, hertz in (("high", 900), ("low", 300)):
                suffix = (".wav", ".flac", ".mp3", ".ogg")[i]
                write(tmp_path / "a" / split / label / f"{i}{suffix}", tone(hertz, rate=8000), 8000)
    split_folder = AudioFolder(str(tmp_path / "a"), 8000)
    split_folder.open()
    assert split_folder.classes == ["high", "low"]
    assert split_folder.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (len(split_folder.query), split_folder.channels, split_folder.unit) == (4, 1, "clips")
    for i in range(6):
        clip = split_folder.train.open(i)
        hertz = (900, 300)[split_folder.train.labels[i]]
        assert clip.rate == 8000
        assert pitch_of(clip.read(0, clip.frames), 8000) == pytest.approx(hertz, abs=10)
    classes = AudioFolder(str(tmp_path / "a" / "train"), 8000, query_fraction=0.34)
    classes.open()
    assert (len(classes.train), len(classes.query), len(classes.classes)) == (4, 2, 2)
    flat = AudioFolder(str(tmp_path / "a" / "train" / "high"), 8000)
    flat.open()
    assert (len(flat.train), len(flat.query)) == (2, 1)
    assert {*flat.train.labels, *flat.query.labels} == {-1}
    assert not flat.converted


def test_default_views_are_of_the_rate_of_the_source() -> None:
    assert AudioFolder("x", 22050).default_augment().sample_rate == 22050
    assert SpokenDigits("x").default_augment().sample_rate == 8000


def test_a_folder_without_sounds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must hold clips \(\.wav, .*; got none"):
        AudioFolder(str(tmp_path)).open()
    with pytest.raises(InputError, match="does not exist"):
        AudioFolder(str(tmp_path / "none")).open()


@pytest.mark.parametrize("inner", ["", "recordings"])
def test_spoken_digits_are_evaluated_on_the_last_speakers(inner: str, tmp_path: Path) -> None:
    digits(tmp_path / inner, 1, ("ann", "bob", "c_d", "eve", "flo", "guy", "hal"))
    stray = write(tmp_path / inner / "noise.wav", tone(100))
    source = SpokenDigits(str(tmp_path), RATE)
    source.open()
    assert list(source.classes) == list("0123456789")
    assert (len(source.train), len(source.query)) == (60, 10)
    for split, speakers in ((source.train, "ann bob c_d eve flo guy"), (source.query, "hal")):
        names = [Path(split.name(i)).stem for i in range(len(split))]
        assert {name[2:-2] for name in names} == set(speakers.split())
        assert split.labels.tolist() == [int(name[0]) for name in names]
    assert source.left_out == [(str(stray), "its name is not digit_speaker_number")]


def test_query_speakers_can_be_named(tmp_path: Path) -> None:
    source = SpokenDigits(str(digits(tmp_path, 1)), RATE, query_speakers=["ann", "cy"])
    source.open()
    assert (len(source.train), len(source.query)) == (10, 20)


@pytest.mark.parametrize("asked", [["dan"], ["ann", "bob", "cy"]])
def test_speakers_that_are_unknown_or_all_are_refused(asked: list[str], tmp_path: Path) -> None:
    source = SpokenDigits(str(digits(tmp_path, 1)), RATE, query_speakers=asked)
    with pytest.raises(InputError, match="some of the speakers ann, bob, cy"):
        source.open()


def test_a_single_speaker_or_no_digit_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave one to learn from; got ann"):
        SpokenDigits(str(digits(tmp_path / "one", 1, ("ann",))), RATE).open()
    write(tmp_path / "none" / "word.wav", tone(100))
    with pytest.raises(InputError, match=r"digit_speaker_number\.wav; got none"):
        SpokenDigits(str(tmp_path / "none"), RATE).open()


@pytest.mark.parametrize("options", [{"sample_rate": 0}, {"max_seconds": -1.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SpokenDigits("x", **options)


def test_conversions_are_remarked_once_each_with_their_count_and_first_path(
    tmp_path: Path,
) -> None:
    for i in range(70):
        write(tmp_path / f"{i:02d}.wav", tone(300, 0.02, channels=1 + (i == 9)))
    write(tmp_path / "70.wav", tone(300, 0.02), 8000)
    write(tmp_path / "71.wav", tone(300, 0.02, channels=2), 16000)
    (tmp_path / "72.wav").write_bytes(b"")
    source = AudioFolder(str(tmp_path), RATE)
    source.open()
    assert source.converted == [
        f"2 of 73 clips are resampled to 4000 Hz, first '{tmp_path}/70.wav' of 8000 Hz",
        f"2 of 73 clips become one channel by averaging, first '{tmp_path}/09.wav' of 2 channels",
    ]


# Runs


def module_of(root: Path | str, **options: Any) -> ContrastiveDataModule:
    """Views of 32 bands by 32 frames."""
    augment = AudioAugment(RATE, seconds=0.31, n_mels=32, window=64.0)
    source = SpokenDigits(str(root), RATE)
    defaults = {"global_batch_size": 8, "bank_size": 20, "num_workers": 0}
    return ContrastiveDataModule(source, augment=augment, **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


def test_every_bad_file_is_reported_once_with_its_path_and_the_run_finishes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digits(tmp_path)
    bad = {}
    for i, (suffix, make, _) in enumerate(BAD.values()):
        path = tmp_path / f"{i % 10}_bob_{90 + i}{suffix}"
        make(path)
        if path.is_file():
            bad[str(path)] = 0
    bad[str(write(tmp_path / "9_cy_99.wav", spoilt(np.nan), subtype="FLOAT"))] = 0  # of the query
    write(tmp_path / "3_ann_77.wav", tone(300, channels=2), 8000)
    data = module_of(tmp_path, max_bad_fraction=0.5, num_workers=1)
    with caplog.at_level(logging.WARNING, logger="simclr_pl"):
        trainer = tiny_trainer([], limit_train_batches=1.0)
        trainer.fit(tiny_model(), datamodule=data)
    assert trainer.global_step == 2 * (len(data.samples("train")) // 8)
    for record in caplog.records:
        for path in bad:
            bad[path] += repr(path) in record.getMessage()
    assert {*bad.values()} == {1}
    assert data.unreadable.keys() == bad.keys()
    said = [r.getMessage() for r in caplog.records if " of 8000 Hz" in r.getMessage()]
    assert len(said) == 1


class Batches(Callback):
    """The views of each step by sample and number, and the losses."""

    def __init__(self) -> None:
        self.views: dict[tuple[int, int, int], torch.Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        for v, views in enumerate(batch["views"].chunk(2)):
            for i, view in zip(batch["index"].tolist(), views, strict=True):
                self.views[trainer.global_step, i, v] = view.clone()


def batches_of(
    root: str, ranks: int
) -> tuple[dict[tuple[int, int, int], torch.Tensor], list[float]]:
    seen = Batches()
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    trainer = tiny_trainer([seen], limit_train_batches=2, limit_val_batches=0, **options)
    model = tiny_model(batch_norm=False)
    trainer.fit(model, datamodule=module_of(root))
    return seen.views, seen.losses


def test_two_ranks_have_the_global_batches_of_one(folder: Path) -> None:
    one, losses = batches_of(str(folder), 1)
    (a, losses_a), (b, losses_b) = on_ranks(2, batches_of, str(folder), 2)
    assert len(one) == 4 * 8 * 2
    assert not a.keys() & b.keys()
    two = a | b
    assert two.keys() == one.keys()
    for key, view in one.items():
        torch.testing.assert_close(two[key], view, rtol=0, atol=1e-4)
    assert losses_a == losses_b == pytest.approx(losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
def test_a_run_that_is_resumed_within_an_epoch_is_the_uninterrupted_one(
    folder: Path, tmp_path: Path
) -> None:
    uninterrupted = fit(tmp_path, data=module_of(folder))
    for step in (3,):
        resumed = fit(tmp_path / str(step), checkpoint(tmp_path, step), module_of(folder))
        assert deviations(uninterrupted, resumed, step) == []
