"""Documents of files: what is usable and what is left out, by path and line."""

import csv
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_pl import InputError
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.documents import Documents
from simclr_pl.data.text import open_documents

LONG = 2**20


def opened(path: Path, column: str | None = None, label: str | None = None) -> Documents:
    return open_documents(path, column, label, LONG)


def found(documents: Documents) -> dict[str, str]:
    return {documents.name(i): documents.text(i) for i in range(len(documents))}


def test_lines_that_cannot_be_used_are_left_out_with_path_and_line(tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    lines = [b"\xef\xbb\xbffirst one\r\n", b"\n", b" \t \r\n", b"caf\xe9\n", b"a\0b\n"]
    lines += [b"x" * (10 * 2**20) + b"\n", "ünï çødé".encode() + b"\r\n", "\u3000\u00a0\n".encode()]
    lines += [b"y" * LONG + b"\n", b"z" * (LONG + 1) + b"\n", b"last without an end"]
    path.write_bytes(b"".join(lines))
    documents = opened(path)
    texts = {1: "first one", 7: "ünï çødé", 9: "y" * LONG, 11: "last without an end"}
    assert found(documents) == {f"{path}:{line}": text for line, text in texts.items()}
    assert documents.encoded(0) == b"first one"
    reasons = {int(name.rpartition(":")[2]): reason for name, reason in documents.left_out}
    too_long = "it is longer than `max_bytes` 1,048,576"
    assert reasons == {
        2: "it is empty",
        3: "it is empty",
        4: "byte 4 is not UTF-8",
        5: "byte 2 is NUL: it is no text",
        6: too_long,
        8: "it is empty",
        10: too_long,
    }
    assert all(name.startswith(f"{path}:") for name, _ in documents.left_out)


def test_rows_of_a_table_keep_their_lines_whatever_the_quotes(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    rows = [
        "id,text,kind",
        "1,plain,b",
        '2,"two\nlines, and ""quotes""",a',
        "",
        "4,too,many,fields",
    ]
    rows += [
        "5,few",
        '6,"never closed,a',
        "7,seven,",
        "8,,a",
        "9,  nine  ,10",
        f"10,{'x' * LONG}y,a",
    ]
    path.write_bytes("\r\n".join(rows).encode() + b"\n11,\xff,a\n12,twelve,b\n13,x,\xe9\n")
    documents = opened(path, label="kind")
    assert found(documents) == {
        f"{path}:2": "plain",
        f"{path}:3": 'two\nlines, and "quotes"',
        f"{path}:11": "nine",
        f"{path}:14": "twelve",
    }
    names = [list(documents.values)[k] for k in documents.classes]
    assert names == ["b", "a", "10", "b"]
    reasons = {int(name.rpartition(":")[2]): reason for name, reason in documents.left_out}
    assert reasons[5] == "it is empty"
    assert reasons[6] == "it has 4 fields, the head 3"
    assert reasons[7] == "it has 2 fields, the head 3"
    assert reasons[8]  # in csv's own words
    assert reasons[9] == "it has no label"
    assert reasons[10] == "it is empty"
    assert reasons[12] == "it is longer than `max_bytes` 1,048,576"
    assert reasons[13] == "byte 1 is not UTF-8"
    assert reasons[15] == "its label is not UTF-8"
    assert len(reasons) == 9


def test_a_long_line_within_a_table_ends_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "docs.tsv"
    path.write_text("text\tlabel\na\t1\n" + "x" * (3 * LONG) + "\t1\nb\t0\n")
    documents = opened(path, label="label")
    assert found(documents) == {f"{path}:2": "a", f"{path}:4": "b"}
    assert [name for name, _ in documents.left_out] == [f"{path}:3"]


def test_rows_of_parquet_count_from_one(tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    raw = [b"one", None, b"", b"a\0b", b"\xff\xfe", b"x" * (LONG + 1), b"seven", b" eight "]
    binary = pa.array(raw, pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(raw), binary.buffers(), binary.null_count)
    labels = pa.array([3, 1, 1, 1, 1, 1, None, 10])
    pq.write_table(pa.table({"body": texts, "stars": labels}), path)
    documents = opened(path, label="stars")
    assert found(documents) == {f"{path}:1": "one", f"{path}:8": "eight"}
    assert [list(documents.values)[k] for k in documents.classes] == ["3", "10"]
    assert dict(documents.left_out) == {
        f"{path}:2": "it is empty",
        f"{path}:3": "it is empty",
        f"{path}:4": "byte 2 is NUL: it is no text",
        f"{path}:5": "byte 1 is not UTF-8",
        f"{path}:6": "it is longer than `max_bytes` 1,048,576",
        f"{path}:7": "it has no label",
    }


def test_dictionaries_of_parquet_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), path)
    assert list(found(opened(path)).values()) == ["a", "b", "a"]


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document {i}, with «signs»" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=7)
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["text"], *([t] for t in texts)])
    for path in sorted(tmp_path.iterdir()):
        documents = pickle.loads(pickle.dumps(opened(path)))  # as another process gets it
        assert [documents.text(i) for i in range(len(documents))] == texts, path


def test_a_file_cut_after_opening_loses_its_last_documents_alone(tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    path.write_text("first\nsecond\n")
    documents = opened(path)
    path.write_text("first\n")
    assert documents.text(0) == "first"
    with pytest.raises(UnreadableSample, match="has been cut"):
        documents.text(1)


def test_what_is_no_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body\nx,y\n")
    (tmp_path / "b.txt").write_text("\n\n")
    (tmp_path / "c.parquet").write_text("nothing")
    (tmp_path / "d.csv").write_text("")
    (tmp_path / "e.json").write_text("{}")
    pq.write_table(pa.table({"text": [1, 2], "label": ["a", "b"]}), tmp_path / "f.parquet")
    cases = {
        ("a.csv", None, None): r"got 2 to choose from, among 'title', 'body'.*`data.source.column`",
        ("a.csv", "text", None): r"got 'text', where there are 'title', 'body'",
        ("a.csv", "body", "kind"): r"`label_column` must be .* got 'kind', where",
        (
            "b.txt",
            None,
            None,
        ): r"got none in '.*b.txt' that can be used, first .*b.txt:1: it is empty",
        ("b.txt", "text", None): r"must be of a table; got a .txt file",
        ("c.parquet", None, None): r"must be a parquet file that can be read",
        ("d.csv", None, None): r"got 0 to choose from",
        ("e.json", None, None): r"which is none",
        ("f.parquet", "text", None): r"got 'text' of another type",
        ("none.txt", None, None): r"which does not exist",
    }
    for (name, column, label), message in cases.items():
        with pytest.raises(InputError, match=message):
            opened(tmp_path / name, column, label)
