"""`simclr similarity`: whether features of texts are as alike as people, or their origin, say.

Symbols: P pairs, M different texts in them, E feature width.
"""

import csv
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl.cli import Tracker
from simclr_pl.commands.comparison import compared
from simclr_pl.commands.encoders import data_for, load_subject, source_for, trainer_for
from simclr_pl.commands.results import publish, result_file, table_of
from simclr_pl.data.sources import Source, in_memory
from simclr_pl.data.text import TextFile
from simclr_pl.data.tokens import encode
from simclr_pl.distributed import gather_uneven_rows
from simclr_pl.errors import InputError
from simclr_pl.evaluation.features import CleanViews, Labelled

_log = logging.getLogger(__name__)

_RESAMPLES = 1000  # of the bootstrap


def similarity(
    subject: str,
    pairs: str | None = None,
    columns: tuple[str, str, str] = ("sentence1", "sentence2", "score"),
    dataset: str | None = None,
    baselines: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = 0,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    out: str | None = None,
    track: tuple[Tracker, ...] = (),
) -> None:
    """Compare the similarity of features of texts with given scores, pair by pair.

    The similarity of a pair is the cosine of its features. Spearman's correlation with the scores asks
    for the same order, Pearson's for a straight line; intervals are of 1,000 resamples of the pairs.

    For example:

        simclr similarity runs/package-docs/version_0 --pairs data/package-docs/pairs.csv

    Args:
        subject: A checkpoint of `simclr fit` or a run's folder, of an encoder of texts.
        pairs: A .csv or .tsv file with a head: two texts and a score in each row, higher for more alike;
            by default pairs.csv in the folder of the data set.
        columns: Names of those three.
        dataset: A YAML config or its name, or the name of a source, whose tokenizer is taken; by default
            the run's own.
        baselines: Score the encoder at initialisation and the bag of words, too.
        seed: Of the resamples.
        batch_size: Texts encoded at a time on each device.
        num_workers: Loader processes of each device.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: Of the encoder, e.g. bf16-mixed; by default 32-true.
        out: The JSON file of the result; by default <checkpoint>.similarity.json beside the checkpoint,
            or in the working folder.
        track: Trackers that get the result, into the run of the training: [wandb], [wandb-offline] or
            [tensorboard].
    """
    model = load_subject(subject)
    result_file("similarity", model, out)  # a wrong `out` is known before the work
    source = source_for(model, dataset)
    if not isinstance(source, TextFile):
        raise InputError(
            f"pairs are of texts; got {source.unit}, of {type(source).__name__}. Give the run of an "
            "encoder of texts, or `--dataset`."
        )
    file = source.path / "pairs.csv" if pairs is None else Path(pairs)
    texts = Texts(file, columns, source)
    data = data_for(model, None, seed, batch_size, num_workers, source=texts)
    views = CleanViews(raw=baselines)
    trainer = trainer_for(devices, accelerator, precision, [views])
    values: dict[str, Any] = {"pairs": len(texts.scores), "file": str(file)}
    rows = []
    for part in compared(model, data, trainer, views, baselines):
        cosines = texts.cosines(part.query)
        row = [part.name]
        for name, correlation in (("spearman", spearman), ("pearson", pearson)):
            found = correlation(cosines, texts.scores)
            interval = bootstrap(correlation, cosines, texts.scores, seed)
            values[f"{name}{part.suffix}"] = found
            values[f"{name}_interval{part.suffix}"] = interval
            row.append(f"{found:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]")
        rows.append(row)
    title = f"Cosine against score, {len(texts.scores):,} pairs, correlation [95 % interval]"
    publish(
        "similarity",
        model,
        table_of(title, ("", "Spearman", "Pearson"), rows),
        values,
        out,
        track,
    )


class Pair(NamedTuple):
    """Two texts and their score."""

    first: str
    second: str
    score: float


def read_pairs(file: Path, columns: tuple[str, str, str]) -> list[Pair]:
    """The pairs of a table; rows without two texts and a number are left out, and said.

    Raises:
        InputError: there is no such file or column, or there are fewer than three pairs.
    """
    pairs, bad = [], []
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
                raise InputError(
                    f"`columns` must be names of columns of the pairs; got {missing[0]!r}, where there "
                    f"are {', '.join(map(repr, rows.fieldnames or ()))}. Set `--columns`."
                )
            for row in rows:
                first, second, score = (row[name] or "" for name in columns)
                if first.strip() and second.strip() and (number := _number(score)) is not None:
                    pairs.append(Pair(first, second, number))
                else:
                    bad.append(rows.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"`pairs` must be a .csv or .tsv file in UTF-8; got {str(file)!r}: {error}. Set `--pairs`."
        ) from error
    if bad:
        _log.warning("%s:%d and %d more rows hold no pair; left out", file, bad[0], len(bad) - 1)
    if len(pairs) < 3:
        raise InputError(
            f"`pairs` must hold three pairs or more; got {len(pairs)} in {str(file)!r}. Set `--pairs`."
        )
    return pairs


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


class Texts(Source):
    """The different texts of pairs, as the query; each has its number as its label.

    Args:
        file: of the pairs.
        columns: names of the two texts and the score.
        source: gives the tokenizer.

    Attributes:
        scores: (P,) float64.
        places: (P, 2) int64, the numbers of the texts of each pair.
    """

    unit = "texts"
    channels = 1

    def __init__(self, file: Path, columns: tuple[str, str, str], source: TextFile) -> None:
        self.vocab_size, self._augment = source.vocab_size, source.default_augment
        pairs = read_pairs(file, columns)
        number: dict[str, int] = {}
        places = [[number.setdefault(text, len(number)) for text in pair[:2]] for pair in pairs]
        self._tokens = [encode(source.tokenizer, text) for text in number]
        usable = np.array([len(tokens) > 0 for tokens in self._tokens])[np.array(places)].all(1)
        self.places = np.array(places)[usable]
        self.scores = np.array([pair.score for pair in pairs])[usable]

    def open(self) -> None:
        """All texts are the query; the other two sets are of one text."""
        labels = np.arange(len(self._tokens))
        self.query = in_memory(self._tokens, labels, "text")
        self.train = self.bank = self.query.subset(labels[:1])

    def default_augment(self) -> Any:
        """That of the source."""
        return self._augment()

    def cosines(self, part: Labelled) -> np.ndarray:
        """The similarity of each pair (P,) float64, from the features of each rank; collective.

        To six places: beyond, float32's rounding would rank what is equal.
        """
        features, labels = (gather_uneven_rows(rows).cpu() for rows in part)
        unit = F.normalize(features.double(), dim=1)  # (M, E)
        ordered = torch.zeros(len(self._tokens), unit.shape[1], dtype=unit.dtype)
        ordered[labels] = unit
        first, second = (ordered[torch.from_numpy(self.places[:, i])] for i in (0, 1))
        cosines: Tensor = (first * second).sum(1)
        return cosines.numpy().round(6)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two rows (P,); 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation of two rows (P,): Pearson's of the ranks, equal values sharing theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]  # type: ignore[no-any-return]


def bootstrap(correlation: Any, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    """The central 95 % of a correlation over resamples of the pairs (Efron 1979), with replacement."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(x), size=(_RESAMPLES, len(x)))
    found = [correlation(x[rows], y[rows]) for rows in chosen]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
