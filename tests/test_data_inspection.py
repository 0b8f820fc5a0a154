"""What check finds in sets whose faults are known: these, and nothing else."""

import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import flip_byte, image_folder, packed, picture
from PIL import Image

from simclr_pl.data import DatasetSource, Digits
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.inspection import Finding, Report, examine
from simclr_pl.data.shards import Shards
from simclr_pl.data.sources import ResidentImages, Source


def png_head(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("faulty"), 12)
    train = root / "train/bees"
    (train / "empty.jpg").write_bytes(b"")
    jpeg = next(train.glob("*.jpg")).read_bytes()
    (train / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = next(train.glob("*.png")).read_bytes()
    (train / "truncated.png").write_bytes(png[: len(png) // 2])
    (train / "text.jpg").write_bytes(b"<html>not found</html>")
    (train / "bomb.png").write_bytes(png_head(60_000, 60_000))
    shutil.copy(train / "000.png", train / "copy.png")
    shutil.copy(train / "002.jpg", root / "train/ants/copy.jpg")
    shutil.copy(train / "004.jpg", root / "test/bees/leaked.jpg")
    colour = Image.fromarray(picture(77))
    colour.resize((40, 31)).save(train / "small.png")
    colour.convert("L").save(train / "grey.png")
    colour.convert("L").save(train / "grey.jpg")
    colour.convert("CMYK").save(train / "cmyk.jpg")
    colour.convert("RGBA").save(train / "alpha.png")
    colour.quantize(16).save(train / "palette.png")
    frames = [Image.fromarray(picture(seed)) for seed in (78, 79, 80)]
    frames[0].save(train / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    return root


@pytest.fixture(scope="module")
def report(faulty: Path) -> Report:
    return examine(ImageFolder(str(faulty)), workers=1)


def test_every_fault_is_found_with_its_path_and_nothing_else(report: Report, faulty: Path) -> None:
    found = {(f.kind, os.path.relpath(f.path, faulty)) for f in report.findings}
    assert found == {
        ("empty", "train/bees/empty.jpg"),
        ("truncated", "train/bees/truncated.jpg"),
        ("truncated", "train/bees/truncated.png"),
        ("unreadable", "train/bees/text.jpg"),
        ("too large", "train/bees/bomb.png"),
        ("duplicate", "train/bees/copy.png"),
        ("duplicate", "train/bees/002.jpg"),
        ("duplicate", "test/bees/leaked.jpg"),
        ("tiny", "train/bees/small.png"),
        ("channels", "train/bees/grey.png"),
        ("channels", "train/bees/grey.jpg"),
        ("channels", "train/bees/cmyk.jpg"),
        ("channels", "train/bees/alpha.png"),
        ("animated", "train/bees/animated.webp"),
    }
    assert len(report.findings) == len(found)
    assert not report.usable


def test_details_say_what_was_found(report: Report, faulty: Path) -> None:
    details = {os.path.relpath(f.path, faulty): f.detail for f in report.findings}
    assert (
        details["train/bees/bomb.png"]
        == "60000 x 60000 pixels are more than `max_pixels` 100,000,000"
    )
    assert details["train/bees/small.png"] == "40 x 31 pixels; 31 < 32"
    assert details["train/bees/animated.webp"] == "3 frames, of which the first is used"
    assert details["train/bees/cmyk.jpg"] == "CMYK in a set of RGB images"
    assert details["train/bees/copy.png"] == f"the same bytes as {faulty}/train/bees/000.png"
    conflict = f"the same bytes as {faulty}/train/ants/copy.jpg, of another class"
    assert details["train/bees/002.jpg"] == conflict
    assert (
        details["test/bees/leaked.jpg"]
        == f"the same bytes as {faulty}/train/bees/004.jpg, in train"
    )


def test_classes_are_counted(report: Report) -> None:
    assert report.images == {"train": 26, "query": 4}
    assert report.classes == {"train": {"ants": 7, "bees": 19}, "query": {"ants": 1, "bees": 3}}


def test_limits_are_configurable(faulty: Path) -> None:
    found = examine(ImageFolder(str(faulty)), tiny=45, max_pixels=1500, workers=0).findings
    kinds = Counter(f.kind for f in found)
    assert kinds == {"too large": 26, "empty": 1, "unreadable": 1, "truncated": 1, "tiny": 1}
    assert [f.path for f in found if f.kind == "tiny"] == [str(faulty / "train/bees/small.png")]


@pytest.mark.parametrize("workers", [0, 3])
def test_the_report_does_not_depend_on_the_workers(
    report: Report, faulty: Path, workers: int
) -> None:
    assert examine(ImageFolder(str(faulty)), workers=workers) == report


def test_a_clean_set_is_usable_and_a_doubtful_one_too(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 8)
    assert examine(ImageFolder(str(source)), workers=0).findings == []
    shutil.copy(source / "train/ants/001.jpg", source / "train/ants/002.jpg")
    doubtful = examine(ImageFolder(str(source)), workers=0)
    assert [f.kind for f in doubtful.findings] == ["duplicate"]
    assert doubtful.usable


def test_colours_in_a_grey_set_are_named(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 4, channels=1)
    Image.fromarray(picture(5)).save(source / "train/ants/001.jpg")
    found = examine(ImageFolder(str(source), grey=True), workers=0).findings
    path = str(source / "train/ants/001.jpg")
    assert found == [Finding("channels", "train", path, "RGB in a set of grey images", 0)]


def test_images_without_files_are_checked(tmp_path: Path) -> None:
    assert examine(Digits(), workers=0).findings == []
    items = [picture(i % 9) for i in range(20)]
    found = examine(DatasetSource(items), workers=0).findings  # type: ignore[arg-type]
    assert Counter(f.kind for f in found) == {"duplicate": 11}


class Bank(Source):
    """Training images whose labelled part is the bank."""

    def open(self) -> None:
        pixels = torch.from_numpy(np.stack([picture(i) for i in range(9)])).permute(0, 3, 1, 2)
        images = ResidentImages(pixels, np.arange(9))
        self.train, self.query = images.subset(np.arange(6)), images.subset(np.arange(6, 9))
        self.bank = images.subset(np.arange(3))


def test_a_bank_of_training_images_holds_no_duplicates() -> None:
    report = examine(Bank(), workers=0)
    assert report.images == {"train": 6, "query": 3, "bank": 3}
    assert report.findings == []


# Packed sets.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    packed(image_folder(tmp_path / "source", 16), tmp_path / "out")
    return tmp_path / "out"


def test_a_flipped_byte_names_the_shard_and_the_image(root: Path) -> None:
    shards = Shards(str(root))
    shards.open()
    name, data = shards.train.name(5), shards.train.encoded(5)
    file = name.split("(")[1].split(",")[0]
    flip_byte(root / file, data)
    found = examine(Shards(str(root)), workers=0)
    assert not found.usable
    shard, image, *rest = found.findings
    assert shard == Finding(
        "damaged",
        "",
        str(root / file),
        "the shard is not what was written: its SHA-256 differs from the index",
    )
    assert (image.kind, image.split, image.path) == ("damaged", "train", name)
    assert "CRC-32 differs" in image.detail
    assert all(f.path == name for f in rest)  # it may also be unreadable


def test_a_flipped_byte_beside_the_images_names_the_shard(root: Path) -> None:
    flip_byte(root / "train-00001.arrow", b"ARROW1")
    found = examine(Shards(str(root)), workers=0)
    assert [(f.kind, f.path) for f in found.findings] == [
        ("damaged", str(root / "train-00001.arrow"))
    ]


def test_all_missing_and_truncated_shards_are_named(root: Path) -> None:
    (root / "train-00000.arrow").unlink()
    os.truncate(root / "train-00002.arrow", 10)
    found = examine(Shards(str(root)), workers=0)
    assert [(f.path, f.kind) for f in found.findings] == [
        (str(root / "train-00000.arrow"), "damaged"),
        (str(root / "train-00002.arrow"), "damaged"),
    ]
    assert "is missing" in found.findings[0].detail
    assert "has 10 bytes for" in found.findings[1].detail


def test_an_untouched_pack_is_usable(root: Path) -> None:
    assert examine(Shards(str(root)), workers=1).findings == []
