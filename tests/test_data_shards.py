"""Packed sets: what comes out is what went in, lazily, in any process, or one clear error."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import flip_byte, image_folder, packed
from torch.utils.data import DataLoader, Dataset

from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.pack import pack_source
from simclr_pl.data.shards import ShardReader, Shards
from simclr_pl.data.sources import StoredSamples
from simclr_pl.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def root(source: Path, tmp_path: Path) -> Path:
    packed(source, tmp_path / "packed", short_side=None)
    return tmp_path / "packed"


def opened(root: Path) -> Shards:
    shards = Shards(str(root))
    shards.open()
    return shards


def test_images_labels_paths_and_classes_come_back(source: Path, root: Path) -> None:
    folder, shards = ImageFolder(str(source)), opened(root)
    folder.open()
    assert len(list(root.glob("train-*.arrow"))) > 2
    assert shards.classes == folder.classes == ["ants", "bees"]
    assert shards.channels == 3
    assert shards.bank is shards.train
    for old, new in ((folder.train, shards.train), (folder.query, shards.query)):
        assert isinstance(old, StoredSamples)
        assert isinstance(new, StoredSamples)
        np.testing.assert_array_equal(old.labels, new.labels)
        assert new.labels.dtype == np.int64
        for i in range(len(old)):
            assert new.encoded(i) == old.encoded(i)
            assert str(source / new.reader.path(i)) == old.name(i)
            np.testing.assert_array_equal(new.open(i).pixels(), old.open(i).pixels())


def test_channels_are_known_before_the_set_is_opened(source: Path, tmp_path: Path) -> None:
    pack_source(ImageFolder(str(source), grey=True), tmp_path / "grey", workers=0)
    assert Shards(str(tmp_path / "grey")).channels == 1


def test_a_name_says_where_the_image_was_and_is(root: Path) -> None:
    train = opened(root).train
    assert train.name(0) == "train/ants/001.jpg (train-00000.arrow, row 0)"
    last = train.name(len(train) - 1)
    number = len(list(root.glob("train-*.arrow"))) - 1
    assert last.startswith(f"train/bees/022.jpg (train-{number:05d}.arrow, row ")


def test_a_subset_keeps_its_images(root: Path) -> None:
    train = opened(root).train
    some = train.subset(np.array([20, 3, 11]))
    assert [some.encoded(k) for k in range(3)] == [train.encoded(i) for i in (20, 3, 11)]
    assert some.name(0) == train.name(20)


class Encoded(Dataset[bytes]):
    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> bytes:
        return self.images.encoded(i)


def first(batch: list[bytes]) -> bytes:
    return batch[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_bytes(root: Path, context: str) -> None:
    train = opened(root).train
    expected = [train.encoded(i) for i in range(len(train))]  # maps are open when workers start
    loader = DataLoader(
        Encoded(train), 1, num_workers=1, multiprocessing_context=context, collate_fn=first
    )
    assert list(loader) == expected


def test_pickling_carries_no_images_along(root: Path) -> None:
    train = opened(root).train
    for i in range(len(train)):
        train.encoded(i)
    stored = sum(file.stat().st_size for file in root.glob("*.arrow"))
    data = pickle.dumps(train)
    assert len(data) < 3_000 < stored
    assert pickle.loads(data).encoded(5) == train.encoded(5)


def test_shards_are_opened_when_needed_and_hold_no_file_open(root: Path) -> None:
    files = sorted(p.name for p in root.glob("train-*.arrow"))
    counts = [s["count"] for s in json.loads((root / "index.json").read_text())["splits"]["train"]]
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(str(root), files, counts, 3)
    reader.encoded(0)
    assert str(root / files[0]) in Path("/proc/self/maps").read_text()
    assert str(root / files[1]) not in Path("/proc/self/maps").read_text()
    assert len(reader.labels()) == sum(counts)
    assert len(os.listdir("/proc/self/fd")) == before  # thousands of shards fit any limit


def test_the_images_are_a_slice_of_the_file(root: Path) -> None:
    train = opened(root).train
    file = (root / "train-00000.arrow").read_bytes()
    assert train.encoded(0) in file
    assert train.encoded(1) in file


def test_importing_the_sources_imports_no_arrow() -> None:
    code = "import sys, simclr_pl.data.shards, simclr_pl.data.streaming; print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Errors.


def remove(root: Path) -> None:
    (root / "train-00001.arrow").unlink()


def truncate(root: Path) -> None:
    os.truncate(root / "train-00001.arrow", 700)


def lose_the_index(root: Path) -> None:
    (root / "index.json").unlink()


def write_a_foreign_index(root: Path) -> None:
    (root / "index.json").write_text("[]")


def change(**values: Any) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        index = json.loads((root / "index.json").read_text())
        (root / "index.json").write_text(json.dumps({**index, **values}))

    return harm


def break_the_footer(root: Path) -> None:
    file = root / "train-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:-6] + b"NOPE!!")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove, r"train-00001.arrow', which is missing. Copy it again, or delete it"),
        (truncate, r"train-00001.arrow', which has 700 bytes for [\d,]+"),
        (break_the_footer, r"must be an Arrow file of \d+ images; got .*train-00001.arrow'"),
        (lose_the_index, r"which has no index.json of a finished pack. Make one with"),
        (write_a_foreign_index, r"which has no index.json of a finished pack"),
        (change(simclr_pl=99), r"must have format 1; got 99"),
        (change(format="litdata"), r"got 'litdata' in .* Use `StreamedShards`"),
    ],
)
def test_damage_is_one_clear_error_on_opening(
    root: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(root)
    with pytest.raises(InputError, match=message) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere', which does not exist"):
        opened(tmp_path / "nowhere")


def test_damaged_offsets_do_not_crash_the_process(root: Path) -> None:
    shards = opened(root)
    count = json.loads((root / "index.json").read_text())["splits"]["train"][0]["count"]
    ends = np.cumsum([0, *(len(shards.train.encoded(i)) for i in range(count))]).astype(np.int64)
    flip_byte(root / "train-00000.arrow", ends.tobytes())
    train = opened(root).train
    assert all(isinstance(train.encoded(i), bytes) for i in range(len(train)))
