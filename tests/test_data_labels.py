"""A part of the labels: stratified, keyed, the same everywhere; and lists of files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from tiny import tiny_model, tiny_trainer
from torch.utils.data import TensorDataset

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.data import DatasetSource, Digits, ImageFolder, Shards
from simclr_pl.data.commands import pack
from simclr_pl.data.labels import LabelledSubset, stratified
from simclr_pl.data.sources import ResidentImages


def uneven_labels() -> np.ndarray:
    """Classes 0 to 4 of 1, 2, 30, 101 and 266 images, and 50 unlabelled ones, mixed."""
    labels = np.repeat([0, 1, 2, 3, 4, -1], [1, 2, 30, 101, 266, 50])
    return labels[np.random.default_rng(0).permutation(len(labels))]


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.25, 0.5, 1.0])
def test_each_class_keeps_its_share_and_at_least_one_image(fraction: float) -> None:
    labels = uneven_labels()
    kept = stratified(labels, fraction, seed=3)
    assert np.array_equal(kept, np.unique(kept))
    counts = Counter(labels[kept].tolist())
    assert counts.keys() == {0, 1, 2, 3, 4}
    for label, there_are in {0: 1, 1: 2, 2: 30, 3: 101, 4: 266}.items():
        assert counts[label] >= 1
        assert abs(counts[label] - fraction * there_are) <= (0.5 if counts[label] > 1 else 1)


def test_a_smaller_part_lies_within_a_larger_one_and_another_seed_is_another_part() -> None:
    labels = uneven_labels()
    small, large, other = (set(stratified(labels, f, s)) for f, s in ((0.1, 0), (0.3, 0), (0.1, 1)))
    assert small < large
    assert len(small & other) < len(small) / 2
    assert max(small) > 300  # not the first ones


def pixels_chosen(fraction: float) -> tuple[torch.Tensor, list[int]]:
    """The training images of a fit, on this rank's data module."""
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    data = ContrastiveDataModule(LabelledSubset(Digits(), fraction, seed=7), 2 * devices)
    trainer = tiny_trainer(
        [],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(tiny_model(), datamodule=data)
    images = data.samples("train")
    assert isinstance(images, ResidentImages)
    return images.pixels, images.labels.tolist()


def test_one_percent_are_the_same_images_in_every_run_and_at_every_number_of_ranks() -> None:
    pixels, labels = pixels_chosen(0.01)
    assert set(labels) == set(range(10))
    assert len(labels) == 10  # each class has 128 to 140 images
    for other, their_labels in [pixels_chosen(0.01), *on_ranks(2, pixels_chosen, 0.01)]:
        assert torch.equal(other, pixels)
        assert their_labels == labels


def test_the_part_is_training_set_and_bank_and_the_query_stays() -> None:
    data = ContrastiveDataModule(LabelledSubset(Digits(), 0.1), 8, n_views=1)
    data.setup()
    assert len(data.samples("train")) == len(data.samples("bank")) == 135
    assert len(data.samples("query")) == 450
    assert data.train_is_labelled
    assert data.num_classes == 10


def test_unlabelled_images_are_left_out_or_kept_without_labels() -> None:
    labels = uneven_labels()
    images = TensorDataset(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8))
    inner = DatasetSource(images, query=images, labels=labels.tolist(), channels=1)
    part = LabelledSubset(inner, 0.5)
    part.open()
    assert len(part.train) == len(part.bank) == (labels[stratified(labels, 0.5, 0)] >= 0).sum()
    rest = LabelledSubset(inner, 0.5, keep_rest=True)
    rest.open()
    known = np.flatnonzero(rest.train.labels >= 0)
    assert np.array_equal(known, stratified(labels, 0.5, 0))
    assert np.array_equal(rest.train.labels[known], labels[known])
    assert len(rest.train) == len(labels)
    assert np.array_equal(rest.bank.labels, part.bank.labels)
    assert np.array_equal(inner.train.labels, labels)  # the other source's own are as they were


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six images, of which one name is in both."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for i in range(6):
                name = "both.png" if i == 5 else f"{label}_{i}.png"
                Image.new("RGB", (8, 8)).save(root / split / label / name)
    return root


def names(source: LabelledSubset) -> list[str]:
    source.open()
    return [source.train.name(i) for i in range(len(source.train))]


def test_a_list_of_files_chooses_by_the_end_of_the_path(folder: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "list.txt"
    wanted.write_text("bee_3.png\n\n  ant_0.png\nbee/both.png\nt_1.png\nwasp_1.png\n")
    source = LabelledSubset(ImageFolder(str(folder)), files=str(wanted))
    train = folder / "train"
    assert names(source) == [
        str(train / n) for n in ("ant/ant_0.png", "bee/bee_3.png", "bee/both.png")
    ]
    assert source.train.labels.tolist() == [0, 1, 1]
    assert source.missing == ["t_1.png", "wasp_1.png"]  # part of a name is none


def test_a_list_of_files_also_names_images_of_a_packed_set(folder: Path, tmp_path: Path) -> None:
    pack(str(folder), str(tmp_path / "packed"), workers=1)
    wanted = tmp_path / "list.txt"
    wanted.write_text("bee_3.png\nant/both.png\n")
    source = LabelledSubset(Shards(str(tmp_path / "packed")), files=str(wanted))
    assert [n.split(" ")[0] for n in names(source)] == [
        "train/ant/both.png",
        "train/bee/bee_3.png",
    ]
    assert source.missing == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("wasp.png\n", r"must name labelled images.*first line is 'wasp.png'.*ant_0.png"),
        ("", "must name labelled images"),
        ("both.png\n", r"must name one image; got 2 for 'both.png'"),
        (None, r"`files` must be a text file.*No such file"),
    ],
)
def test_a_list_that_cannot_be_used_is_an_error(
    folder: Path, tmp_path: Path, lines: str | None, message: str
) -> None:
    if lines is not None:
        (tmp_path / "list.txt").write_text(lines)
    source = LabelledSubset(ImageFolder(str(folder)), files=str(tmp_path / "list.txt"))
    with pytest.raises(InputError, match=message):
        source.open()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_an_error(fraction: float) -> None:
    with pytest.raises(InputError, match=r"`fraction` must be within \(0, 1\]"):
        LabelledSubset(Digits(), fraction)


def test_a_fraction_and_files_exclude_each_other() -> None:
    with pytest.raises(InputError, match="either `fraction` or `files`"):
        LabelledSubset(Digits(), 0.1, "list.txt")


def test_a_set_without_labels_is_an_error() -> None:
    images = TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="needs labelled images; got none in DatasetSource"):
        LabelledSubset(DatasetSource(images), 0.5).open()
