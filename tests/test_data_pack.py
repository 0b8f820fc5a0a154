"""Packing: the right bytes, the same bytes, whatever happens on the way."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from packing import contents_of, image_folder, packed, picture, started
from PIL import Image

from simclr_pl.crop_kernels import resize
from simclr_pl.data import DatasetSource, Digits
from simclr_pl.data.decode import open_picture
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.pack import pack_source
from simclr_pl.data.shards import Shards
from simclr_pl.data.sources import ResidentImages, Source
from simclr_pl.errors import InputError


def opened(root: Path) -> Shards:
    shards = Shards(str(root))
    shards.open()
    return shards


# The bytes.


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (600, 451, (341, 256)),
        (451, 600, (256, 341)),
        (257, 257, (256, 256)),
        (300, 3000, (256, 2560)),
    ],
)
def test_the_short_side_is_exact(
    tmp_path: Path, height: int, width: int, expected: tuple[int, int]
) -> None:
    source = image_folder(tmp_path / "source", 4, height=height, width=width)
    packed(source, tmp_path / "out", short_side=256)
    train = opened(tmp_path / "out").train
    for i in range(4):
        data = train.encoded(i)
        assert simplejpeg.is_jpeg(data)
        assert simplejpeg.decode_jpeg(data).shape == (*expected, 3)


def test_what_is_small_enough_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 4, height=40, width=90)
    packed(source, tmp_path / "out", short_side=40)
    train = opened(tmp_path / "out").train
    for i in range(4):
        assert train.encoded(i) == (source / train.reader.path(i)).read_bytes()


@pytest.mark.parametrize("channels", [3, 1])
def test_shrunk_images_are_near_their_pixels(tmp_path: Path, channels: int) -> None:
    source = image_folder(tmp_path / "source", 4, height=301, width=400, channels=channels)
    sizes, errors = [], []
    for quality in (50, 90, 98):
        out = tmp_path / str(quality)
        pack_source(
            ImageFolder(str(source), grey=channels == 1), out, 100, quality=quality, workers=0
        )
        train = opened(out).train
        sizes.append(len(train.encoded(1)))
        original = open_picture((source / train.reader.path(1)).read_bytes(), channels).pixels()
        exact = resize(original, 100, 133).astype(float)
        pixels = train.open(1).pixels()
        assert pixels.shape == (100, 133, channels)
        errors.append(10 * np.log10(255**2 / np.mean((exact - pixels) ** 2)))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors)
    assert errors[1] > 35  # dB, at the default quality


def test_orientation_is_honoured(tmp_path: Path) -> None:
    pixels = picture(0, 60, 120)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, quality=98)
    packed(tmp_path, tmp_path.parent / "out", short_side=30)
    image = opened(tmp_path.parent / "out").train.open(0)
    assert (image.height, image.width) == (60, 30)
    upright, upside_down = (
        resize(np.ascontiguousarray(np.rot90(pixels, k)), 60, 30).astype(int) for k in (-1, 1)
    )
    assert np.abs(upright - image.pixels()).mean() < 5
    assert np.abs(upside_down - image.pixels()).mean() > 40


class Arrays(Source):
    """Images without files, of one size in memory or of any size."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def open(self) -> None:
        def images(seed: int) -> ResidentImages:
            pixels = np.stack([picture(seed + i, 33, 37, self.channels) for i in range(5)])
            tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            return ResidentImages(tensor, np.arange(5) - 1)

        self.train, self.bank, self.query = images(0), images(10), images(20)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_without_files_are_kept_without_loss(tmp_path: Path, channels: int) -> None:
    source = Arrays(channels)
    index = pack_source(source, tmp_path / "out", workers=0)
    assert list(index["splits"]) == ["train", "query", "bank"]
    shards = opened(tmp_path / "out")
    assert shards.channels == channels
    for split in ("train", "bank", "query"):
        old, new = getattr(source, split), getattr(shards, split)
        np.testing.assert_array_equal(new.labels, [-1, 0, 1, 2, 3])
        for i in range(5):
            assert new.encoded(i)[:4] == b"\x89PNG"
            np.testing.assert_array_equal(new.open(i).pixels(), old.open(i).pixels())
    assert shards.train.reader.path(2) == "image 2"


def test_the_embedded_digits_survive(tmp_path: Path) -> None:
    source = Digits()
    pack_source(source, tmp_path / "out", workers=1)
    shards = opened(tmp_path / "out")
    np.testing.assert_array_equal(shards.query.labels, source.query.labels)
    for i in range(0, 450, 50):
        np.testing.assert_array_equal(shards.query.open(i).pixels(), source.query.open(i).pixels())


def test_a_users_dataset_is_kept_without_loss_or_shrunk(tmp_path: Path) -> None:
    items = [(Image.fromarray(picture(i, 30 + i, 45)), i % 3) for i in range(20)]
    source = DatasetSource(items, labels=[label for _, label in items])  # type: ignore[arg-type]
    pack_source(source, tmp_path / "out", short_side=40, workers=0)
    train = opened(tmp_path / "out").train
    for i in range(len(train)):
        before, after = source.train.open(i).pixels(), train.open(i).pixels()
        assert min(after.shape[:2]) == min(40, min(before.shape[:2]))
        if min(before.shape[:2]) <= 40:
            np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(train.labels, source.train.labels)


def test_a_wrong_item_of_a_users_dataset_is_one_line_with_workers(tmp_path: Path) -> None:
    source = DatasetSource([np.zeros((8, 8, 3))] * 20)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"uint8 arrays .* got ndarray of float64") as caught:
        pack_source(source, tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)


def test_a_pack_can_be_packed_again(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 6, height=80, width=100)
    packed(source, tmp_path / "large", short_side=None)
    pack_source(Shards(str(tmp_path / "large")), tmp_path / "small", 50, workers=0)
    packed(source, tmp_path / "direct", short_side=50)
    again, direct = opened(tmp_path / "small"), opened(tmp_path / "direct")
    for i in range(6):
        assert again.train.encoded(i) == direct.train.encoded(i)
        assert again.train.reader.path(i) == direct.train.reader.path(i)


def test_shards_are_as_large_as_asked(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    index = packed(source, tmp_path / "out", shard_mb=0.01)
    shards = opened(tmp_path / "out")
    sizes = [len(shards.train.encoded(i)) for i in range(len(shards.train))]
    at, parts = 0, index["splits"]["train"]
    assert len(parts) > 2
    for part in parts:
        stop = at + part["count"]
        assert sum(sizes[at:stop]) <= 10_000
        assert stop == len(sizes) or sum(sizes[at : stop + 1]) > 10_000
        at = stop


# The same bytes.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to shrink, to copy, and some that cannot be read: first, amid and last."""
    root = image_folder(tmp_path_factory.mktemp("source"), 80, height=70, width=90)
    files = sorted((root / "train").rglob("*.*"))
    files[0].write_bytes(b"")
    for file in files[20:25]:
        file.write_bytes(file.read_bytes()[:300])
    files[-1].write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    packed(source, out, short_side=64)
    return contents_of(out)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    packed(source, tmp_path / "out", short_side=64, workers=workers)
    assert contents_of(tmp_path / "out") == reference


def test_a_moved_source_gives_the_same_bytes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    packed(Path("moved"), tmp_path / "out", short_side=64)
    assert contents_of(tmp_path / "out") == reference


HALF = {
    "arrow": (".train-00077.arrow.tmp", ".index.json.tmp"),
    "litdata": ("train/..chunk-0-77.json.tmp", "train/.index.json.tmp", ".index.json.tmp"),
}


@pytest.mark.parametrize("format", ["arrow", "litdata"])
def test_a_pack_killed_at_any_moment_goes_on_to_the_same_bytes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, format: str
) -> None:
    options = {"short_side": 64, "workers": 1, "format": format}
    if format == "litdata":
        packed(source, tmp_path / "whole", **{**options, "workers": 0})
        reference = contents_of(tmp_path / "whole")
    out, pattern = tmp_path / "out", "*.arrow" if format == "arrow" else "*/chunk-*.bin"
    made: list[Path] = []
    for shards in (
        0,
        1,
        4,
        5,
        9,
        12,
    ):  # so many are there; it dies in the middle of what comes next
        process = started(packed, source, out, **options)
        while len(made) < shards or not out.exists():
            made = list(out.glob(pattern))
            assert process.exitcode is None
        time.sleep(0.003 * shards)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for name in HALF[format] if shards == 4 else ():
            (out / name).write_bytes(b"what a kill amid a write leaves behind")
    assert not (out / "index.json").exists()
    survivors = {file: file.stat().st_mtime_ns for file in made}
    index = packed(source, out, **options)
    assert len(index["skipped"]) == 7
    assert contents_of(out) == reference
    assert all(
        file.stat().st_mtime_ns == then for file, then in survivors.items()
    )  # not made again


def lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("delay", [0, 0.001, 0.01, 0.1])
def test_the_workers_of_a_killed_pack_die_soon(source: Path, tmp_path: Path, delay: float) -> None:
    process = started(packed, source, tmp_path / "out", short_side=64, workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (workers := children.read_text().split()):
        assert process.exitcode is None
    time.sleep(delay)
    workers = children.read_text().split()
    process.kill()
    process.join()
    deadline = time.monotonic() + 5
    while any(lives(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_only_a_missing_shard_is_made_again(
    source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed(source, out, short_side=64)
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    (out / "train-00003.arrow").unlink()
    os.truncate(out / "train-00005.arrow", 500)
    packed(source, out, short_side=64)
    assert contents_of(out) == reference
    changed = {file.name for file in out.iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert changed == {"train-00003.arrow", "train-00005.arrow", "index.json"}


def test_a_finished_pack_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = packed(source, out, short_side=64)
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert packed(source, out, short_side=64) == first
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times


def test_two_packs_into_one_folder_are_an_error(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(packed, source, out, shard_mb=0.0001)
    while not list(out.glob("*.arrow")):
        assert process.exitcode is None
    with pytest.raises(InputError, match=r"'.*out' is being packed. Wait for it"):
        packed(source, out)
    process.kill()
    process.join()


# What cannot be read.


def test_unreadable_images_are_left_out_and_recorded(source: Path, tmp_path: Path) -> None:
    index = packed(source, tmp_path / "out", short_side=64)
    assert len(index["skipped"]) == 7
    assert {item["split"] for item in index["skipped"]} == {"train"}
    assert index["skipped"][0] == {
        "split": "train",
        "path": "train/ants/001.jpg",
        "reason": "the file is empty",
    }
    assert index["skipped"][-1]["reason"] == "of no known image format"
    assert json.loads((tmp_path / "out/index.json").read_text()) == index
    train = opened(tmp_path / "out").train
    assert len(train) == sum(part["count"] for part in index["splits"]["train"]) == 73
    left_out = {item["path"] for item in index["skipped"]}
    assert not left_out & {train.reader.path(i) for i in range(73)}


def test_a_split_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 8)
    for file in (source / "test").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"got none among the 2 of `query`, e.g. 'test/ants/001.jpg'"
    ):
        packed(source, tmp_path / "out")


def test_names_in_any_bytes_are_kept_readable(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in (b"caf\xe9.png", "été.png".encode(), b"plain.png"):
        buffer = io.BytesIO()
        Image.fromarray(picture(len(name))).save(buffer, "PNG")
        with open(os.fsencode(tmp_path / "source") + b"/" + name, "wb") as file:
            file.write(buffer.getvalue())
    packed(tmp_path / "source", tmp_path / "out")
    shards = opened(tmp_path / "out")
    names = {s.reader.path(i) for s in (shards.train, shards.query) for i in range(len(s))}
    assert names == {"caf\\xe9.png", "été.png", "plain.png"}


# Errors.


@pytest.mark.parametrize(
    "changed",
    [{"short_side": 32}, {"short_side": None}, {"quality": 80}, {"shard_mb": 0.02}],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_options_need_another_folder(
    source: Path, tmp_path: Path, changed: dict[str, Any], finished: bool
) -> None:
    packed(source, tmp_path / "out", short_side=64)
    if not finished:
        (tmp_path / "out/index.json").unlink()
    before = contents_of(tmp_path / "out")
    with pytest.raises(InputError, match=r"same images, labels and options; got another in"):
        packed(source, tmp_path / "out", **{"short_side": 64, **changed})
    assert contents_of(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["more", "renamed", "other class", "other content"])
def test_another_listing_needs_another_folder(tmp_path: Path, change: str) -> None:
    source = image_folder(tmp_path / "source", 8)
    packed(source, tmp_path / "out")
    file = source / "train/ants/001.jpg"
    if change == "more":
        shutil.copy(file, source / "train/ants/999.jpg")
    elif change == "renamed":
        file.rename(source / "train/ants/0011.jpg")
    elif change == "other class":
        (source / "train/ants").rename(source / "train/wasps")
    else:
        file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(InputError, match=r"got another in '.*index.json'. Give another folder"):
        packed(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "`short_side` must be >= 1 or null; got 0"),
        ({"quality": 101}, r"`quality` must be within \[1, 100\]; got 101"),
        ({"shard_mb": 0}, r"`shard_mb` must be within \(0, 2000\]; got 0"),
        ({"workers": -1}, "`workers` must be >= 0; got -1"),
    ],
)
def test_options_out_of_range_are_errors(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        packed(tmp_path, tmp_path / "out", **options)


def test_a_folder_inside_the_source_is_an_error(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 4)
    for out in (source, source / "train/packed"):
        with pytest.raises(InputError, match=r"must lie outside the source's"):
            packed(source, out)
    assert not list(source.rglob("*.arrow"))


def test_a_folder_with_another_index_is_an_error(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.json").write_text("{}")
    with pytest.raises(InputError, match=r"with a foreign index.json. Give an empty folder"):
        packed(source, tmp_path / "out")
