"""Features of texts, trained on docstrings, against words counted: kNN, linear, likeness of pairs.

    python benchmarks/text.py                     seeds 0, 1, 2 of configs/package-docs.yaml
    python benchmarks/text.py --seeds 0 --root FOLDER --runs FOLDER

Compared are the features of the trained encoder, of the same encoder at initialisation, the bag of words
(log(1 + count) of each token, in the same view that the encoder sees, the first 64 tokens), and tf-idf,
log(1 + count) times the inverse document frequency, of the same tokens and of whole documents. kNN:
k = 20, cosine, weights exp(s / 0.07). Linear: scikit-learn's logistic regression with C = 10 on rows of
length 1. Both learn from the training files and are scored on held-out ones. Spearman: of the cosine of
two texts with the score of the pair, of pairs.csv. What is not trained is printed once. Needs the extra
`text`.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from simclr_pl.cli import main
from simclr_pl.commands.encoders import data_for, load_subject
from simclr_pl.commands.similarity import Texts, spearman
from simclr_pl.data import PackageDocs
from simclr_pl.neighbours import knn_predict, normalised_half
from simclr_pl.text_augment import TextAugment

CONFIG = Path(__file__).parents[1] / "configs" / "package-docs.yaml"
ENOUGH = 10**6  # tokens: no document is longer
Sets = dict[str, Tensor]  # features of "bank", "query" and "texts", the texts of the pairs


def trained_run(seed: int, root: str, runs: str) -> Path:
    begin = time.perf_counter()
    options = ["--seed_everything", str(seed), "--data.source.root", root]
    folders = [
        "--trainer.default_root_dir",
        f"{runs}/{seed}",
        "--trainer.enable_progress_bar",
        "false",
    ]
    main(["fit", "--config", str(CONFIG), *options, *folders])
    print(f"seed {seed}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return max(
        Path(runs, str(seed), "package-docs").glob("version_*"), key=lambda p: p.stat().st_mtime
    )


def tokens_of(source: PackageDocs, texts: Texts) -> dict[str, list[np.ndarray]]:
    source.open()
    texts.open()
    sets = {"bank": source.bank, "query": source.query, "texts": texts.query}
    return {name: [images.open(i) for i in range(len(images))] for name, images in sets.items()}


def views_of(tokens: list[np.ndarray], augment: TextAugment) -> list[Tensor]:
    parts = (augment.prepare(tokens[i : i + 256], None) for i in range(0, len(tokens), 256))
    return [augment.finish({"tokens": torch.from_numpy(part["tokens"])}) for part in parts]


def encoded(encoder: nn.Module, tokens: dict[str, list[np.ndarray]], augment: TextAugment) -> Sets:
    encoder.eval()
    with torch.no_grad():
        return {
            name: torch.cat([encoder(views) for views in views_of(each, augment)])
            for name, each in tokens.items()
        }


def counted(tokens: dict[str, list[np.ndarray]], augment: TextAugment) -> Sets:
    return {
        name: torch.cat([augment.raw(views) for views in views_of(each, augment)])
        for name, each in tokens.items()
    }


def weighted(counts: Sets) -> Sets:
    """Times the inverse document frequency, log((1 + M) / (1 + documents with the token)) + 1."""
    bank = counts["bank"]
    weight = ((1 + len(bank)) / (1 + (bank > 0).sum(0))).log() + 1
    return {name: rows * weight for name, rows in counts.items()}


def scores(features: Sets, source: PackageDocs, texts: Texts) -> tuple[float, float, float]:
    """KNN and linear in percent, Spearman's correlation."""
    y, truth = (torch.from_numpy(images.labels) for images in (source.bank, source.query))
    half = (normalised_half(features[name]) for name in ("bank", "query"))
    bank, query = half
    knn = knn_predict(bank, y, query, len(source.classes), 20, 0.07)
    # Of the counts most are 0
    x, q = (csr_matrix(F.normalize(features[name]).numpy()) for name in ("bank", "query"))
    linear = LogisticRegression(C=10, max_iter=300).fit(x, y.numpy()).predict(q)
    first, second = (F.normalize(features["texts"])[texts.places[:, i]] for i in (0, 1))
    cosines = (first * second).sum(1).double().numpy().round(6)
    shares = ((knn == truth).float().mean(), (linear == truth.numpy()).mean())
    return 100 * float(shares[0]), 100 * float(shares[1]), spearman(cosines, texts.scores)


def show(name: str, found: tuple[float, ...]) -> None:
    print(f"{name:34}{found[0]:6.1f}{found[1]:9.1f}{found[2]:10.3f}", flush=True)


def benchmark(seeds: list[int], root: str, runs: str) -> None:
    source = PackageDocs(root)
    source.prepare()
    pairs = Path(root, "package-docs", "pairs.csv")
    texts = Texts(pairs, ("sentence1", "sentence2", "score"), source)
    tokens = tokens_of(source, texts)
    sizes = f"{len(source.bank):,} documents, {len(source.query):,} held out"
    print(f"{sizes}, {len(source.classes)} classes, {len(texts.scores):,} pairs", flush=True)
    print(f"{'':34}{'kNN, %':>6}{'linear, %':>9}{'Spearman':>10}", flush=True)
    every: dict[str, list[tuple[float, float, float]]] = {"trained": [], "at initialisation": []}
    for number, seed in enumerate(seeds):
        subject = load_subject(str(trained_run(seed, root, runs)))
        augment = data_for(subject, source=source).augment
        assert isinstance(augment, TextAugment)
        if not number:
            whole = TextAugment(source.vocab_size, max_length=ENOUGH)
            counts = counted(tokens, augment)
            show("bag of words", scores(counts, source, texts))
            show("tf-idf, the same tokens", scores(weighted(counts), source, texts))
            show("tf-idf, whole documents", scores(weighted(counted(tokens, whole)), source, texts))
        torch.manual_seed(seed)
        encoders = {"trained": subject.encoder, "at initialisation": subject.build()[0]}
        for name, encoder in encoders.items():
            every[name].append(scores(encoded(encoder, tokens, augment), source, texts))
            show(f"{name}, seed {seed}", every[name][-1])
    for name, found in every.items():
        columns = zip(*found, strict=True)
        show(f"{name}, mean of {len(found)}", tuple(mean(column) for column in columns))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="data")
    parser.add_argument("--runs", default="runs/text-benchmark")
    args = parser.parse_args()
    benchmark(args.seeds, args.root, args.runs)
