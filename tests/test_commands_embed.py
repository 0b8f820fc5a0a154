"""`simclr embed`: features of any split on disk, those that the encoder gives."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from trained import clean_features, digits_folder, digits_run

from simclr_pl.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("split", ["query", "bank", "train"])
def test_a_splits_features_lie_beside_the_checkpoint(split: str, run: Path) -> None:
    main(["embed", str(run), "--split", split])
    table = pq.read_table(run / f"checkpoints/last.{split}.parquet")
    features, labels = clean_features(run, "query" if split == "query" else "bank")
    assert table.column_names == ["features", "label", "index", "path"]
    assert table["index"].to_pylist() == list(range(len(labels)))
    assert table["label"].to_pylist() == labels.tolist()
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), features, atol=1e-5)


def test_unlabelled_images_of_a_folder_get_paths_and_neighbours(run: Path, tmp_path: Path) -> None:
    config = digits_folder(tmp_path / "images", 30)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        file.rename(flat / f"{i:02d}.png")
    config.write_text(config.read_text().replace(str(tmp_path / "images"), str(flat)))
    options = ["--dataset", str(config), "--split", "train", "--num_workers", "0"]
    main(["embed", str(run), *options, "--out", "t.npz", "--neighbours", "2"])
    with np.load("t.npz") as table:
        assert len(table["path"]) == 54  # a tenth of 60 is kept for evaluation
        assert set(table["label"]) == {-1}
        assert set(table["path"]) < {str(flat / f"{i:02d}.png") for i in range(60)}
        rows = table["features"].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -1)
    with np.load("t.neighbours.npz") as table:
        assert table["neighbour"].shape == (54, 2)
        np.testing.assert_allclose(table["similarity"], -np.sort(-cosine, 1)[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "t.csv"], "must end in .parquet or .npz; got 't.csv'"),
        (["--out", "no/t.npz"], "`out` must lie in a folder that exists"),
        (["--neighbours", "-1"], "`neighbours` must be >= 0; got -1"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["embed", str(run), *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error[error.index("error:") :]
