"""The quick start learns, and two sabotaged copies of it do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_pl import Augment
from simclr_pl.data import ContrastiveDataModule
from simclr_pl.training_cli import SimCLRCLI

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


class BrokenPositives(SimCLRCLI):
    """The second view of each row is one of another image."""

    def before_fit(self) -> None:
        make_views = self.datamodule.make_views

        def shifted(batch: Any, name: str) -> Any:
            out = make_views(batch, name)
            if name == "train":
                first, second = out["views"].chunk(2)
                out["views"] = torch.cat([first, second.roll(1, 0)])
            return out

        self.datamodule.make_views = shifted


class NoAugmentation(SimCLRCLI):
    """Both views of an image are the image."""

    def before_fit(self) -> None:
        data: ContrastiveDataModule = self.datamodule
        plain = data.augment
        data.augment = Augment(
            size=32,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip=0.0,
            jitter=0.0,
            grey=0.0,
            blur=0.0,
            mean=plain.mean,
            std=plain.std,
            clean_fraction=1.0,
        )


def run(cli: type[SimCLRCLI], folder: Path, epochs: int) -> dict[str, float]:
    arguments = ["fit", "--config", QUICKSTART, "--trainer.default_root_dir", str(folder)]
    # Shorter than the quick start; one evaluation, at the end.
    arguments += ["--trainer.max_epochs", str(epochs), "--model.warmup_epochs", "2"]
    arguments += ["--knn", "null", "--probe", "null", "--checkpoint", "null"]
    cli([*arguments, "--trainer.enable_progress_bar", "false"])
    summary: dict[str, float] = json.loads(
        (folder / "quickstart" / "version_0" / "summary.json").read_text()
    )
    return summary


def test_quick_start_beats_pixels_and_the_random_encoder(tmp_path: Path) -> None:
    summary = run(SimCLRCLI, tmp_path, 20)
    assert summary["steps"] == 200
    assert summary["knn_top1"] > 0.7
    assert summary["linear_top1"] > 0.85
    assert 0.5 < summary["knn_top1_raw"] < 0.65  # the set is not solved without learning
    assert summary["linear_top1_raw"] < 0.2
    assert summary["knn_top1_init"] < 0.55
    assert summary["linear_top1_init"] < 0.75


@pytest.mark.parametrize("sabotage", [BrokenPositives, NoAugmentation])
def test_sabotaged_run_ends_below_the_random_encoder(
    sabotage: type[SimCLRCLI], tmp_path: Path
) -> None:
    summary = run(sabotage, tmp_path, 5)
    assert summary["steps"] == 50  # the sound copy is at 64 % by then
    assert summary["knn_top1"] < summary["knn_top1_init"]
