"""A tiny run of `simclr fit` on the digits, for the tests of the commands."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simclr_pl import SimCLR
from simclr_pl.cli import main
from simclr_pl.commands.encoders import data_for, load_subject
from simclr_pl.data import Digits

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


def digits_run(folder: Path, *arguments: str) -> Path:
    """Trains for a few steps at width 4 and returns the run's folder."""
    sys.argv = ["simclr"]  # LightningCLI warns of pytest's own arguments
    short = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"]
    quiet = ["--trainer.enable_progress_bar", "false", "--probe", "null", "--knn", "null"]
    quiet += ["--summary", "null", "--model.encoder.width", "4", "--model.warmup_epochs", "0"]
    root = ["--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", QUICKSTART, *short, *quiet, *root, *arguments])
    return folder / "quickstart" / "version_0"


def clean_features(
    run: Path | str, name: str, encoder: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, E) float64 and labels of "bank" or "query", by a plain loop."""
    subject = load_subject(str(run))
    data = data_for(subject, num_workers=0)
    data.setup()
    module = SimCLR(encoder or subject.encoder, torch.nn.Identity()).eval()
    loader = data.val_dataloader()[("bank", "query").index(name)]
    with torch.no_grad():
        batches = [data.make_views(batch, name) for batch in loader]
        features = torch.cat([module(batch["views"])[batch["index"] >= 0] for batch in batches])
    labels = torch.cat([batch["label"][batch["index"] >= 0] for batch in batches])
    return features.double().numpy(), labels.numpy()


def digits_folder(root: Path, count: int = 60) -> Path:
    """The first digits of each split as PNG files in class folders, and a config that reads them grey."""
    digits = Digits()
    digits.open()
    for split, images in (("train", digits.train), ("test", digits.query)):
        for i in range(count):
            folder = root / split / f"digit {images.labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[i, 0].numpy()).save(folder / f"{i:03d}.png")
    config = root.with_suffix(".yaml")
    config.write_text(
        "data:\n  source:\n    class_path: ImageFolder\n"
        f"    init_args: {{root: {root}, grey: true}}\n"
    )
    return config


def simclr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "simclr_pl", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
