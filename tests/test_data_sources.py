"""Sources: which images, in which split, with which label."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from simclr_pl.data import CIFAR10, CIFAR100, STL10, DatasetSource, Digits, ImageFolder, Source
from simclr_pl.data.sources import Images, ResidentImages, StoredImages, as_source
from simclr_pl.errors import InputError


def opened(source: Source) -> Source:
    source.prepare()
    source.open()
    return source


def pixels_of(images: Images) -> list[np.ndarray]:
    """(H, W, C) uint8 of every image."""
    if isinstance(images, ResidentImages):
        return list(images.pixels.permute(0, 2, 3, 1).numpy())
    return [images.read(i) for i in range(len(images))]


def noise(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


# Digits.


def test_digits_have_1347_and_450_grey_images_of_32_pixels_in_all_classes() -> None:
    digits = opened(Digits())
    assert digits.channels == 1
    assert digits.bank is digits.train
    for images, count in ((digits.train, 1347), (digits.query, 450)):
        assert isinstance(images, ResidentImages)
        assert len(images) == count
        assert images.pixels.shape == (count, 1, 32, 32)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == np.int64
        assert np.bincount(images.labels).min() > 0.05 * count
        assert images.labels.max() == 9


def test_digits_are_the_same_for_ever() -> None:
    # A change of these pixels makes every published number on them void.
    digits = opened(Digits())
    digest = hashlib.sha256()
    for images in (digits.train, digits.query):
        digest.update(images.pixels.numpy().tobytes())
        digest.update(images.labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "256edd4b207969c26119550940d35f3a271bf65075cebb6f9c188182a3940ee4"


def test_digits_do_not_depend_on_random_state_and_are_drawn_anew_each_time() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the global state is the point)
    first = opened(Digits())
    torch.manual_seed(6)
    np.random.seed(6)  # noqa: NPY002
    again = opened(Digits())
    for name in ("train", "query"):
        one, other = getattr(first, name), getattr(again, name)
        assert torch.equal(one.pixels, other.pixels)
        assert np.array_equal(one.labels, other.labels)
        assert one.pixels.data_ptr() != other.pixels.data_ptr()


def test_digit_splits_share_no_image() -> None:
    digits = opened(Digits())
    train, query = ({p.tobytes() for p in pixels_of(s)} for s in (digits.train, digits.query))
    assert len(train) == 1347  # no image twice
    assert len(query) == 450
    assert not train & query


def test_digits_lie_at_every_place_of_a_noisy_canvas() -> None:
    pixels = opened(Digits()).train.pixels[:, 0].float()
    centre = (pixels > 128).float()  # above all noise
    rows = (centre.sum((0, 2)) > 0).nonzero()[:, 0]
    columns = (centre.sum((0, 1)) > 0).nonzero()[:, 0]
    assert (rows.min(), rows.max()) == (0, 31)
    assert columns.min() <= 2
    assert columns.max() >= 29
    corner = pixels[:, 0, 0][pixels[:, 0, 0] <= 77]
    assert 0.25 * 255 < corner.max() <= 0.3 * 255 + 0.5
    assert abs(corner.mean() - 0.15 * 255) < 2


# CIFAR and STL: tiny archives in torchvision's layout, with checksums to match.


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
            assert images.pixels.is_contiguous()
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


# ImageFolder.


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, counts: dict[str, int], seed: int = 0) -> dict[bytes, str]:
    """Noise images ``root/<class>/<i>.png``; returns pixels -> class."""
    written = {}
    for name, count in counts.items():
        for i in range(count):
            seed += 1
            write(root / name / f"{i}.png", noise(seed))
            written[noise(seed).tobytes()] = name
    return written


def content(images: Images) -> list[tuple[bytes, int]]:
    return [(p.tobytes(), label) for p, label in zip(pixels_of(images), images.labels, strict=True)]


@pytest.mark.parametrize("split", ["val", "test", "validation"])
def test_train_beside_val_gives_the_given_split_with_the_numbers_of_train(
    split: str, tmp_path: Path
) -> None:
    # val lacks a class of train, and has one that train lacks: that one has no number
    train = write_classes(tmp_path / "train", {"ape": 3, "bee": 2, "cat": 4})
    query = write_classes(tmp_path / split, {"aardvark": 1, "bee": 2, "cat": 1}, seed=100)
    folder = opened(ImageFolder(str(tmp_path)))
    number = {"ape": 0, "bee": 1, "cat": 2}
    assert folder.bank is folder.train
    assert dict(content(folder.train)) == {p: number[name] for p, name in train.items()}
    assert dict(content(folder.query)) == {p: number.get(name, -1) for p, name in query.items()}
    assert (len(folder.train), len(folder.query)) == (9, 4)


def test_val_is_preferred_to_test(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 3), ("val", 4)):
        write_classes(tmp_path / split, {"ape": count})
    assert len(opened(ImageFolder(str(tmp_path))).query) == 4


@pytest.mark.parametrize("under", ["", "train"])
def test_class_folders_keep_a_tenth_for_evaluation_the_same_in_every_run(
    under: str, tmp_path: Path
) -> None:
    written = write_classes(tmp_path / under, {"bee": 25, "ape": 15})
    folder, again = (opened(ImageFolder(str(tmp_path))) for _ in range(2))
    assert (len(folder.train), len(folder.query)) == (36, 4)
    together = content(folder.train) + content(folder.query)
    assert dict(together) == {p: int(name == "bee") for p, name in written.items()}
    assert len(dict(together)) == 40
    assert content(folder.train) == content(again.train)
    assert content(folder.query) == content(again.query)


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 10), (0.26, 5), (0.001, 1)])
def test_query_fraction_is_the_share_kept_and_at_least_one(
    fraction: float, kept: int, tmp_path: Path
) -> None:
    write_classes(tmp_path, {"ape": 20})
    folder = opened(ImageFolder(str(tmp_path), query_fraction=fraction))
    assert (len(folder.query), len(folder.train)) == (kept, 20 - kept)


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i}.png", noise(i))
    folder = opened(ImageFolder(str(tmp_path)))
    assert (len(folder.train), len(folder.query)) == (18, 2)
    assert set(folder.train.labels) == set(folder.query.labels) == {-1}
    found = {p for p, _ in content(folder.train) + content(folder.query)}
    assert found == {noise(i).tobytes() for i in range(20)}


def test_subfolders_of_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ape" / "2020" / "may" / "a.png", noise(1))
    write(tmp_path / "train" / "ape" / "b.png", noise(2))
    write(tmp_path / "train" / "bee" / "ape" / "c.png", noise(3))
    write(tmp_path / "train" / "stray.png", noise(4))
    write(tmp_path / "val" / "bee" / "x" / "d.png", noise(5))
    folder = opened(ImageFolder(str(tmp_path)))
    labels = {1: 0, 2: 0, 3: 1, 4: -1}
    assert dict(content(folder.train)) == {noise(s).tobytes(): n for s, n in labels.items()}
    assert content(folder.query) == [(noise(5).tobytes(), 1)]


def test_other_files_are_left_out_and_extensions_may_be_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ape" / "a.PNG", noise(1))
    (tmp_path / "train" / "ape" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "ape" / ".DS_Store").write_bytes(b"x")
    write(tmp_path / "val" / "ape" / "a.png", noise(2))
    assert content(opened(ImageFolder(str(tmp_path))).train) == [(noise(1).tobytes(), 0)]


def test_file_names_in_any_script_or_in_none_are_read(tmp_path: Path) -> None:
    names = [
        "träume und bilder.png",
        "画像.png",
        os.fsdecode(b"\xe9t\xe9.png"),
    ]  # the last: Latin-1
    for i, name in enumerate(names):
        write(tmp_path / "train" / "ape" / f"{i}.png", noise(i))
        (tmp_path / "train" / "ape" / f"{i}.png").rename(tmp_path / "train" / "ape" / name)
    write(tmp_path / "val" / "ape" / "a.png", noise(9))
    found = {p for p, _ in content(opened(ImageFolder(str(tmp_path))).train)}
    assert found == {noise(i).tobytes() for i in range(3)}


@pytest.mark.parametrize("grey", [False, True])
def test_resident_equals_reading_one_by_one(grey: bool, tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 12, "bee": 8})
    stored = opened(ImageFolder(str(tmp_path), grey=grey))
    resident = opened(ImageFolder(str(tmp_path), grey=grey, resident=True))
    for name in ("train", "bank", "query"):
        slow, fast = getattr(stored, name), getattr(resident, name)
        assert isinstance(slow, StoredImages)
        assert isinstance(fast, ResidentImages)
        assert fast.pixels.dtype == torch.uint8
        assert fast.pixels.shape[1:] == (1 if grey else 3, 6, 8)
        assert content(fast) == content(slow)


def test_grey_reads_one_channel(tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 10})
    colour, grey = opened(ImageFolder(str(tmp_path))), opened(ImageFolder(str(tmp_path), grey=True))
    assert (colour.channels, grey.channels) == (3, 1)
    for rgb, one in zip(pixels_of(colour.train), pixels_of(grey.train), strict=True):
        assert one.shape == (6, 8, 1)
        assert np.abs(rgb @ [0.299, 0.587, 0.114] - one[..., 0]).max() <= 1


def test_resident_images_of_unequal_size_raise_input_error(tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 9})
    write(tmp_path / "bee" / "odd.png", noise(0, height=7))
    with pytest.raises(InputError, match=r"one size; got \(7, 8\) at position 9 and \(6, 8\) at 0"):
        ImageFolder(str(tmp_path), resident=True).open()
    assert len(opened(ImageFolder(str(tmp_path))).train) == 9


def test_a_root_that_is_missing_or_a_file_or_empty_raises_input_error_with_its_path(
    tmp_path: Path,
) -> None:
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "empty" / "ape").mkdir(parents=True)
    for name, words in (
        ("missing", "folder of images; got .* does not exist"),
        ("file.png", "folder of images; got .* is a file"),
        ("empty", "must hold images .*; got none under"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            ImageFolder(str(tmp_path / name)).open()
        assert repr(str(tmp_path / name)) in str(caught.value)


def test_an_empty_val_raises_input_error_with_its_path(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"ape": 2})
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="got none under") as caught:
        ImageFolder(str(tmp_path)).open()
    assert repr(str(tmp_path / "val")) in str(caught.value)


# A data set of the user's own.


class Listed(Dataset):
    """Items from a list, with any attributes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


FORMS = {
    "PIL": lambda p: Image.fromarray(p),
    "array (H, W, C)": lambda p: p,
    "tensor (C, H, W)": lambda p: torch.from_numpy(p).permute(2, 0, 1),
    "pair": lambda p: (Image.fromarray(p), 3),
    "list": lambda p: [p, 3],
    "triple": lambda p: (p, 3, {"name": "x"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_item_is_read_to_the_same_pixels(form: str) -> None:
    pixels = [noise(i, height=5 + i) for i in range(4)]
    items = Listed([FORMS[form](p) for p in pixels])
    source = opened(DatasetSource(items, query=items))
    for images in (source.train, source.bank, source.query):
        found = pixels_of(images)
        assert all(np.array_equal(a, b) for a, b in zip(found, pixels, strict=True))
        assert all(p.dtype == np.uint8 for p in found)
        assert images.labels.tolist() == [-1] * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_arrays_are_read_as_one_channel_or_three(channels: Any) -> None:
    flat = [noise(i, channels=1)[..., 0] for i in range(3)]
    source = opened(DatasetSource(Listed(flat), query=Listed(flat), channels=channels))
    assert source.channels == channels
    for found, pixels in zip(pixels_of(source.train), flat, strict=True):
        assert np.array_equal(found, np.repeat(pixels[..., None], channels, 2))


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_come_from_the_attribute_of_the_data_set(name: str, kind: Any) -> None:
    train = Listed([noise(i) for i in range(3)], **{name: kind([2, 0, -1])})
    query = Listed([noise(i) for i in range(2)], **{name: kind([1, 5])})
    source = opened(DatasetSource(train, query))
    assert source.train.labels.tolist() == source.bank.labels.tolist() == [2, 0, -1]
    assert source.query.labels.tolist() == [1, 5]
    assert source.train.labels.dtype == source.query.labels.dtype == np.int64


def test_given_labels_win_over_the_attribute() -> None:
    train = Listed([noise(i) for i in range(3)], targets=[9, 9, 9])
    source = opened(DatasetSource(train, query=train, labels=[4, 5, 6]))
    assert source.train.labels.tolist() == [4, 5, 6]
    assert source.query.labels.tolist() == [9, 9, 9]


def test_without_query_a_tenth_of_train_is_kept_the_same_in_every_run() -> None:
    train = Listed([noise(i) for i in range(30)], targets=list(range(30)))
    source, again = (opened(DatasetSource(train)) for _ in range(2))
    assert (len(source.train), len(source.query)) == (27, 3)
    together = content(source.train) + content(source.query)
    assert sorted(together, key=lambda item: item[1]) == [
        (noise(i).tobytes(), i) for i in range(30)
    ]
    assert content(source.query) == content(again.query)


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 3, 4], [[1], [2], [3]], 1])
def test_labels_of_another_length_raise_input_error(labels: Any) -> None:
    with pytest.raises(InputError, match=r"one label for each image; got \(.*\) labels for 3"):
        DatasetSource(Listed([noise(i) for i in range(3)]), labels=labels).open()
    with pytest.raises(InputError, match="one label for each image"):
        DatasetSource(Listed([noise(i) for i in range(3)], targets=labels)).open()


def test_float_images_raise_input_error_when_read() -> None:
    floats = TensorDataset(torch.rand(4, 3, 6, 6))
    source = opened(DatasetSource(floats, query=floats))
    with pytest.raises(InputError, match=r"uint8 tensors; got .* of .*float32\. Return"):
        pixels_of(source.train)


@pytest.mark.parametrize("which", ["train", "query"])
def test_an_empty_data_set_raises_input_error(which: str) -> None:
    some = Listed([noise(0)])
    sets = {"train": some, "query": some, which: Listed([])}
    with pytest.raises(InputError, match="must hold images; got an empty one"):
        DatasetSource(**sets).open()


def test_as_source_wraps_a_data_set_and_keeps_a_source() -> None:
    source = Digits()
    assert as_source(source) is source
    data = Listed([noise(i) for i in range(10)])
    wrapped = as_source(data)
    assert isinstance(wrapped, DatasetSource)
    wrapped.open()
    assert (len(wrapped.train), len(wrapped.query)) == (9, 1)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield noise(0)


@pytest.mark.parametrize("garbage", [None, 3, object(), Digits, Endless(), "images/"])
def test_as_source_of_anything_else_raises_input_error(garbage: Any) -> None:
    found = type(garbage).__name__
    with pytest.raises(InputError, match=f"a Source or a Dataset with a length; got {found}"):
        as_source(garbage)


def test_subsets_keep_pixels_and_labels_together_in_the_given_order() -> None:
    pixels = [noise(i) for i in range(6)]
    labels = np.arange(6) * 10
    resident = ResidentImages(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels)
    stored = StoredImages(lambda i: pixels[i], labels)
    index = np.array([4, 0, 5])
    for images in (resident, stored):
        subset = images.subset(index)
        assert content(subset) == [(pixels[i].tobytes(), 10 * i) for i in index]
        assert content(subset.subset(np.array([2, 0]))) == [
            (pixels[i].tobytes(), 10 * i) for i in (5, 4)
        ]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_query_fraction_that_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"`query_fraction` must be within \(0, 1\); got"):
        ImageFolder("images", query_fraction=fraction)


def test_a_subset_of_a_labelled_data_set_keeps_its_labels() -> None:
    class Labelled(torch.utils.data.Dataset):
        targets = (3, 1, 4, 1, 5)

        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> np.ndarray:
            return np.full((4, 4, 3), i, np.uint8)

    subset = torch.utils.data.Subset(Labelled(), [4, 0, 2])
    source = DatasetSource(subset, query=Labelled())
    source.open()
    assert source.train.labels.tolist() == [5, 3, 4]
    assert source.train.read(1)[0, 0, 0] == 0
