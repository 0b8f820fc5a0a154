"""`simclr knn`: how well nearest neighbours among frozen features tell the class."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from simclr_pl.cli import Tracker
from simclr_pl.commands.comparison import compared
from simclr_pl.commands.encoders import channels_of, data_for, load_subject, trainer_for
from simclr_pl.commands.results import percent, publish, result_file, sizes_of, table_of
from simclr_pl.errors import InputError
from simclr_pl.evaluation.features import CleanViews
from simclr_pl.evaluation.knn import KNNScore, knn_grid
from simclr_pl.metrics import wilson_interval


def knn(
    subject: str,
    dataset: str | None = None,
    k: tuple[int, ...] = (1, 5, 10, 20, 50, 200),
    temperature: tuple[float, ...] = (0.02, 0.07, 0.2),
    baselines: bool = True,
    bank_size: int | None = None,
    size: int | None = None,
    pretrained: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    out: str | None = None,
    track: tuple[Tracker, ...] = (),
) -> None:
    """Classify samples by the votes of their nearest neighbours among frozen features.

    The query samples, seen once without augmentation, take the class that the most similar labelled
    training samples vote for, each with the weight exp(cosine / temperature). One search serves all k and
    temperatures. The best of them is chosen on the query, the baselines' too.

    For example:

        simclr knn runs/simclr/version_0 --k [20,200]

    Args:
        subject: A checkpoint of `simclr fit`, a run's folder, or a model of timm or torchvision.
        dataset: A folder, a packed folder, a file of texts, a YAML config or its name, or the name of a
            source; by default the run's own.
        k: Numbers of neighbours.
        temperature: Of the votes; lower ones listen to the nearest neighbours only.
        baselines: Score the encoder at initialisation and no encoder, too: of images, raw pixels (at most
            32 x 32 of them, kept in memory as the features are).
        bank_size: Labelled training samples to search; by default all.
        size: Side of an image as the encoder sees it, in pixels; by default the run's, or the source's.
        pretrained: Load the published weights of a model by name.
        seed: Of the choice of bank_size samples.
        batch_size: Samples encoded at a time on each device.
        num_workers: Loader processes of each device; by default one for each core.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: Of the encoder, e.g. bf16-mixed; by default 32-true.
        out: The JSON file of the result; by default <checkpoint>.knn.json beside the checkpoint, or in
            the working folder.
        track: Trackers that get the result, into the run of the training: [wandb], [wandb-offline] or
            [tensorboard].
    """
    if not k or min(k) < 1:
        raise InputError(f"`k` must be numbers >= 1; got {list(k)}. Set `--k`.")
    if not temperature or not min(temperature) > 0:
        raise InputError(
            f"`temperature` must be numbers > 0; got {list(temperature)}. Set `--temperature`."
        )
    model = load_subject(subject, pretrained, channels_of(dataset))
    result_file("knn", model, out)  # a wrong `out` is known before the work
    data = data_for(model, dataset, seed, batch_size, num_workers, bank_size, size)
    views = CleanViews(raw=baselines)
    trainer = trainer_for(devices, accelerator, precision, [views])
    values: dict[str, Any] = {"dataset": dataset or type(data.source).__name__}
    if baselines:
        values["raw_name"] = data.augment.raw_name
    rows, grids = [], []
    for part in compared(model, data, trainer, views, baselines):
        values.update(sizes_of(part, data.num_classes))
        grid = knn_grid(part.bank, part.query, data.num_classes, k, temperature)
        row, found = _summary(part.name, part.suffix, grid, values["query"], data.num_classes)
        rows.append(row)
        grids.append(grid)
        values.update(found)
    tables = [
        _grid_table(grids[0], k, temperature, values["query"], data.source.unit),
        table_of(
            f"The best, chosen on the query; {values['bank']:,} {data.source.unit} in the bank, % "
            "[95 % interval]",
            ("", "top-1", "k", "temperature", "top-5"),
            rows,
        ),
    ]
    publish("knn", model, tables, values, out, track)


def _summary(
    name: str, suffix: str, grid: Sequence[KNNScore], total: int, num_classes: int
) -> tuple[list[str], dict[str, Any]]:
    """The row of the table and the part of the JSON file for one of the compared."""
    best = max(grid, key=lambda cell: cell.top1)
    interval = wilson_interval(best.top1, total)
    row = [name, percent(best.top1 / total, interval), str(best.k), f"{best.temperature:g}"]
    values: dict[str, Any] = {
        f"top1{suffix}": best.top1 / total,
        f"top1_interval{suffix}": interval,
        f"chosen{suffix}": {"k": best.k, "temperature": best.temperature},
    }
    if num_classes > 5:
        best = max(grid, key=lambda cell: cell.top5)
        interval = wilson_interval(best.top5, total)
        values |= {f"top5{suffix}": best.top5 / total, f"top5_interval{suffix}": interval}
        row.append(percent(best.top5 / total, interval))
    else:
        row.append("-")
    values[f"grid{suffix}"] = [
        {**cell._asdict(), "top1": cell.top1 / total, "top5": cell.top5 / total} for cell in grid
    ]
    return row, values


def _grid_table(
    grid: Sequence[KNNScore], k: Sequence[int], temperature: Sequence[float], total: int, unit: str
) -> Table:
    cells = {(cell.k, cell.temperature): percent(cell.top1 / total) for cell in grid}
    rows = [[f"k = {each}", *(cells[each, t] for t in temperature)] for each in k]
    headings = ("", *(f"temperature {t:g}" for t in temperature))
    return table_of(f"Top-1 of {total:,} query {unit}, %", headings, rows)
