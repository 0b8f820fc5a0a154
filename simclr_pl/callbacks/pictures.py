"""Pictures of a run: views, nearest neighbours, and a map of the features.

Symbols: B samples on this rank, V views, E feature width, n points of the map, k neighbours, K classes.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from simclr_pl.augmentation import Augmentation
from simclr_pl.callbacks.drawing import Shown, draw_map, draw_neighbours, draw_views
from simclr_pl.callbacks.map_points import (
    SEED,
    draw_thumbnails,
    nearest_among,
    query_table,
    spread_over_classes,
)
from simclr_pl.callbacks.projection import mirrored_as, project_pca, project_umap
from simclr_pl.callbacks.tracking import log_picture, log_table
from simclr_pl.distributed import gather_uneven_rows, rank
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, permutation
from simclr_pl.neighbours import find_neighbours, normalised_half


class Pictures(Callback):
    """Draws what the numbers do not say, into ``pictures/`` of the run's folder and to the trackers.

    ``views.png``: the first samples of the first batch with their views, as the encoder sees them.
    ``neighbours_<step>.png``: some of the query and what is nearest to them in the bank.
    ``map_<step>.png``: the query as points, near each other where their features are.
    ``map.npz``: the numbers behind the latest map, ``xy`` (n, 2) float32, ``label`` and ``index`` (n,)
    int64, ``step``; ``neighbours`` (n, k) int64, the points nearest to each by their features, and
    their cosine ``similarity`` (n, k) float32; ``classes`` (K,) and ``axes`` (2,), names.
    ``map_thumbnails.jpg``: its samples, row by row in a square grid; each is read once in a run.

    What a sample and a view look like, the augmentation says (`Augmentation.picture_of`, `.pictures`);
    where it does not, only the map is drawn.

    Neighbours and map are drawn at each validation, from the features of the clean view in evaluation
    mode, scaled to length 1. The same samples are shown in every run, at any number of ranks; a map's
    axes point where the previous map's did. Unlabelled ones are shown without classes, those whose
    features are not finite not at all.

    Args:
        n_images: samples in the pictures of views and of neighbours.
        n_neighbours: neighbours of each of the query.
        max_points: of the query on the map at most.
        projection: from features to the map: "pca", the first two principal components, or "umap"
            (McInnes et al. 2018, arXiv:1802.03426), which takes seconds and the package umap-learn.

    Raises:
        InputError: a number < 1, fewer than 3 points, or umap-learn is missing.
    """

    def __init__(
        self,
        n_images: int = 8,
        n_neighbours: int = 6,
        max_points: int = 2000,
        projection: Literal["pca", "umap"] = "pca",
    ) -> None:
        self.n_images, self.n_neighbours, self.max_points = n_images, n_neighbours, max_points
        self.projection = projection
        lowest = {"n_images": 1, "n_neighbours": 1, "max_points": 3}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise InputError(
                    f"`{name}` must be >= {least}; got {getattr(self, name)}. Set `pictures.{name}`."
                )
        if projection not in ("pca", "umap"):
            raise InputError(
                f"`projection` must be pca or umap; got {projection!r}. Set `pictures.projection`."
            )
        if projection == "umap" and find_spec("umap") is None:
            raise InputError(
                "`projection` umap needs the package umap-learn; got an environment without it. "
                "`pip install 'simclr_pl[umap]'`, or set `pictures.projection` to pca."
            )
        self._previous: dict[str, Tensor] = {}  # index (n,) and xy (n, 2) of the latest map
        self._pictured: Tensor | None = None  # index (n,) of the thumbnails
        self._bank: list[tuple[Tensor, Tensor]] = []
        self._points: list[tuple[Tensor, Tensor]] = []
        self._wanted: Tensor | None = None
        self._views_due = False
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "pictures"  # collective

    # The views of the first batch.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Views are drawn once, by one rank."""
        self._views_due = trainer.is_global_zero

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws the views of the first batch."""
        if not self._views_due:
            return
        self._views_due = False
        data = trainer.datamodule  # type: ignore[attr-defined]
        index = batch["index"][: self.n_images]
        own = data.augment_at(trainer.current_epoch)
        kinds = {"views": own, "small_views": data.small_augment}
        views: list[np.ndarray] = []
        for name, augment in kinds.items():
            if name in batch:
                x = batch[name].unflatten(0, (-1, len(batch["index"])))[
                    :, : self.n_images
                ]  # (V, n, ...)
                shown = augment.pictures(x.flatten(0, 1))
                if shown is not None:
                    views += list(
                        shown.reshape(*x.shape[:2], *shown.shape[1:])
                    )  # each (n, H, W, C)
        if not views:
            return
        samples = data.samples("train")
        originals = [_picture(data.augment, samples, i) for i in index.tolist()]
        self._publish(trainer, "views", draw_views(originals, views, data.source.unit), "views")

    # Features of the validation.

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses those of the query that are on the map, the same ones on every rank."""
        self._bank, self._points, self._wanted = [], [], None
        if trainer.sanity_checking:
            return
        count = len(trainer.datamodule.samples("query"))  # type: ignore[attr-defined]
        wanted = np.zeros(count, bool)
        wanted[permutation(count, SEED, Stream.SAMPLE)[: self.max_points]] = True
        self._wanted = torch.from_numpy(wanted).to(pl_module.device)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the bank in half precision, and of the query what is on the map."""
        if self._wanted is None:
            return
        features, index = outputs["features"], outputs["index"]
        if dataloader_idx == 0:
            self._bank.append((normalised_half(features), index))
        else:
            rows = F.normalize(features.float(), dim=1)
            chosen = self._wanted[index] & rows.isfinite().all(1)
            self._points.append((rows[chosen], index[chosen]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws neighbours and map, on one rank."""
        if self._wanted is None or not self._bank or not self._points:
            return
        images = trainer.datamodule.samples("query")  # type: ignore[attr-defined]
        bank, bank_index = (torch.cat(parts) for parts in zip(*self._bank, strict=True))
        points, index = (
            gather_uneven_rows(torch.cat(parts)) for parts in zip(*self._points, strict=True)
        )
        self._bank, self._points, self._wanted = [], [], None
        order = index.argsort()  # (n,), the same whatever the ranks
        points, index = points[order], index[order].cpu()
        label = images.labels[index.numpy()]  # (n,)
        samples = spread_over_classes(label, self.n_images)
        # The queries of all ranks are searched for, so one rank alone brings them.
        own = points[samples if rank() == 0 else samples[:0]]
        found = find_neighbours(bank, bank_index, own, self.n_neighbours)
        if trainer.is_global_zero:
            similarity, nearest = (part.cpu().numpy() for part in found)
            self._draw_neighbours(trainer, index.numpy()[samples], similarity, nearest)
            self._draw_map(trainer, points.cpu().numpy(), label, index)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end

    # Drawing, on one rank.

    def _draw_neighbours(
        self, trainer: Trainer, queries: np.ndarray, similarity: np.ndarray, nearest: np.ndarray
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        bank, query = data.samples("bank"), data.samples("query")
        names = _class_names(data)
        rows = []
        for i, q in enumerate(queries.tolist()):
            image, own = _picture(data.augment, query, q), int(query.labels[q])
            if image is None:
                continue
            neighbours = []
            for s, j in zip(similarity[i].tolist(), nearest[i].tolist(), strict=True):
                other = _picture(data.augment, bank, j) if np.isfinite(s) else None
                if other is None:
                    continue
                theirs = int(bank.labels[j])
                known = own >= 0 and theirs >= 0
                same = own == theirs if known else None
                neighbours.append(Shown(other, names[theirs] if theirs >= 0 else "", s, same))
            rows.append((Shown(image, names[own] if own >= 0 else ""), neighbours))
        if rows:
            picture = draw_neighbours(rows, trainer.global_step)
            name = f"neighbours_{trainer.global_step}"
            self._publish(trainer, name, picture, "neighbours")

    def _draw_map(
        self, trainer: Trainer, points: np.ndarray, label: np.ndarray, index: Tensor
    ) -> None:
        if len(points) < 3:
            return
        step = trainer.global_step
        xy, axes = project_umap(points) if self.projection == "umap" else project_pca(points)
        if self._previous:
            before = (self._previous[name].cpu().numpy() for name in ("xy", "index"))
            xy = mirrored_as(xy, index.numpy(), *before)
        self._previous = {"xy": torch.from_numpy(xy), "index": index}
        data = trainer.datamodule  # type: ignore[attr-defined]
        names, unit = _class_names(data), data.source.unit
        self._publish(trainer, f"map_{step}", draw_map(xy, label, names, axes, step, unit), "map")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            nearest, similarity = nearest_among(points, self.n_neighbours)
            numbers: dict[str, Any] = {
                "xy": xy,
                "label": label,
                "index": index.numpy(),
                "step": step,
            }
            numbers |= {"neighbours": nearest, "similarity": similarity}
            np.savez(self._folder / "map.npz", **numbers, classes=names, axes=axes)
            self._draw_thumbnails(trainer, index)
            table = query_table(xy, label, index.numpy(), nearest, similarity, names)
            log_table(trainer.loggers, "pictures/queries", table, _row(trainer))

    def _draw_thumbnails(self, trainer: Trainer, index: Tensor) -> None:
        if self._pictured is not None and torch.equal(self._pictured, index):
            return  # decoding them takes longer than all of the map
        self._pictured = index
        data = trainer.datamodule  # type: ignore[attr-defined]
        query = data.samples("query")
        sheet = draw_thumbnails(_picture(data.augment, query, i) for i in index.tolist())
        if sheet is not None:
            Image.fromarray(sheet).save(self._folder / "map_thumbnails.jpg", quality=85)

    def _publish(self, trainer: Trainer, name: str, picture: np.ndarray, tag: str) -> None:
        """Writes a picture (H, W, 3) and hands it to the trackers."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.png"
        Image.fromarray(picture).save(path)
        log_picture(trainer.loggers, f"pictures/{tag}", picture, path, _row(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The latest map, which the next one's axes follow."""
        return dict(self._previous)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self._previous = dict(state_dict)


def _row(trainer: Trainer) -> int:
    """The step of the numbers of the same moment, as in metrics.csv: the first update is 0."""
    return max(trainer.global_step - 1, 0)


def _picture(augment: Augmentation, samples: Any, i: int) -> np.ndarray | None:
    """The sample at position ``i`` as (H, W, C) uint8; None if it cannot be read, or not be seen."""
    try:
        return augment.picture_of(samples.open(i))
    except InputError:  # `UnreadableSample`; the data module reports it
        return None


def _class_names(data: Any) -> list[str]:
    """(K,) names by label; the label itself where there is no name."""
    names = list(data.source.classes)
    highest = max(int(data.samples(name).labels.max()) for name in ("bank", "query"))
    return names + [str(k) for k in range(len(names), highest + 1)]
