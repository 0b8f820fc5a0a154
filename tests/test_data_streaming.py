"""Packed sets in object stores: the same images as from disk, through a cache, in any process."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import contents_of, flip_byte, image_folder, packed

from simclr_pl.data.inspection import examine
from simclr_pl.data.shards import Shards
from simclr_pl.data.streaming import StreamedShards
from simclr_pl.data.sweep import sweep
from simclr_pl.errors import InputError


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same images as Arrow files and as litdata's chunks."""
    root = tmp_path_factory.mktemp("sets")
    source = image_folder(root / "source")
    (source / "train/ants/003.png").write_bytes(b"")
    for format in ("arrow", "litdata"):
        packed(source, root / format, short_side=35, format=format)
    return root / "arrow", root / "litdata"


def assert_same(arrow: Path, streamed: StreamedShards) -> None:
    shards = Shards(str(arrow))
    shards.open()
    streamed.open()
    assert streamed.classes == shards.classes
    assert streamed.channels == shards.channels
    assert streamed.bank is streamed.train
    for old, new in ((shards.train, streamed.train), (shards.query, streamed.query)):
        np.testing.assert_array_equal(old.labels, new.labels)
        order = np.random.default_rng(0).permutation(len(old)).tolist()
        for i in order:
            assert new.encoded(i) == old.encoded(i)
            assert new.reader.path(i) == old.reader.path(i)
            assert new.reader.checksum(i) == old.reader.checksum(i)
            np.testing.assert_array_equal(new.open(i).pixels(), old.open(i).pixels())


def test_a_local_folder_is_read_in_place(roots: tuple[Path, Path]) -> None:
    before = contents_of(roots[1])
    assert_same(roots[0], StreamedShards(str(roots[1])))
    assert contents_of(roots[1]) == before


def test_litdata_reads_the_chunks_too(roots: tuple[Path, Path]) -> None:
    streamed = StreamedShards(str(roots[1]))
    streamed.open()
    code = (
        "import sys, zlib, litdata\n"
        "items = litdata.StreamingDataset(sys.argv[1])\n"
        "for i in range(len(items)):\n"
        "    data, label, path, crc32 = items[i]\n"
        "    assert zlib.crc32(data) == crc32\n"
        "    print(path, label, crc32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(roots[1] / "train")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LITDATA_DISABLE_VERSION_CHECK": "1"},
    )
    reader = streamed.train.reader
    assert done.stdout.splitlines() == [
        f"{reader.path(i)} {label} {reader.checksum(i)}"
        for i, label in enumerate(streamed.train.labels)
    ]


def test_a_name_says_where_the_image_was_and_is(roots: tuple[Path, Path]) -> None:
    streamed = StreamedShards(str(roots[1]))
    streamed.open()
    assert streamed.train.name(0) == "train/ants/001.jpg (train/chunk-0-0.bin, row 0)"


# The cache.


def test_chunks_are_fetched_once_when_they_are_needed(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    streamed = StreamedShards(str(roots[1]), cache_dir=str(tmp_path / "cache"))
    streamed.open()

    def cached() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("train/*.bin")}

    assert cached() == {}
    streamed.train.encoded(0)
    (first,) = cached().items()
    assert first[0] == "chunk-0-0.bin"
    assert_same(roots[0], streamed)
    assert len(cached()) == len(list(roots[1].glob("train/*.bin")))
    assert cached()["chunk-0-0.bin"] == first[1]


def encoded(images: Any, i: int) -> bytes:
    return images.encoded(i)


def test_workers_share_the_cache(roots: tuple[Path, Path], tmp_path: Path) -> None:
    streamed = StreamedShards(str(roots[1]), cache_dir=str(tmp_path / "cache"))
    streamed.open()
    order = list(range(len(streamed.train))) * 8
    images = list(sweep(streamed.train, encoded, order, workers=3))
    shards = Shards(str(roots[0]))
    shards.open()
    assert images == [shards.train.encoded(i) for i in order]
    assert not [file for file in tmp_path.rglob("*") if file.name.split(".")[-1].isdigit()]


def test_a_pickled_reader_carries_no_images_along(roots: tuple[Path, Path]) -> None:
    streamed = StreamedShards(str(roots[1]))
    streamed.open()
    expected = [streamed.train.encoded(i) for i in range(len(streamed.train))]
    data = pickle.dumps(streamed.train)
    assert len(data) < 3_000
    again = pickle.loads(data)
    assert [again.encoded(i) for i in range(len(again))] == expected


def test_a_set_that_was_replaced_is_not_mixed_with_the_cached_one(
    roots: tuple[Path, Path], tmp_path: Path
) -> None:
    source, cache = tmp_path / "source", str(tmp_path / "cache")
    for count in (8, 12):
        image_folder(source, count)
        packed(source, tmp_path / str(count), format="litdata")
    store = tmp_path / "store"
    for count in (8, 12):
        store.unlink(missing_ok=True)
        store.symlink_to(tmp_path / str(count))
        streamed = StreamedShards(str(store), cache_dir=cache)
        streamed.open()
        assert len(streamed.train) == count
        assert all(streamed.train.encoded(i) for i in range(count))


# A store that speaks S3's protocol.


@pytest.fixture
def s3(roots: tuple[Path, Path]) -> Iterator[tuple[dict[str, Any], Counter[str]]]:
    asked: Counter[str] = Counter()

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, body: bool) -> None:
            name = self.path.split("?")[0].removeprefix("/bucket/set/")
            file = roots[1] / name
            data = file.read_bytes() if file.is_file() else b""
            status, start, stop = (200 if file.is_file() else 404), 0, len(data)
            if (given := self.headers.get("Range")) and data:
                first, last = given.removeprefix("bytes=").split("-")
                status, start, stop = 206, int(first), min(int(last or len(data)) + 1, len(data))
            self.send_response(status)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            if body:
                asked[name] += 1
                self.wfile.write(data[start:stop])

        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    options = {
        "endpoint_url": f"http://127.0.0.1:{server.server_port}",
        "aws_access_key_id": "name",
        "aws_secret_access_key": "word",
        "region_name": "us-east-1",
    }
    yield options, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_bucket_gives_the_same_images_and_is_asked_once(
    roots: tuple[Path, Path], tmp_path: Path, s3: tuple[dict[str, Any], Counter[str]]
) -> None:
    options, asked = s3
    address, cache = "s3://bucket/set", str(tmp_path / "cache")
    assert_same(roots[0], StreamedShards(address, cache, options))
    chunks = {name: count for name, count in asked.items() if name.endswith(".bin")}
    assert chunks == dict.fromkeys((f"train/{p.name}" for p in roots[1].glob("train/*.bin")), 1) | {
        f"query/{p.name}": 1 for p in roots[1].glob("query/*.bin")
    }
    asked.clear()
    assert_same(roots[0], StreamedShards(address, cache, options))
    assert dict(asked) == {"index.json": 1}


def test_an_address_without_a_set_is_one_clear_error(
    tmp_path: Path, s3: tuple[dict[str, Any], Counter[str]]
) -> None:
    streamed = StreamedShards("s3://bucket/other", str(tmp_path), s3[0])
    with pytest.raises(
        InputError, match=r"must be readable; got .* 's3://bucket/other/index.json'"
    ) as e:
        streamed.open()
    assert "\n" not in str(e.value)


# Errors.


def test_a_store_needs_a_cache() -> None:
    with pytest.raises(
        InputError, match=r"got root 's3://b/set' and no `cache_dir`. Set `data.source"
    ):
        StreamedShards("s3://b/set")


def test_the_other_format_is_one_clear_error(roots: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"got 'arrow' in .* Use `Shards`"):
        StreamedShards(str(roots[0])).open()


@pytest.mark.parametrize("key", ["fingerprint", "name"])
def test_an_index_that_leads_out_of_the_cache_writes_nothing_there(
    key: str, roots: tuple[Path, Path], tmp_path: Path
) -> None:
    root, cache = tmp_path / "set", tmp_path / "a/b/cache"
    shutil.copytree(roots[1], root)
    index = json.loads((root / "index.json").read_text())
    if key == "fingerprint":
        index[key] = "../../evil"
    else:
        index["splits"]["../../evil"] = index["splits"].pop("query")
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"must lie in its folder; got '\.\./\.\./evil"):
        StreamedShards(str(root), str(cache)).open()
    assert not list(tmp_path.rglob("evil*"))


def test_a_missing_chunk_is_one_clear_error(tmp_path: Path) -> None:
    packed(image_folder(tmp_path / "source", 8), tmp_path / "out", format="litdata")
    (tmp_path / "out/train/chunk-0-1.bin").unlink()
    with pytest.raises(InputError, match=r"train/chunk-0-1.bin', which is missing"):
        StreamedShards(str(tmp_path / "out")).open()


def test_a_flipped_byte_names_the_chunk_and_the_image(tmp_path: Path) -> None:
    root = tmp_path / "out"
    packed(image_folder(tmp_path / "source", 8), root, format="litdata")
    streamed = StreamedShards(str(root))
    streamed.open()
    name, data = streamed.train.name(5), streamed.train.encoded(5)
    flip_byte(root / name.split("(")[1].split(",")[0], data)
    found = examine(StreamedShards(str(root)), workers=0)
    assert [f.kind for f in found.findings[:2]] == ["damaged", "damaged"]
    assert found.findings[1].path == name


def test_only_the_index_is_left_beside_the_chunks(roots: tuple[Path, Path]) -> None:
    files = {name.split("/")[-1] for name in contents_of(roots[1])}
    assert {f for f in files if not f.startswith("chunk-")} == {"index.json", "labels.npy"}
    assert not any(f.startswith(".") for f in files)
    index = json.loads((roots[1] / "index.json").read_text())
    assert index["skipped"] == [
        {"split": "train", "path": "train/ants/003.png", "reason": "the file is empty"}
    ]


def test_without_litdata_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)  # as the import system notes a missing module
    with pytest.raises(InputError, match=r"Run: pip install 'simclr_pl\[streaming\]'"):
        StreamedShards("s3://b/set", "cache")
    with pytest.raises(InputError, match=r"Run: pip install 'simclr_pl\[streaming\]'"):
        packed(image_folder(tmp_path / "source", 4), tmp_path / "out", format="litdata")
