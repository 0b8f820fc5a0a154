"""Which images are left out, against the rule spelt out for each content."""

import numpy as np
import pytest

from simclr_pl.data.decode import Picture
from simclr_pl.data.inspection import Finding, Report
from simclr_pl.data.selection import plan
from simclr_pl.data.sources import Reader, Source, StoredSamples
from simclr_pl.data.sweep import splits_of


class Names(Reader):
    def __init__(self, split: str) -> None:
        self.split = split

    def name(self, i: int) -> str:
        return f"{self.split}/{i}"

    def open(self, i: int) -> Picture:
        raise AssertionError("the plan reads no image")


class Labelled(Source):
    """Images that have names and labels alone; of one reader, if drawn."""

    def __init__(self, labels: dict[str, np.ndarray], drawn: np.ndarray | None = None) -> None:
        self.labels, self.drawn = labels, drawn
        self.open()

    def open(self) -> None:
        if self.drawn is not None:
            images = StoredSamples(Names("all"), self.labels["all"])
            self.train = self.bank = images.subset(np.flatnonzero(~self.drawn))
            self.query = images.subset(np.flatnonzero(self.drawn))
            return
        sets = {name: StoredSamples(Names(name), table) for name, table in self.labels.items()}
        self.train, self.query = sets["train"], sets["query"]
        self.bank = sets.get("bank", self.train)


def report_of(source: Source, content: dict[str, np.ndarray]) -> Report:
    """As `examine` would make it: content 0 cannot be read."""
    report = Report()
    for split, table in content.items():
        report.digests[split] = np.stack([table, table * 7], 1).astype(np.uint64)
        images = splits_of(source)[split]
        for i in np.flatnonzero(table == 0).tolist():
            report.findings.append(Finding("empty", split, images.name(i), "no bytes", i))
    return report


def kept_by_rule(
    query: list[tuple[int, int]], train: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Positions that stay of the copies of one image, given as (position, label)."""

    def classes(copies: list[tuple[int, int]]) -> set[int]:
        return {label for _, label in copies if label >= 0}

    def first(copies: list[tuple[int, int]]) -> list[int]:
        return ([i for i, label in copies if label >= 0] or [i for i, _ in copies])[:1]

    in_query = first(query) if len(classes(query)) < 2 else []
    if len(classes(query + train)) > 1:
        return in_query, []
    return in_query, [] if query else first(train)


@pytest.mark.parametrize("seed", range(20))
def test_what_stays_follows_the_rule_for_every_content(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {"train": 23, "query": 9} | ({"bank": 11} if seed % 2 else {})
    labels = {split: rng.integers(-1, 3, count) for split, count in sizes.items()}
    content = {split: rng.integers(0, 14, count) for split, count in sizes.items()}
    source = Labelled(labels)
    out = plan(source, report_of(source, content))

    def copies(split: str, value: int) -> list[tuple[int, int]]:
        return [(int(i), int(labels[split][i])) for i in np.flatnonzero(content[split] == value)]

    stays: set[tuple[str, int]] = set()
    for value in range(1, 14):
        for split in sizes.keys() - {"query"}:
            in_query, in_train = kept_by_rule(copies("query", value), copies(split, value))
            stays |= {("query", i) for i in in_query} | {(split, i) for i in in_train}
    every = {(split, i) for split, count in sizes.items() for i in range(count)}
    assert every - out.keys() == stays
    assert list(out) == sorted(out, key=lambda key: (["train", "query", "bank"].index(key[0]), key))
    for (split, i), item in out.items():
        assert (item.split, item.path) == (split, f"{split}/{i}")
        assert (item.kind == "empty") == (content[split][i] == 0)
        if item.kept is not None:  # what stands for it stays, and is the same
            of, number = item.kept.split("/")
            assert (of, int(number)) in stays
            assert content[of][int(number)] == content[split][i]
            assert (item.kind == "duplicate") == (of == split)


def test_reasons_name_the_other_image() -> None:
    labels = {"train": np.array([0, 0, 1, 1, 0]), "query": np.array([0, 1])}
    source = Labelled(labels)
    content = {"train": np.array([5, 5, 6, 7, 7]), "query": np.array([8, 6])}
    out = plan(source, report_of(source, content))
    assert {key: item[0] for key, item in out.items()} == {
        ("train", 1): "duplicate",
        ("train", 2): "leak",
        ("train", 3): "conflict",
        ("train", 4): "conflict",
    }
    assert [item.reason for item in out.values()] == [
        "the same bytes as train/0",
        "the same bytes as query/1, in query",
        "the same bytes as train/4, of another class",
        "the same bytes as train/3, of another class",
    ]
    assert [item.kept for item in out.values()] == ["train/0", "query/1", None, None]


def test_of_images_drawn_for_evaluation_the_first_in_the_listing_stays() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    drawn = np.array([False, True, True, False, False])
    source = Labelled({"all": labels}, drawn)
    content = np.array([3, 4, 5, 4, 3])  # 1 and 3 are of two classes, 0 and 4 of one
    out = plan(source, report_of(source, {"train": content[~drawn], "query": content[drawn]}))
    assert {(item.kind, item.path, item.kept) for item in out.values()} == {
        ("duplicate", "all/4", "all/0"),
        ("conflict", "all/1", None),
        ("conflict", "all/3", None),
    }
    assert out.keys() == {("train", 2), ("train", 1), ("query", 0)}


def test_a_damaged_image_stands_for_none() -> None:
    source = Labelled({"train": np.array([0, 0]), "query": np.array([0])})
    report = report_of(source, {"train": np.array([5, 5]), "query": np.array([5])})
    report.findings.append(Finding("damaged", "query", "query/0", "its CRC-32 differs", 0))
    out = plan(source, report)
    assert {key: item.kind for key, item in out.items()} == {
        ("query", 0): "damaged",
        ("train", 1): "duplicate",
    }
