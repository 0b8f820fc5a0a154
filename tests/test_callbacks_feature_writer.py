"""Features on disk, in order, each image once."""

from pathlib import Path

import numpy as np
import torch
from ranks import on_ranks
from tiny import tiny_data, tiny_model, tiny_trainer

from simclr_pl.callbacks import FeatureWriter


def predict(folder: Path) -> None:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = tiny_trainer(
        [FeatureWriter()],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
    )
    trainer.predict(tiny_model(), datamodule=tiny_data(), return_predictions=False)


def test_written_features_are_the_models_on_one_and_two_ranks(tmp_path: Path) -> None:
    predict(tmp_path / "one")
    on_ranks(2, predict, tmp_path / "two")
    data, model = tiny_data(), tiny_model().eval()
    data.setup()
    batches = [data.make_views(b, "query") for b in data.predict_dataloader()]
    with torch.no_grad():
        expected = torch.cat([model(b["views"]) for b in batches]).numpy()
    for run in ("one", "two"):
        with np.load(tmp_path / run / "features.npz") as table:
            np.testing.assert_array_equal(table["index"], np.arange(450))
            np.testing.assert_array_equal(table["label"], data.source.query.labels)
            np.testing.assert_allclose(table["features"], expected, rtol=1e-4, atol=1e-5)
