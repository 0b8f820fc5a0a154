"""Texts as a source: splits, labels, one tokenizer for all, and runs that are the same in any way."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from ranks import on_ranks
from tiny import differences, tiny_trainer, weights
from torch.distributed import is_initialized
from torch.optim import SGD

from simclr_pl import ContrastiveDataModule, InputError, Projector, SimCLR, TextAugment, TextEncoder
from simclr_pl.callbacks import ExactCheckpoint
from simclr_pl.data import TextFile
from simclr_pl.data.sources import held_out

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
    "orchard",
    "marble",
]


def text(i: int) -> str:
    """Document i: 5 to 44 words, of two subjects."""
    words = WORDS[:6] if i % 2 else WORDS[6:]
    return " ".join(words[(i * j + j) % 6] for j in range(5 + i % 40))


def corpus(path: Path, count: int = 44) -> Path:
    lines = ["text,subject", *(f"{text(i)},{'odd' if i % 2 else 'even'}" for i in range(count))]
    path.write_text("\n".join(lines))
    return path


def texts_of(source: TextFile, name: str) -> list[str]:
    images = getattr(source, name)
    return [images.encoded(i).decode() for i in range(len(images))]


def test_a_table_is_split_labelled_and_tokenised(tmp_path: Path) -> None:
    path = corpus(tmp_path / "docs.csv")
    source = TextFile(str(path), label_column="subject", vocab_size=300)
    source.prepare()
    assert source.tokenizer_path == tmp_path / "docs.tokenizer.json"
    source.open()
    kept = held_out(44, 0.1)
    assert texts_of(source, "query") == [text(i) for i in np.flatnonzero(kept)]
    assert texts_of(source, "train") == [text(i) for i in np.flatnonzero(~kept)]
    assert source.classes == ["even", "odd"]
    assert source.train.labels.tolist() == (np.flatnonzero(~kept) % 2).tolist()
    assert source.bank is source.train
    for i in (0, 1, 0):  # again: from memory
        tokens = source.train.open(i)
        assert tokens.dtype == np.int32
        assert source.tokenizer.decode(tokens.tolist()).strip() == source.train.encoded(i).decode()
    assert source.train.name(0) == f"{path}:{2 + np.flatnonzero(~kept)[0]}"
    augment = source.default_augment()
    assert isinstance(augment, TextAugment)
    assert augment.vocab_size == 300


def test_folders_and_a_file_of_queries_are_the_split(tmp_path: Path) -> None:
    for name, labels in (("train", [10, 9, 10]), ("test", [2, 10]), ("val", [9])):
        table = pa.table({"text": [f"{name} {i}" for i in labels], "label": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = TextFile(str(tmp_path), label_column="label", vocab_size=300)
    source.open()  # which trains the tokenizer where nothing has
    assert (tmp_path / "tokenizer.json").is_file()
    assert (texts_of(source, "train"), texts_of(source, "query")) == (
        ["train 10", "train 9", "train 10"],
        ["val 9"],
    )
    assert source.classes == ["9", "10"]  # by size
    train, test = (str(tmp_path / f"{name}.parquet") for name in ("train", "test"))
    source = TextFile(train, label_column="label", vocab_size=300, query=test)
    source.open()
    assert source.classes == ["2", "9", "10"]
    assert source.train.labels.tolist() == [2, 1, 2]
    assert source.query.labels.tolist() == [0, 2]


def test_lines_have_no_labels_and_held_out_ones_teach_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    kept = held_out(20, 0.5)
    path.write_text("\n".join("secret secret" if out else "open words" for out in kept))
    source = TextFile(str(path), vocab_size=300, query_fraction=0.5)
    source.open()
    assert (source.train.labels == -1).all()
    assert source.classes == []
    assert "Ġwords" in source.tokenizer.get_vocab()
    assert "Ġsecret" not in source.tokenizer.get_vocab()


def test_the_tokenizers_file_is_read_where_it_is(tmp_path: Path) -> None:
    source = TextFile(str(corpus(tmp_path / "a.csv")), vocab_size=300)
    source.prepare()
    other = TextFile(
        str(corpus(tmp_path / "b.csv")), tokenizer=str(source.tokenizer_path), vocab_size=300
    )
    before = source.tokenizer_path.read_bytes()
    other.prepare()
    other.open()
    assert source.tokenizer_path.read_bytes() == before
    assert not (tmp_path / "b.tokenizer.json").exists()
    (tmp_path / "file").write_text("")
    lost = TextFile(str(tmp_path / "a.csv"), tokenizer=str(tmp_path / "file" / "t.json"))
    with pytest.raises(InputError, match=r"can be written to; .* Set `data.source.tokenizer`"):
        lost.prepare()


def test_wrong_options_are_errors(tmp_path: Path) -> None:
    for options, message in (
        ({"vocab_size": 255}, "`vocab_size` must be >= 256"),
        ({"query_fraction": 1.0}, "`query_fraction` must be"),
        ({"max_bytes": 0}, "`max_bytes` must be"),
    ):
        with pytest.raises(InputError, match=message):
            TextFile("docs.txt", **options)
    with pytest.raises(InputError, match=r"a folder must hold train\{.txt,.csv,.tsv,.parquet\}"):
        TextFile(str(tmp_path)).prepare()


def model(dropout: float, vocab_size: int = 300) -> SimCLR:
    torch.manual_seed(0)
    encoder = TextEncoder(vocab_size, 16, 1, 2, 32, dropout)
    head = Projector(16, hidden_features=16, out_features=8, layers=1, last_batch_norm=False)
    return SimCLR(
        encoder, head, 0.2, optimizer=lambda p: SGD(p, 0.5), lr_scaling="none", warmup_epochs=0
    )


class Seen(Callback):
    """Losses, and the tokens of each view by step, document and view."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.views: dict[tuple[int, int, int], list[int]] = {}

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, index = len(self.losses), batch["index"].tolist()
        self.losses.append(float(outputs["loss"]))
        for row, view in enumerate(batch["views"].tolist()):
            key = step, index[row % len(index)], row // len(index)
            self.views[key] = [token for token in view if token]


def fit(
    path: Path,
    dropout: float = 0.0,
    resumed: Path | None = None,
    folder: Path | None = None,
    workers: int = 0,
    precision: Any = "32-true",
) -> tuple[list[float], dict[Any, list[int]], dict[str, torch.Tensor]]:
    """Three epochs of two steps."""
    source = TextFile(str(path), label_column="subject", vocab_size=300)
    augment = TextAugment(300, (0.3, 0.9), 0.2, 32)
    data = ContrastiveDataModule(source, 16, augment=augment, num_workers=workers)
    ranks, seen = 2 if is_initialized() else 1, Seen()
    saving = (
        [ExactCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)] if folder else []
    )
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    options |= {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": bool(folder)}
    options["precision"] = precision
    trainer = tiny_trainer([seen, *saving], **options)
    trainer.fit(model(dropout), datamodule=data, ckpt_path=resumed, weights_only=True)
    return seen.losses, seen.views, weights(trainer.lightning_module)


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_ranks_workers_and_a_resumed_run_see_and_learn_the_same(tmp_path: Path) -> None:
    path = corpus(tmp_path / "docs.csv")
    # Ranks pad to other lengths, which rounds otherwise: in float64 that is below 1e-10
    exact = (path, 0.0, None, None, 0, "64-true")
    losses, views, _ = fit(*exact)
    assert len(losses) == 6
    assert len(views) == 6 * 16 * 2
    for other, own, _ in (results := on_ranks(2, fit, *exact)):
        assert other == pytest.approx(losses, rel=0, abs=1e-10)
        assert len(own) == len(views) / 2
    assert results[0][1] | results[1][1] == views
    with_dropout = fit(path, 0.2, folder=tmp_path / "whole")
    for step in (1, 4):
        resumed = fit(path, 0.2, tmp_path / f"whole/step={step}.ckpt", tmp_path / "more", 2)
        assert resumed[0] == with_dropout[0][step:]
        assert differences(resumed[2], with_dropout[2]) == []


def test_bad_lines_are_reported_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = corpus(tmp_path / "docs.csv", 40)
    path.write_bytes(path.read_bytes() + b"\n,odd\n\xff\xfe,even\n")
    with caplog.at_level(logging.WARNING):
        losses, _, _ = fit(path)
    assert np.isfinite(losses).all()
    said = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert len(said) == 2
    assert f"{path}:42" in said[0]
    assert "it is empty" in said[0]
    assert f"{path}:43" in said[1]
    assert "byte 1 is not UTF-8" in said[1]


def test_an_encoder_of_fewer_tokens_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    source = TextFile(str(corpus(tmp_path / "docs.csv")), vocab_size=300)
    data = ContrastiveDataModule(source, 16, num_workers=0)
    with pytest.raises(InputError, match=r"got 299 for 300. Set `model.encoder.vocab_size`"):
        tiny_trainer([]).fit(model(0.0, 299), datamodule=data)
