"""`simclr similarity` against scipy, in one process and two."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from ranks import on_ranks
from scipy.stats import pearsonr, spearmanr

from simclr_pl import InputError
from simclr_pl.cli import main
from simclr_pl.commands.encoders import load_subject
from simclr_pl.commands.similarity import bootstrap, pearson, read_pairs, similarity, spearman

WORDS = [
    "river",
    "stone",
    "cloud",
    "ember",
    "lantern",
    "harbour",
    "meadow",
    "copper",
    "violin",
    "thunder",
]
CONFIG = """
name: words
data:
  source: {{class_path: TextFile, init_args: {{path: {path}, vocab_size: 300}}}}
  global_batch_size: 8
  num_workers: 0
model:
  encoder: {{class_path: simclr_pl.TextEncoder, init_args: {{vocab_size: 300, width: 16, depth: 1}}}}
  projector: {{class_path: simclr_pl.Projector, init_args: {{hidden_features: 8, out_features: 8}}}}
  warmup_epochs: 0
trainer: {{max_epochs: 2, default_root_dir: {root}, enable_progress_bar: false}}
"""


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * (j + 2) + i // 10 + j * j) % 10] for j in range(3 + i % 11))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("words")
    (root / "docs.txt").write_text("\n".join(sentence(i) for i in range(30)))
    lines = ["a,b,likeness", *(f"{sentence(i)},{sentence(7 * i)},{i % 4}" for i in range(40))]
    lines += [f"{sentence(1)},,2", f"{sentence(1)},{sentence(2)},much"]
    (root / "pairs.csv").write_text("\n".join(lines))
    (root / "words.yaml").write_text(CONFIG.format(path=root / "docs.txt", root=root))
    seed_everything(0)
    off = [word for name in ("summary", "probe", "knn") for word in (f"--{name}", "null")]
    main(["fit", "--config", str(root / "words.yaml"), *off])
    return root / "words" / "version_0"


def arguments(run: Path) -> list[str]:
    pairs = str(run.parents[1] / "pairs.csv")
    return ["similarity", str(run), "--pairs", pairs, "--columns", "[a,b,likeness]"]


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    main(arguments(run))
    found: dict[str, Any] = json.loads((run / "checkpoints/last.similarity.json").read_text())
    return found


def cosines(run: Path, encoder: Any) -> np.ndarray:
    """Of the 40 pairs, a text at a time."""
    from simclr_pl.data import TextFile

    tokenizer = TextFile(str(run.parents[1] / "docs.txt"), vocab_size=300).tokenizer

    def feature(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode(text).ids]) + 1
        with torch.no_grad():
            return encoder(ids)[0].double()

    pairs = [(feature(sentence(i)), feature(sentence(7 * i))) for i in range(40)]
    return np.array([float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs])


def counts(ids: torch.Tensor) -> torch.Tensor:
    return torch.bincount(ids[0], minlength=301)[None].double().log1p()


def test_correlations_are_scipys_for_the_run_and_the_baselines(
    run: Path, found: dict[str, Any]
) -> None:
    subject, scores = load_subject(str(run)), np.arange(40) % 4
    encoders = {"": subject.encoder.eval(), "_init": subject.fresh().eval(), "_raw": counts}
    for suffix, encoder in encoders.items():
        expected = cosines(run, encoder)
        # Texts are equal in some pairs, and cosines then 1 but for rounding: ranks may swap
        assert found[f"spearman{suffix}"] == pytest.approx(
            spearmanr(expected, scores).statistic, abs=0.01
        )
        assert found[f"pearson{suffix}"] == pytest.approx(
            pearsonr(expected, scores).statistic, abs=1e-5
        )
        low, high = found[f"spearman_interval{suffix}"]
        assert low < found[f"spearman{suffix}"] < high
    assert found["pairs"] == 40  # of 42 rows


def test_two_ranks_agree_with_one(run: Path, found: dict[str, Any], tmp_path: Path) -> None:
    machine = ["--devices", "2", "--accelerator", "cpu", "--out", str(tmp_path / "two.json")]
    on_ranks(2, main, [*arguments(run), *machine])
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["pairs"] == found["pairs"]
    for name in ("pearson", "spearman", "pearson_init", "pearson_raw"):
        assert two[name] == pytest.approx(found[name], abs=1e-3)


def test_correlations_and_intervals_of_ties_and_constants() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, 60), generator.normal(size=60)
    y = y + 0.5 * x
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(np.ones(5), y[:5]) == 0
    low, high = bootstrap(spearman, x, y, 0)
    resampled = [
        spearmanr(x[rows], y[rows]).statistic
        for rows in np.random.default_rng(0).integers(60, size=(1000, 60))[:200]
    ]
    assert low == pytest.approx(np.quantile(resampled, 0.025), abs=0.06)
    assert high == pytest.approx(np.quantile(resampled, 0.975), abs=0.06)


def test_pairs_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    names = ("a", "b", "score")
    file = tmp_path / "pairs.csv"
    with pytest.raises(InputError, match=r"`pairs` must be a .csv or .tsv file"):
        read_pairs(file, names)
    file.write_text("a,b\nx,y\n")
    with pytest.raises(InputError, match="got 'score', where there are 'a', 'b'"):
        read_pairs(file, names)
    file.write_text("a,b,score\nx,y,1\nx,z,nan\nu,,1\n")
    with pytest.raises(InputError, match="three pairs or more; got 1"):
        read_pairs(file, names)
    with pytest.raises(InputError, match=r"pairs are of texts; got images, of Digits"):
        similarity("resnet18", str(file), dataset="Digits")
