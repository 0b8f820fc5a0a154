"""Tables on disk: what was written is read back, in little memory, whole or not at all."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_pl import InputError
from simclr_pl.evaluation.tables import table_writer


def blocks() -> list[dict[str, Any]]:
    """Uneven ones, with names that are awkward."""
    names = ["a", "ants/é.jpg", "two\nlines", "", "with, comma", 'a "quoted" one']
    rng = np.random.default_rng(0)
    bounds = [(0, 1), (1, 5), (5, 6)]
    return [
        {
            "features": rng.standard_normal((b - a, 3), np.float32),
            "index": np.arange(a, b),
            "path": names[a:b],
        }
        for a, b in bounds
    ]


def test_npz_holds_the_rows_of_all_blocks_without_pickles(tmp_path: Path) -> None:
    writer = table_writer(tmp_path / "new folder" / "t.npz")
    for block in blocks():
        writer.write(block)
    assert not writer.path.exists()  # before it is whole
    writer.close()
    assert writer.rows == 6
    assert [p.name for p in writer.path.parent.iterdir()] == ["t.npz"]
    with np.load(writer.path, allow_pickle=False) as table:
        assert set(table) == {"features", "index", "path"}
        for name in table:
            np.testing.assert_array_equal(
                table[name], np.concatenate([np.asarray(b[name]) for b in blocks()])
            )
        assert (table["features"].dtype, table["index"].dtype) == (np.float32, np.int64)


def test_parquet_holds_the_rows_of_all_blocks_with_vectors_of_fixed_size(tmp_path: Path) -> None:
    writer = table_writer(tmp_path / "t.parquet")
    for block in blocks():
        writer.write(block)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    table = pq.read_table(writer.path)
    assert table.schema.field("features").type == pa.list_(pa.float32(), 3)
    assert table["index"].to_pylist() == list(range(6))
    assert table["path"].to_pylist() == [name for b in blocks() for name in b["path"]]
    rows = table["features"].combine_chunks().flatten().to_numpy().reshape(6, 3)
    np.testing.assert_array_equal(rows, np.concatenate([b["features"] for b in blocks()]))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_large_table_needs_no_more_memory_than_a_block(suffix: str, tmp_path: Path) -> None:
    block = {"features": np.ones((500, 256), np.float32), "path": ["name"] * 500}
    size = block["features"].nbytes  # type: ignore[attr-defined]
    writer = table_writer(tmp_path / f"t{suffix}")
    writer.write(block)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    for _ in range(60):
        writer.write(block)
        assert pa.total_allocated_bytes() - before < 2 * size
    writer.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert writer.rows == 61 * 500
    assert peak < 12 * size  # with one copy of the file's buffer; the table is 61 of them


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_discarded_table_leaves_the_file_of_before(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_text("before")
    writer = table_writer(path)
    writer.write(blocks()[0])
    writer.discard()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "before")]


def test_a_format_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.parquet or \.npz; got '.*t\.csv'"):
        table_writer(tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []
