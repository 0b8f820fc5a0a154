"""Sets decoded once, and whether they fit."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import content, noise, opened, pixels_of, write, write_classes
from torch.utils.data import Dataset

from simclr_pl.data import DatasetSource, ImageFolder, resident
from simclr_pl.data.decode import EXTENSIONS, UnreadableSample
from simclr_pl.data.folders import FileReader, list_files
from simclr_pl.data.resident import decode_all, fits_in_memory, fits_on_device, free_memory
from simclr_pl.data.sources import ResidentImages, StoredSamples
from simclr_pl.errors import InputError


def folder_of(path: Path, channels: int = 3) -> StoredSamples:
    """The images below ``path``, all labelled with their position."""
    names, _ = list_files(str(path), [], EXTENSIONS)
    return StoredSamples(FileReader(names, channels), np.arange(len(names)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("grey", [False, True])
def test_a_decoded_set_equals_reading_one_by_one(grey: bool, threads: int, tmp_path: Path) -> None:
    write_classes(tmp_path, {"ape": 12, "bee": 8})
    folder = opened(ImageFolder(str(tmp_path), grey=grey))
    for images in (folder.train, folder.bank, folder.query):
        assert isinstance(images, StoredSamples)
        decoded = decode_all(images, threads)
        assert isinstance(decoded, ResidentImages)
        assert decoded.pixels.dtype == torch.uint8
        assert decoded.pixels.shape == (len(images), 1 if grey else 3, 6, 8)
        assert decoded.pixels.is_contiguous(memory_format=torch.channels_last)
        assert content(decoded) == content(images)
        assert decoded.unreadable == {}


@pytest.mark.parametrize("threads", [1, 3])
def test_more_images_than_a_block_are_decoded_and_counted(threads: int, tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", noise(i, height=6 + i, width=8 - 2 * i))
    images = folder_of(tmp_path).subset(np.arange(600) % 3)
    done: list[int] = []
    decoded = decode_all(images, threads, done.append)
    assert content(decoded) == content(images)
    assert decoded.one_size is None
    assert [p.shape for p in pixels_of(decoded)] == [p.shape for p in pixels_of(images)]
    assert sum(done) == 600
    assert len(done) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_unreadable_images_are_a_black_pixel_and_remembered_with_their_path_and_the_reason(
    threads: int, tmp_path: Path
) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.png", noise(i))
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "9.png").unlink()
    (tmp_path / "9.png").symlink_to("nowhere")
    images = folder_of(tmp_path)
    decoded = decode_all(images, threads)
    assert list(decoded.unreadable) == [0, 4, 9]
    for i, reason in ((0, "empty"), (4, "truncated"), (9, "No such file")):
        assert decoded.name(i) == str(tmp_path / f"{i}.png")
        assert decoded.sides[i].tolist() == [1, 1]
        assert decoded.flat[decoded.start[i]].tolist() == [0, 0, 0]
        with pytest.raises(UnreadableSample, match=reason):
            decoded.open(i)
    for i in (1, 2, 3, 5, 6, 7, 8):
        assert np.array_equal(decoded.open(i).pixels(), noise(i))
    assert decoded.labels.tolist() == list(range(10))


def test_a_set_without_a_readable_image_raises_input_error_with_a_path_and_a_reason(
    tmp_path: Path,
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="must hold readable images; got none") as caught:
        decode_all(folder_of(tmp_path), 2)
    assert f"{str(tmp_path / '2.png')!r}: of no known image format" in str(caught.value)


def test_only_sets_that_take_a_quarter_of_the_free_memory_at_most_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.png", noise(i))
    images = folder_of(tmp_path)
    need = 10 * 6 * 8 * 3
    for sharers in (1, 4):  # ranks, each with a copy
        monkeypatch.setattr(resident, "free_memory", lambda s=sharers: 4 * need * s)
        assert fits_in_memory(images, 3, sharers)
        monkeypatch.setattr(resident, "free_memory", lambda s=sharers: 4 * need * s - 1)
        assert not fits_in_memory(images, 3, sharers)


def test_sets_of_mixed_sizes_fit_up_to_a_bound_by_the_mean_of_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.png", noise(i, height=10 - 8 * (i % 2)))
    images = folder_of(tmp_path)
    need = 10 * 6 * 8 * 3
    monkeypatch.setattr(resident, "free_memory", lambda: 4 * need)
    assert fits_in_memory(images, 3, 1)
    assert not fits_in_memory(images, 3, 2)
    monkeypatch.setattr(resident, "free_memory", lambda: 2**50)
    for bound, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(resident, "_MOST_MIXED", bound)
        assert fits_in_memory(images, 3, 1) is fits
    assert fits_in_memory(images.subset(np.zeros(10, int)), 3, 1)  # of one size: 2,400 bytes


def test_unreadable_images_do_not_keep_a_set_from_fitting_unless_all_are(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / f"{i}.png", noise(i))
    (tmp_path / "0.png").write_bytes(b"")
    assert fits_in_memory(folder_of(tmp_path), 3, 1)
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(b"")
    assert not fits_in_memory(folder_of(tmp_path), 3, 1)


def test_whether_a_set_fits_is_told_from_a_few_heads(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(0))
    opened_numbers: list[int] = []

    class Counting(FileReader):
        def open(self, i: int):  # type: ignore[no-untyped-def]
            opened_numbers.append(i)
            return super().open(0)

    names = np.array([os.fsencode(tmp_path / "a.png")])
    assert fits_in_memory(StoredSamples(Counting(names, 3), np.zeros(10_000)), 3, 1)
    assert len(opened_numbers) <= 16
    assert {0, 9_999} <= set(opened_numbers)


def test_free_memory_is_that_of_this_machine() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.001 * physical < free_memory() <= physical


def test_a_set_fits_on_the_cpu_for_it_is_there_already() -> None:
    images = ResidentImages(torch.zeros(2, 3, 6, 8, dtype=torch.uint8), np.zeros(2, np.int64))
    assert fits_on_device(images, torch.device("cpu"))


class OneAtATime(Dataset):
    """A set whose items share something, e.g. an open file: two threads in it are one too many."""

    def __init__(self) -> None:
        self.inside = threading.Lock()

    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> np.ndarray:
        assert self.inside.acquire(blocking=False)
        time.sleep(0.0001)
        self.inside.release()
        return noise(i)


def test_a_user_s_data_set_is_read_by_one_thread() -> None:
    source = opened(DatasetSource(OneAtATime()))
    assert isinstance(source.train, StoredSamples)
    assert decode_all(source.train, 4).unreadable == {}
