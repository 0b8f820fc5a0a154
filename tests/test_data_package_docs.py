"""The corpus of docstrings: clean, split by files, the same whenever it is made."""

import csv
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from simclr_pl import InputError
from simclr_pl.data import PackageDocs
from simclr_pl.data.package_docs import cleaned, collect

SMALL = ("sklearn.cluster", "scipy.ndimage", "torch.distributions")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    PackageDocs(str(root), SMALL, 512).prepare()
    return root


def test_code_and_names_of_packages_are_taken_out() -> None:
    docstring = """Fit the model, e.g. to data.

    See :class:`~sklearn.cluster.KMeans` and `scipy.stats.norm` of scipy.

    .. versionadded:: 1.2

    Examples
    --------
    >>> from scipy import stats
    >>> stats.norm(0.5)
    Norm(0.5)

    import numpy as np
    Values are 0.5 or more.
    """
    words = "Fit the model, e.g. to data. See KMeans and norm of . Examples Values are 0.5 or more."
    assert cleaned(docstring) == words


def test_files_are_on_one_side_and_every_class_on_both(root: Path) -> None:
    folder = root / "package-docs"
    train, test = (pq.read_table(folder / f"{n}.parquet").to_pydict() for n in ("train", "test"))
    assert not set(train["module"]) & set(test["module"])
    assert set(train["label"]) == set(test["label"]) == set(SMALL)
    texts = train["text"] + test["text"]
    assert len(set(texts)) == len(texts)
    assert min(len(text.split()) for text in texts) >= 25
    names = {"sklearn", "scipy", "torch", ">>>"}
    assert not any(names & set(re.findall(r">>>|\w+", text)) for text in texts)
    assert 0.1 < len(test["text"]) / len(texts) < 0.25


def test_pairs_are_graded_by_where_they_come_from(root: Path) -> None:
    folder = root / "package-docs"
    test = pq.read_table(folder / "test.parquet").to_pydict()
    place = {}
    for text, label, module in zip(test["text"], test["label"], test["module"], strict=True):
        words = text.split()
        middle = len(words) // 2
        halves = " ".join(words[:middle][:60]), " ".join(words[middle:][:60])
        for half in halves:
            place.setdefault(half, set()).add((label, module, halves))
    with open(folder / "pairs.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    assert min(Counter(pair["score"] for pair in pairs).values()) > 10
    grades = {
        "3": lambda a, b: a == b,
        "2": lambda a, b: a != b and a[1] == b[1],
        "1": lambda a, b: a[0] == b[0] and a[1] != b[1],
        "0": lambda a, b: a[0] != b[0],
    }
    for pair in pairs:
        sides = [place[pair[name]] for name in ("sentence1", "sentence2")]
        assert any(grades[pair["score"]](a, b) for a in sides[0] for b in sides[1])


def test_it_is_made_once_and_anew_for_other_packages(root: Path, tmp_path: Path) -> None:
    first = PackageDocs(str(tmp_path), SMALL, 512)
    first.prepare()
    files = sorted((root / "package-docs").iterdir())
    assert [f.name for f in files] == [
        "pairs.csv",
        "recipe.json",
        "test.parquet",
        "tokenizer.json",
        "train.parquet",
    ]
    for file in files:
        assert file.read_bytes() == (tmp_path / "package-docs" / file.name).read_bytes()
    times = [file.stat().st_mtime_ns for file in files]
    source = PackageDocs(str(root), SMALL, 512)
    source.prepare()
    assert [file.stat().st_mtime_ns for file in files] == times
    source.open()
    assert source.classes == sorted(SMALL)
    assert source.left_out == []
    PackageDocs(str(tmp_path), SMALL[:2], 512).prepare()
    labels = pq.read_table(tmp_path / "package-docs/train.parquet")["label"].to_pylist()
    assert set(labels) == set(SMALL[:2])
    tokenizer = (tmp_path / "package-docs/tokenizer.json").read_bytes()
    assert tokenizer != (root / "package-docs/tokenizer.json").read_bytes()


def test_packages_that_are_not_there_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 'nothing', which is not installed"):
        PackageDocs(str(tmp_path), ("nothing.at.all",)).prepare()
    with pytest.raises(InputError, match=r"got 'scipy.nothing', which has none here"):
        PackageDocs(str(tmp_path), ("scipy.nothing",)).prepare()
    with pytest.raises(InputError, match=r"two files or more; got 1 for 'torch.hub'"):
        collect(["torch.hub"])
