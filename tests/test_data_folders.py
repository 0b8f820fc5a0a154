"""Folders of image files: which are found, in which order, with which label."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import content, encoded, noise, opened, pixels_of, write, write_classes

from simclr_pl.data import ImageFolder
from simclr_pl.data.decode import EXTENSIONS, UnreadableSample
from simclr_pl.data.folders import FileReader, list_files
from simclr_pl.data.sources import StoredSamples
from simclr_pl.errors import InputError


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


def test_grey_reads_one_channel(tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 10})
    colour, grey = opened(ImageFolder(str(tmp_path))), opened(ImageFolder(str(tmp_path), grey=True))
    assert (colour.channels, grey.channels) == (3, 1)
    for rgb, one in zip(pixels_of(colour.train), pixels_of(grey.train), strict=True):
        assert one.shape == (6, 8, 1)
        assert np.abs(rgb @ [0.299, 0.587, 0.114] - one[..., 0]).max() <= 1


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


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_query_fraction_that_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"`query_fraction` must be within \(0, 1\); got"):
        ImageFolder("images", query_fraction=fraction)


# Listing and reading.


def names_below(folder: Path, classes: list[str]) -> dict[str, int]:
    names, labels = list_files(str(folder), classes, EXTENSIONS)
    assert labels.dtype == np.int64
    return {
        os.path.relpath(os.fsdecode(name), folder): label
        for name, label in zip(names, labels.tolist(), strict=True)
    }


def test_the_order_does_not_depend_on_that_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.png", "b/10.png", "a/9.png", "c.png", "B/1.png", "b/d/1.png", "b/a/1.png"):
        write(tmp_path / name, noise(0))
    expected = ["c.png", "B/1.png", "a/9.png", "b/10.png", "b/2.png", "b/a/1.png", "b/d/1.png"]
    assert list(names_below(tmp_path, [])) == expected
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            self.entries = iter(sorted(scandir(path), key=lambda e: e.name, reverse=True))

        def __iter__(self) -> Any:
            return self.entries

        def __next__(self) -> Any:
            return next(self.entries)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(names_below(tmp_path, [])) == expected


def test_labels_are_the_positions_of_the_first_folder_among_the_classes(tmp_path: Path) -> None:
    for name in ("ape/1.png", "bee/x/2.png", "cat/3.png", "4.png"):
        write(tmp_path / name, noise(0))
    expected = {"4.png": -1, "ape/1.png": 1, "bee/x/2.png": 0, "cat/3.png": -1}
    assert names_below(tmp_path, ["bee", "ape"]) == expected


def test_links_to_folders_and_files_are_followed_and_links_back_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.png", noise(1))
    write(tmp_path / "root" / "ape" / "2.png", noise(2))
    write(tmp_path / "root" / "cat" / "3.png", noise(3))
    (tmp_path / "root" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "bat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "ape" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root" / "ape" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "root" / "bee")
    folder = opened(ImageFolder(str(tmp_path / "root"), query_fraction=0.2))
    assert folder.classes == ["ape", "bat", "bee", "cat"]
    found = content(folder.train) + content(folder.query)
    labels = {1: (0, 1, 2), 2: (0,), 3: (3,)}
    assert sorted(found) == sorted((noise(i).tobytes(), n) for i in labels for n in labels[i])


def test_folders_named_like_images_are_no_images(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(0))
    (tmp_path / "b.png").mkdir()
    write(tmp_path / "b.png" / "c.png", noise(1))
    assert names_below(tmp_path, []) == {"a.png": -1, "b.png/c.png": -1}


def test_paths_are_kept_in_one_array_of_bytes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 20})
    train = opened(ImageFolder(str(tmp_path))).train
    assert isinstance(train, StoredSamples)
    assert isinstance(train.reader, FileReader)
    assert train.reader.names.dtype.kind == "S"
    kept = [v for v in vars(train.reader).values() if isinstance(v, (list, tuple, dict, set))]
    assert not kept


def reader_of(*paths: Path) -> FileReader:
    return FileReader(np.array([os.fsencode(path) for path in paths]), channels=3)


def test_an_extension_that_lies_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "jpeg"))
    (tmp_path / "a.jpg").write_bytes(encoded(noise(0), "png"))
    reader = reader_of(tmp_path / "a.png", tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(encoded(noise(0), "jpeg"))
    expected = reader_of(tmp_path / "b.jpg").open(0).pixels()
    assert np.array_equal(reader.open(0).pixels(), expected)
    assert np.array_equal(reader.open(1).pixels(), noise(0))


def test_a_file_that_cannot_be_read_is_unreadable_with_its_path_and_the_system_s_reason(
    tmp_path: Path,
) -> None:
    write(tmp_path / "ape" / "gone.png", noise(1))
    write(tmp_path / "ape" / "swapped.png", noise(2))
    (tmp_path / "ape" / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ape" / "loop.png").symlink_to(tmp_path / "ape" / "loop.png")
    names, _ = list_files(str(tmp_path), ["ape"], EXTENSIONS)
    (tmp_path / "ape" / "gone.png").unlink()
    (tmp_path / "ape" / "swapped.png").unlink()
    (tmp_path / "ape" / "swapped.png").mkdir()
    reader = FileReader(names, channels=3)
    reasons = {
        "dangling.png": "No such file or directory",
        "gone.png": "No such file or directory",
        "loop.png": "Too many levels of symbolic links",
        "swapped.png": "Is a directory",
    }
    assert [reader.name(i) for i in range(4)] == [str(tmp_path / "ape" / n) for n in reasons]
    for i, reason in enumerate(reasons.values()):
        for read in (reader.open, reader.encoded):
            with pytest.raises(UnreadableSample, match=reason):
                read(i)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(1))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UnreadableSample, match="Permission denied"):
        reader_of(tmp_path / "a.png").open(0)


def test_a_reader_travels_to_a_worker(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(1))
    reader = FileReader(np.array([os.fsencode(tmp_path / "a.png")]), channels=1, max_pixels=48)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.name(0) == str(tmp_path / "a.png")
    assert np.array_equal(copy.open(0).pixels(), reader.open(0).pixels())
    assert (copy.channels, copy.max_pixels) == (1, 48)


def test_max_pixels_and_grey_reach_the_images_of_all_splits(tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 10})
    folder = opened(ImageFolder(str(tmp_path), grey=True, max_pixels=47))
    for images in (folder.train, folder.bank, folder.query):
        with pytest.raises(UnreadableSample, match="8 x 6 pixels are more than `max_pixels` 47"):
            images.open(0)
    folder = opened(ImageFolder(str(tmp_path), grey=True, max_pixels=48))
    assert folder.query.open(0).pixels().shape == (6, 8, 1)
