"""Features on disk: in order, each image once, from any number of ranks, in one file."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from packing import packed, picture
from PIL import Image
from ranks import on_ranks
from tiny import tiny_data, tiny_model, tiny_trainer

from simclr_pl import ContrastiveDataModule, ConvEncoder, InputError, SimCLR
from simclr_pl.callbacks import FeatureWriter
from simclr_pl.callbacks.feature_writer import without_self
from simclr_pl.data import ImageFolder, Shards


def predict(
    path: Path | None,
    folder: Path | None = None,
    model: SimCLR | None = None,
    data: ContrastiveDataModule | None = None,
    neighbours: int = 0,
    **options: Any,
) -> None:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = tiny_trainer(
        [FeatureWriter(None if path is None else str(path), neighbours)],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        **options,
    )
    data = data or tiny_data(eval_batch_size=64)
    trainer.predict(model or tiny_model(), datamodule=data, return_predictions=False)


def expected_features() -> np.ndarray:
    data, model = tiny_data(), tiny_model().eval()
    data.setup()
    batches = [data.make_views(b, "query") for b in data.predict_dataloader()]
    with torch.no_grad():
        return torch.cat([model(b["views"]) for b in batches]).numpy()


def read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path) as table:
            return dict(table)
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def test_written_features_are_the_models_on_one_and_two_ranks(tmp_path: Path) -> None:
    predict(None, tmp_path / "one")
    on_ranks(2, predict, None, tmp_path / "two")
    on_ranks(2, predict, tmp_path / "three.parquet")
    data = tiny_data()
    data.setup()
    for file in ("one/features.npz", "two/features.npz", "three.parquet"):
        table = read(tmp_path / file)
        np.testing.assert_array_equal(table["index"], np.arange(450))
        np.testing.assert_array_equal(table["label"], data.source.query.labels)
        np.testing.assert_allclose(table["features"], expected_features(), rtol=1e-4, atol=1e-5)
        assert table["path"].tolist() == [f"image {i}" for i in range(450)]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_paths_are_the_files_and_unreadable_ones_are_left_out(suffix: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(20):
        file = root / ("train", "test")[i % 2] / "ants" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(file)
    (root / "test/ants/05.png").write_bytes(b"bad")
    kept = [i for i in range(1, 20, 2) if i != 5]
    options: dict[str, Any] = {"eval_batch_size": 4, "num_workers": 0, "max_bad_fraction": 1}
    model = SimCLR(ConvEncoder(2))
    for source, name in (
        (ImageFolder(str(root)), f"{root}/test/ants/{{:02d}}.png"),
        (Shards(str(tmp_path / "packed")), "test/ants/{:02d}.png"),
    ):
        if isinstance(source, Shards):
            packed(root, tmp_path / "packed")
        data = ContrastiveDataModule(source, 4, **options)
        predict(tmp_path / f"t{suffix}", model=model, data=data)
        table = read(tmp_path / f"t{suffix}")
        assert table["path"].tolist() == [name.format(i) for i in kept]
        assert set(table["label"]) == {0}
        assert len(table["index"]) == 9


def test_neighbours_are_those_of_a_brute_force_on_one_and_two_ranks(tmp_path: Path) -> None:
    predict(tmp_path / "one.npz", neighbours=3)
    on_ranks(2, predict, tmp_path / "two.parquet", None, None, None, 3)
    rows = expected_features().astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    for file in ("one.neighbours.npz", "two.neighbours.parquet"):
        table = read(tmp_path / file)
        assert table["neighbour"].shape == table["similarity"].shape == (450, 3)
        np.testing.assert_array_equal(table["index"], np.arange(450))
        # what is said of each neighbour is true, and none is nearer
        said = np.take_along_axis(cosine, table["neighbour"], 1)
        np.testing.assert_allclose(table["similarity"], said, atol=1e-5)
        np.testing.assert_allclose(said, -np.sort(-cosine, 1)[:, :3], atol=1e-5)


def test_an_image_is_not_its_own_neighbour_also_among_copies_of_it() -> None:
    similarity = torch.tensor([[1.0, 0.5, 0.2], [1.0, 1.0, 1.0], [1.0, 1.0, 0.1]])
    neighbour = torch.tensor([[7, 1, 2], [3, 4, 5], [6, 9, 2]])
    s, n = without_self(similarity, neighbour, torch.tensor([7, 8, 9]))
    assert n.tolist() == [[1, 2], [3, 4], [6, 2]]
    torch.testing.assert_close(s, torch.tensor([[0.5, 0.2], [1.0, 1.0], [1.0, 0.1]]))


def test_a_prediction_that_fails_leaves_no_half_a_file(tmp_path: Path) -> None:
    class Failing(SimCLR):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().predict_step(batch, batch_idx, dataloader_idx)

    with pytest.raises(RuntimeError, match="out of luck"):
        predict(tmp_path / "t.npz", model=Failing(ConvEncoder(2, in_channels=1)))
    assert list(tmp_path.iterdir()) == []


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    predict(tmp_path / "t.npz", neighbours=2, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_named_before_the_work() -> None:
    with pytest.raises(InputError, match="`neighbours` must be >= 0; got -1"):
        FeatureWriter(neighbours=-1)
    with pytest.raises(InputError, match=r"must end in \.parquet or \.npz; got 'a\.txt'"):
        FeatureWriter("a.txt")
