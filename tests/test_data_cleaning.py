"""Sets without their faults: what is in them, what says so, and what a kill leaves."""

import errno
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import contents_of, flip_byte, image_folder, packed, picture, started
from pictures import encoded
from PIL import Image

from simclr_pl.data.cleaning import Cleaned, _link, check_place, clean
from simclr_pl.data.decode import MAX_PIXELS
from simclr_pl.data.folders import FileReader, ImageFolder
from simclr_pl.data.inspection import Report, examine
from simclr_pl.data.pack import pack_source
from simclr_pl.data.shards import Shards, load_index
from simclr_pl.data.sources import EncodedReader, Source, StoredSamples
from simclr_pl.errors import InputError


def faulty_folder(root: Path) -> Path:
    """Eight training and two query images, and one fault of each kind."""
    image_folder(root, 8)
    train = root / "train"
    (train / "bees/bad.jpg").write_bytes(b"bad")
    shutil.copy(train / "ants/001.jpg", train / "ants/twin.jpg")
    shutil.copy(train / "bees/002.jpg", train / "ants/odd.jpg")
    shutil.copy(root / "test/ants/001.jpg", train / "ants/leak.jpg")
    return root


FAULTS = {
    ("leak", "train/ants/leak.jpg", "test/ants/001.jpg"),
    ("conflict", "train/ants/odd.jpg", None),
    ("duplicate", "train/ants/twin.jpg", "train/ants/001.jpg"),
    ("conflict", "train/bees/002.jpg", None),
    ("unreadable", "train/bees/bad.jpg", None),
}


def cleaned(source: Source, out: Path, report: Report | None = None, **arguments: Any) -> Cleaned:
    check_place(source, str(out))
    report = report or examine(source, workers=0)
    return clean(source, report, str(out), arguments, MAX_PIXELS, workers=0)


def opened(source: Source) -> Source:
    source.open()
    return source


# Folders.


def test_a_folder_keeps_what_is_usable_once_as_hard_links(tmp_path: Path) -> None:
    root, out = faulty_folder(tmp_path / "source"), tmp_path / "out"
    before = contents_of(root)
    done = cleaned(ImageFolder(str(root)), out)
    left_out = {path for _, path, _ in FAULTS}
    stays = {path: data for path, data in before.items() if path not in left_out}
    assert {(item.kind, item.path, item.kept) for item in done.left_out.values()} == FAULTS
    assert {path: data for path, data in contents_of(out).items() if path != "cleaning.json"} == (
        stays
    )
    assert all((out / path).samefile(root / path) for path in stays)
    assert done.written == {"hard links": (len(stays), sum(map(len, stays.values())))}
    assert done.images == {"train": (12, 7), "query": (2, 2)}
    assert contents_of(root) == before
    assert examine(ImageFolder(str(out)), workers=0).findings == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_record_names_every_image_that_is_left_out(tmp_path: Path) -> None:
    root, out = faulty_folder(tmp_path / "source"), tmp_path / "out"
    cleaned(ImageFolder(str(root)), out, src="source", tiny=7)
    record = json.loads((out / "cleaning.json").read_text())
    assert record["arguments"] == {"src": "source", "tiny": 7}
    assert record["counts"] == {"leak": 1, "conflict": 2, "duplicate": 1, "unreadable": 1}
    assert record["images"]["train"] == {"before": 12, "after": 7}
    assert record["written"]["hard links"]["files"] == 9
    rows = {(row["kind"], row["path"], row["kept"]) for row in record["left_out"]}
    assert rows == FAULTS
    assert {row["split"] for row in record["left_out"]} == {"train"}
    assert all(row["reason"] for row in record["left_out"])


def test_a_class_that_loses_its_images_keeps_its_number(tmp_path: Path) -> None:
    root, out = image_folder(tmp_path / "source", 8), tmp_path / "out"
    for file in (root / "train/ants").iterdir():
        file.write_bytes(b"")
    cleaned(ImageFolder(str(root)), out)
    source = opened(ImageFolder(str(out)))
    assert source.classes == ["ants", "bees"]
    assert set(source.train.labels) == {1}


def test_a_folder_without_a_split_is_one_set(tmp_path: Path) -> None:
    root, out = tmp_path / "source", tmp_path / "out"
    for i in range(12):
        file = root / "abc"[i % 3] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i // 2)).save(file)  # in pairs, each of two classes
    for i in (0, 1):
        Image.fromarray(picture(50)).save(root / f"c/same {i}.png")
    for i in range(3):
        Image.fromarray(picture(60 + i)).save(root / f"a/own {i}.png")
    done = cleaned(ImageFolder(str(root)), out)
    assert done.images == {"all": (17, 4)}
    names = sorted(Path(path).name for path in contents_of(out))
    assert names == ["cleaning.json", "own 0.png", "own 1.png", "own 2.png", "same 0.png"]
    assert examine(ImageFolder(str(out)), workers=0).findings == []


def test_links_to_files_and_folders_become_links_to_the_images(tmp_path: Path) -> None:
    root, out = image_folder(tmp_path / "source", 8), tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    (root / "train/bees").rename(elsewhere)
    (root / "train/bees").symlink_to("../../elsewhere")
    (root / "train/ants/001.jpg").rename(tmp_path / "one.jpg")
    (root / "train/ants/001.jpg").symlink_to("../../../one.jpg")
    cleaned(ImageFolder(str(root)), out)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "train/ants/001.jpg").samefile(tmp_path / "one.jpg")
    assert (out / "train/bees/002.jpg").samefile(elsewhere / "002.jpg")


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("temporary files lie in shared memory")
        yield Path(folder)


def test_on_another_file_system_files_are_copied(tmp_path: Path, other_file_system: Path) -> None:
    root, out = faulty_folder(tmp_path / "source"), other_file_system / "out"
    done = cleaned(ImageFolder(str(root)), out)
    count, size = done.written["copies"]
    kept = [path for path in contents_of(out) if path != "cleaning.json"]
    assert (count, size) == (len(kept), sum((out / path).stat().st_size for path in kept))
    assert all((out / path).read_bytes() == (root / path).read_bytes() for path in kept)


def test_names_that_collide_never_write_into_the_source(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jpg", tmp_path / "two.jpg"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    os.link(one, tmp_path / "out.jpg")  # as on a file system for which both have this name
    with pytest.raises(FileExistsError):
        _link(str(two), tmp_path / "out.jpg")
    assert one.read_bytes() == b"one"


# Packed sets.


def rows_of(images: Any) -> dict[str, tuple[bytes, int]]:
    """Bytes and label of each image, by its path."""
    reader = images.reader
    return {
        reader.path(images.number(i)): (images.encoded(i), int(images.labels[i]))
        for i in range(len(images))
    }


def test_a_pack_keeps_the_bytes_and_loses_the_faults(tmp_path: Path) -> None:
    root, out = faulty_folder(tmp_path / "source"), tmp_path / "out"
    packed(root, tmp_path / "packed", short_side=20, quality=70)
    shards = opened(Shards(str(tmp_path / "packed")))
    before = contents_of(tmp_path / "packed")
    expected = rows_of(shards.train)
    damaged = next(path for path in expected if path.endswith("ants/003.png"))
    position = list(expected).index(damaged)
    file = tmp_path / "packed" / shards.train.name(position).split("(")[1].split(",")[0]
    flip_byte(file, expected[damaged][0])
    source = Shards(str(tmp_path / "packed"))
    done = cleaned(source, out)
    faults = {fault for fault in FAULTS if fault[0] != "unreadable"}  # which no pack holds
    assert {(item.kind, item.path, item.kept) for item in done.left_out.values()} == faults | {
        ("damaged", damaged, None)
    }
    for _, path, _ in faults:
        del expected[path]
    del expected[damaged]
    result = opened(Shards(str(out)))
    assert rows_of(result.train) == expected
    assert rows_of(result.query) == rows_of(shards.query)
    index, first = load_index(out), load_index(tmp_path / "packed")
    assert (index["classes"], index["options"]) == (first["classes"], first["options"])
    assert index["skipped"] == []
    assert examine(Shards(str(out)), tiny=20, workers=0).findings == []
    record = json.loads((out / "cleaning.json").read_text())
    assert record["damaged_shards"] == [str(file)]
    assert record["written"]["shards"]["files"] == len(list(out.glob("*.arrow")))
    after = contents_of(tmp_path / "packed")
    assert [name for name in before if before[name] != after[name]] == [file.name]


class WithBank(Source):
    """Training images without labels, of which the bank's have one, as in STL-10."""

    def open(self) -> None:
        files = [encoded(picture(i), "PNG") for i in (0, 1, 2, 3, 3, 4)]
        everything = StoredSamples(Files(files), np.array([0, 1, 0, 1, 1, 0]))
        self.train = StoredSamples(everything.reader, np.full(6, -1))
        self.bank = everything.subset(np.array([0, 3, 4]))
        self.query = StoredSamples(Files([files[0], encoded(picture(9), "PNG")]), np.array([0, 1]))
        self.classes = ["ants", "bees"]


class Files(EncodedReader):
    def __init__(self, files: list[bytes]) -> None:
        super().__init__(3)
        self.files = files

    def name(self, i: int) -> str:
        return f"file {i}"

    def encoded(self, i: int) -> bytes:
        return self.files[i]


def test_the_bank_of_a_pack_loses_copies_too(tmp_path: Path) -> None:
    pack_source(WithBank(), tmp_path / "packed", workers=0)
    done = cleaned(Shards(str(tmp_path / "packed")), tmp_path / "out")
    assert done.images == {"train": (6, 4), "query": (2, 2), "bank": (3, 1)}
    result = opened(Shards(str(tmp_path / "out")))
    assert list(rows_of(result.train)) == ["file 1", "file 2", "file 3", "file 5"]
    assert {path: label for path, (_, label) in rows_of(result.bank).items()} == {"file 3": 1}


# What is refused, and what a kill leaves.


def test_a_place_that_is_not_new_is_refused(tmp_path: Path) -> None:
    source = ImageFolder(str(image_folder(tmp_path / "source", 4)))
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path, "which holds something. Give another"),
        (tmp_path / "file", "which is a file. Give another"),
        (tmp_path / "source/train/new", "`fix` must lie outside of the set"),
        (tmp_path / "source", "`fix` must lie outside of the set"),
    ):
        with pytest.raises(InputError, match=message):
            check_place(source, str(place))
    (tmp_path / "empty").mkdir()
    cleaned(source, tmp_path / "empty")
    assert (tmp_path / "empty/train/ants/001.jpg").is_file()


def test_other_sources_are_to_be_packed_first() -> None:
    with pytest.raises(InputError, match=r"got WithBank\. Pack it with `simclr data pack`"):
        check_place(WithBank(), "out")


def test_a_pack_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    packed(image_folder(tmp_path / "source", 16), tmp_path / "packed")
    (tmp_path / "packed/train-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"got '.*train-00001.arrow', of which the shard is miss"):
        cleaned(Shards(str(tmp_path / "packed")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "source", 8)
    for file in (root / "test").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"must keep an image; got 0 of the 2 of `query`"):
        cleaned(ImageFolder(str(root)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


class Ending(FileReader):
    """Ends the process, or fails, when the name of one image is asked for."""

    def __init__(self, names: np.ndarray, at: str, kill: bool) -> None:
        super().__init__(names, 3)
        self.at, self.kill = at, kill

    def name(self, i: int) -> str:
        name = super().name(i)
        if name.endswith(self.at):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return name


def ending(root: Path, kill: bool) -> tuple[ImageFolder, Report]:
    source = ImageFolder(str(root))
    report = examine(source, workers=0)
    source.train.reader = Ending(source.train.reader.names, "bees/004.jpg", kill)  # type: ignore[union-attr]
    return source, report


def test_a_kill_leaves_no_folder_of_the_name_and_the_next_call_completes_it(
    tmp_path: Path,
) -> None:
    root, out = faulty_folder(tmp_path / "source"), tmp_path / "out"
    source, report = ending(root, kill=True)
    process = started(clean, source, report, str(out), {}, MAX_PIXELS)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert len(contents_of(tmp_path / ".out.tmp")) > 3
    (tmp_path / ".out.tmp/train/ants/rest.jpg").write_bytes(b"of an older set")
    cleaned(ImageFolder(str(root)), out)
    cleaned(ImageFolder(str(root)), tmp_path / "again")
    assert contents_of(out) == contents_of(tmp_path / "again")
    assert not (tmp_path / ".out.tmp").exists()


def test_a_failure_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    source, report = ending(faulty_folder(tmp_path / "source"), kill=False)
    with pytest.raises(InputError, match=r"must be writable; got No space left .* Make room"):
        cleaned(source, tmp_path / "out", report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    source = ImageFolder(str(image_folder(tmp_path / "source", 4)))
    report = examine(source, workers=0)
    (tmp_path / ".out.tmp").mkdir()
    descriptor = os.open(tmp_path / ".out.tmp", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="one process at a time writes a folder"):
            cleaned(source, tmp_path / "out", report)
    finally:
        os.close(descriptor)
    assert (tmp_path / ".out.tmp").is_dir()  # the other's
