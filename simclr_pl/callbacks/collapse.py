"""Whether features collapse: their rank and spread, and the cosines of pairs.

Symbols: B samples of a step on this rank, V views, W ranks, E feature width, D projection width, b
samples measured of each rank, m of all ranks whose views are all their own.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from simclr_pl import metrics
from simclr_pl.callbacks.step_log import StepLog
from simclr_pl.callbacks.tracking import log_histogram
from simclr_pl.distributed import gather_rows, rank, world_size
from simclr_pl.errors import InputError

_log = logging.getLogger(__name__)

_FEWEST = 8  # samples: fewer say nothing of a collapse
_BINS = 100

_CURES = (
    "What usually cures it: a lower learning rate (`model.optimizer.lr`; see `model.lr_scaling`) or a "
    "longer warm-up (`model.warmup_epochs`); a temperature between 0.1 and 0.5 (`model.temperature`); a "
    "projection head with batch norm (`model.projector`), statistics of the global batch on several "
    "ranks (`trainer.sync_batchnorm`); weaker weight decay. Else see whether the samples differ from "
    "each other (`simclr data check`), and whether an encoder of your own answers to its input."
)


class CollapseMonitor(Callback):
    """Measures how many dimensions the representation fills, and warns when it collapses.

    Every ``every_n_steps`` training steps, and at the first, on samples spread evenly over the global
    batch, the same ones at any rank count that divides their number. Logs

    - ``collapse/feature_rank``, ``collapse/projection_rank``: RankMe (arXiv:2210.02885) of each
      sample's first view; 1 is a point or a line through zero, the most is the number of samples or the
      width;
    - ``collapse/feature_std``, ``collapse/projection_std``: deviation of its L2-normalised rows
      (arXiv:2011.10566); 0 is a point, 1 an even spread over the sphere;
    - ``collapse/alignment``, ``collapse/uniformity`` (arXiv:2005.10242) and ``collapse/top1``, the share
      of the views whose nearest neighbour shows the same sample, all of the projections.

    Where views stand in for those of other samples (``data.replace_probability``), these three are of the
    samples whose views are all their own; with fewer than two of them they are left out.

    Histograms of the cosines of positive and negative pairs go to ``histograms.jsonl`` in the run's
    folder, one JSON object a line with the ``step`` as in metrics.csv and the counts in equal bins over
    [-1, 1], and to Weights & Biases and TensorBoard where they are on.

    One warning in a run says that features collapse, and what usually cures it. At least 8 samples are
    needed for it. The device is waited for in the measured steps only.

    Args:
        every_n_steps: steps from one measurement to the next.
        max_images: samples measured, over all ranks; each rank gives the same number, at least one.
        min_rank: warn where a rank is below it, or below a quarter of the highest possible one if that
            is less. Rows on a line have a rank of at most 2, in bfloat16 2.6; at widths of 32 and more,
            untrained encoders and healthy runs measured 9 and more.
        min_std: warn where a deviation is below it; untrained encoders and healthy runs
            measured 0.28 and more.

    Raises:
        InputError: every_n_steps < 1, max_images < 2, or a negative bound.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        max_images: int = 512,
        min_rank: float = 5.0,
        min_std: float = 0.05,
    ) -> None:
        least = {"every_n_steps": 1, "max_images": 2, "min_rank": 0, "min_std": 0}
        given = dict(zip(least, (every_n_steps, max_images, min_rank, min_std), strict=True))
        for name, value in given.items():
            if not value >= least[name]:
                raise InputError(
                    f"`{name}` must be >= {least[name]}; got {value}. Set `collapse.{name}`."
                )
        self.every_n_steps, self.max_images = every_n_steps, max_images
        self.min_rank, self.min_std = min_rank, min_std
        self._warned = False
        self._latest = 0  # optimiser steps at the latest look
        self._folder: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the run's folder, and the step that a resumed run goes on from."""
        self._latest = trainer.global_step
        folder = trainer.log_dir  # collective
        keeps = folder and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._folder = Path(folder) if keeps and folder else None

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures, logs and judges, when it is time."""
        step = trainer.global_step
        if step == self._latest:  # gradients are accumulated: no step was made
            return
        self._latest = step
        if step != 1 and step % self.every_n_steps:
            return
        count = len(outputs["index"])
        h = self._of_all_ranks(outputs["features"], count)  # (V, W*b, E)
        z = own = self._of_all_ranks(outputs["projections"], count)  # (V, W*b, D)
        if "ids" in outputs:
            ids = self._of_all_ranks(outputs["ids"].reshape(-1, 1), count)[..., 0]  # (V, W*b)
            own = z[:, (ids == ids[0]).all(0)]  # (V, m, D)
        measured = _of_views(h, z)
        if pairs := own.shape[1] > 1 or own is z:
            measured |= _of_pairs(own)
        # One wait for the device, for all of them.
        values = dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True))
        # Lightning's own logging keeps the steps that are multiples of `log_every_n_steps` only: it
        # serves the callbacks, and the loggers get every value from here.
        pl_module.log_dict(values, logger=False)
        histograms = metrics.similarity_histograms(own, _BINS) if pairs else None
        if trainer.is_global_zero:
            self._write(trainer, values, histograms)
        self._judge(values, h, z, step)

    def _of_all_ranks(self, rows: Tensor, count: int) -> Tensor:
        """(V*B, width) of this rank -> (V, W*b, width) of all."""
        b = max(1, min(count, self.max_images // world_size()))
        chosen = torch.arange(b, device=rows.device) * count // b
        samples = rows.view(-1, count, rows.shape[1]).transpose(0, 1)[chosen]  # (b, V, width)
        return gather_rows(samples).transpose(0, 1)

    def _write(
        self, trainer: Trainer, values: dict[str, float], histograms: metrics.Histograms | None
    ) -> None:
        step = trainer.global_step - 1  # from 0, as Lightning numbers train/loss
        epoch = trainer.current_epoch
        StepLog.of(trainer).write(trainer, values, step)
        if histograms is None:
            return
        positive, negative = histograms.positive.tolist(), histograms.negative.tolist()
        log_histogram(trainer.loggers, "collapse/positives", positive, step)
        log_histogram(trainer.loggers, "collapse/negatives", negative, step)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            line = {"step": step, "epoch": epoch, "positive": positive, "negative": negative}
            with open(self._folder / "histograms.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _judge(self, values: dict[str, float], h: Tensor, z: Tensor, step: int) -> None:
        if self._warned or h.shape[1] < _FEWEST:
            return
        below = []
        for kind, rows in (("feature", h), ("projection", z)):
            lowest = min(self.min_rank, min(rows.shape[1:]) / 4)
            for name, bound in (("rank", lowest), ("std", self.min_std)):
                value = values[f"collapse/{kind}_{name}"]
                if value < bound:
                    below.append(f"{kind}_{name} {value:.3g}, below {bound:.3g}")
        if below:
            self._warned = True
            if rank() == 0:
                _log.warning("features collapse at step %d: %s. %s", step, "; ".join(below), _CURES)

    def state_dict(self) -> dict[str, Any]:
        """Whether the run was warned, so that a resumed one is not again."""
        return {"warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self._warned = state_dict["warned"]


def _of_views(h: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Scalars of features (V, n, E) and projections (V, n, D): of the first view."""
    return {
        "collapse/feature_rank": metrics.rank_me(h[0]),
        "collapse/feature_std": metrics.deviation(h[0]),
        "collapse/projection_rank": metrics.rank_me(z[0]),
        "collapse/projection_std": metrics.deviation(z[0]),
    }


def _of_pairs(z: Tensor) -> dict[str, Tensor]:
    """Scalars of projections (V, m, D), where a column's views are of one sample."""
    others = [metrics.alignment(z[i], z[j]) for i in range(len(z)) for j in range(i)]
    return {
        "collapse/alignment": torch.stack(others).mean(),
        "collapse/uniformity": torch.stack([metrics.uniformity(view) for view in z]).mean(),
        "collapse/top1": metrics.contrastive_top1(z),
    }
