"""CIFAR and STL from tiny archives in torchvision's layout, with checksums to match."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from pictures import opened

from simclr_pl.data import CIFAR10, CIFAR100, STL10
from simclr_pl.errors import InputError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(
    dataset: Any, root: Path, labels_name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> dict[bool, tuple[np.ndarray, list[int]]]:
    """Three images a batch; returns pixels (M, 3, 32, 32) and labels by whether it is training."""
    folder = root / dataset.base_folder
    folder.mkdir()
    written: dict[bool, tuple[np.ndarray, list[int]]] = {}
    generator = np.random.default_rng(0)
    for training, name in ((True, "train_list"), (False, "test_list")):
        sums, pixels, labels = [], [], []
        for file_name, _ in getattr(dataset, name):
            rows = generator.integers(0, 256, (3, 3 * 32 * 32), dtype=np.uint8)
            numbers = generator.integers(0, classes, 3).tolist()
            (folder / file_name).write_bytes(pickle.dumps({"data": rows, labels_name: numbers}))
            sums.append([file_name, md5(folder / file_name)])
            pixels.append(rows.reshape(3, 3, 32, 32))  # the archive has planes: red, green, blue
            labels += numbers
        monkeypatch.setattr(dataset, name, sums)
        written[training] = np.concatenate(pixels), labels
    meta = dict(dataset.meta)
    (folder / meta["filename"]).write_bytes(
        pickle.dumps({meta["key"]: [str(i) for i in range(classes)]})
    )
    monkeypatch.setattr(dataset, "meta", {**meta, "md5": md5(folder / meta["filename"])})
    return written


CIFARS = [
    (CIFAR10, torchvision.datasets.CIFAR10, "labels", 10),
    (CIFAR100, torchvision.datasets.CIFAR100, "fine_labels", 100),
]


@pytest.mark.parametrize(("source", "dataset", "labels_name", "classes"), CIFARS)
def test_cifar_has_the_pixels_and_labels_of_its_archive(
    source: Any,
    dataset: Any,
    labels_name: str,
    classes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = write_cifar(dataset, tmp_path, labels_name, classes, monkeypatch)
    for download in (False, True):  # with the files there, nothing is fetched
        cifar = opened(source(str(tmp_path), download=download))
        assert cifar.channels == 3
        assert cifar.bank is cifar.train
        for training, images in ((True, cifar.train), (False, cifar.query)):
            pixels, labels = written[training]
            assert images.pixels.dtype == torch.uint8
            assert images.pixels.is_contiguous(memory_format=torch.channels_last)
            assert np.array_equal(images.pixels.numpy(), pixels)
            assert images.labels.dtype == np.int64
            assert images.labels.tolist() == labels
    assert cifar.default_augment().size == 32


def write_stl(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """4 labelled, 3 unlabelled and 2 test images; returns what was written, labels from 0."""
    dataset = torchvision.datasets.STL10
    folder = root / dataset.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    written = {}
    for name, count in (("train", 4), ("unlabeled", 3), ("test", 2)):
        pixels = generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        written[name] = pixels
        # The archive is column by column.
        (folder / f"{name}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        if name != "unlabeled":
            labels = generator.integers(0, 10, count)
            written[f"{name}_labels"] = labels
            (folder / f"{name}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    for name in ("train_list", "test_list"):
        sums = [[file, md5(folder / file)] for file, _ in getattr(dataset, name)]
        monkeypatch.setattr(dataset, name, sums)
    return written


def test_stl10_learns_from_unlabelled_images_too_and_its_bank_is_the_labelled_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_stl(tmp_path, monkeypatch)
    stl = opened(STL10(str(tmp_path), download=True))
    everything = np.concatenate([written["train"], written["unlabeled"]])
    for images, pixels, labels in (
        (stl.train, everything, [*written["train_labels"].tolist(), -1, -1, -1]),
        (stl.bank, written["train"], written["train_labels"].tolist()),
        (stl.query, written["test"], written["test_labels"].tolist()),
    ):
        assert images.pixels.dtype == torch.uint8
        assert np.array_equal(images.pixels.numpy(), pixels)
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == labels
    assert stl.default_augment().size == 96


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100, STL10])
def test_missing_archives_without_download_raise_input_error(source: Any, tmp_path: Path) -> None:
    missing = source(str(tmp_path / "nowhere"), download=False)
    missing.prepare()
    with pytest.raises(InputError, match=f"must hold {source.__name__}; got .*nowhere.*download"):
        missing.open()
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_archive_raises_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(torchvision.datasets.CIFAR10, tmp_path, "labels", 10, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="must hold CIFAR10"):
        CIFAR10(str(tmp_path), download=False).open()
