"""A look at a sample of a set: what is in it, what cannot be read, how long an image takes.

Symbols: V views, S side of a view, C channels.
"""

import time
from typing import Any

import numpy as np
import torch

from simclr_pl.data.datamodule import ContrastiveDataModule
from simclr_pl.data.decode import UnreadableImage
from simclr_pl.data.resident import fits_in_memory
from simclr_pl.data.sources import Images, ResidentImages, Source
from simclr_pl.doctor.children import Send
from simclr_pl.doctor.configured import build
from simclr_pl.doctor.lines import Line, duration, size

_BATCH = 32  # images that the speed is measured with at a time

Found = dict[str, Any]


class _Sample(Source):
    """The images of a sample, as a set of their own."""

    def __init__(self, source: Source, images: Images) -> None:
        self.train = self.bank = self.query = images
        self.channels, self.classes = source.channels, source.classes

    def open(self) -> None:
        """It is open."""


def look(send: Send, rank: int, args: list[str], count: int, seconds: float) -> None:
    """Opens the source of a config and sends what is found, part by part.

    Args:
        send: gets mappings.
        rank: not used.
        args: as those of `fit`.
        count: images of the sample.
        seconds: to read the sample in, and as many again to time the making of views.
    """
    cli = build(args)
    data: ContrastiveDataModule = cli.datamodule
    torch.set_num_threads(1)
    source = data.source
    began = time.perf_counter()
    source.open()
    train = source.train
    labelled = int((source.bank.labels >= 0).sum())
    names = {"train": source.train, "bank": source.bank, "query": source.query}
    send(
        {
            "source": type(source).__name__,
            "opened": time.perf_counter() - began,
            "images": {name: len(images) for name, images in names.items()},
            "labelled": labelled,
            "bank": min(data.bank_size, labelled or len(source.bank)),
            "classes": len(set(source.bank.labels[source.bank.labels >= 0].tolist())),
            "channels": source.channels,
        }
    )
    index = np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).astype(int))
    readable, found = _read(train, index, seconds)
    send(found)
    if len(readable):
        send(_timed(data, source, train, train.subset(readable), cli.trainer.num_devices, seconds))


def _read(images: Images, index: np.ndarray, seconds: float) -> tuple[np.ndarray, Found]:
    """Which of the images can be read, and how long that takes."""
    readable, bad, sides = [], [], set()
    began = time.perf_counter()
    for i in (
        np.random.default_rng(0).permutation(index).tolist()
    ):  # when time runs out: of all parts
        try:
            sides.add(images.open(i).pixels(reuse=True).shape[:2])
            readable.append(i)
        except UnreadableImage as error:
            bad.append((images.name(i), str(error)))
        if time.perf_counter() - began > seconds:
            break
    read = len(readable) + len(bad)
    return np.array(sorted(readable), int), {
        "sample": read,
        "unreadable": bad,
        "seconds_per_image": (time.perf_counter() - began) / read,
        "shorter_sides": [int(f(min(s) for s in sides)) for f in (min, max)] if sides else [],
    }


def _timed(
    data: ContrastiveDataModule,
    source: Source,
    whole: Images,
    sample: Images,
    ranks: int,
    seconds: float,
) -> Found:
    """How the set would be kept, and seconds to make the views of an image."""
    kept = isinstance(whole, ResidentImages) or (
        data.resident in ("memory", "device")
        or (data.resident == "auto" and fits_in_memory(whole, source.channels, ranks))
    )
    pixels = 0
    data.source = _Sample(source, sample)
    data.resident = "memory" if kept else "none"
    data.num_workers = 0
    data.global_batch_size = min(_BATCH, len(sample))
    data.setup("fit")
    held = data.images("train")
    if isinstance(held, ResidentImages):
        pixels = held.pixels.nbytes // len(held) * len(whole)
    loading, staging = _stopwatch(data, seconds)
    return {
        "kept": kept,
        "decoded": kept and not isinstance(whole, ResidentImages),
        "bytes": pixels,
        "loading": loading,
        "staging": staging,
    }


def _stopwatch(data: ContrastiveDataModule, seconds: float) -> tuple[float, float]:
    """Seconds for an image's views: in one worker, and in the device stage on the CPU."""
    loading, staging = [], []
    batches = iter(data.train_dataloader())
    began = last = time.perf_counter()
    for batch in batches:
        fetched = time.perf_counter()
        data.make_views(batch, "train")
        loading.append(fetched - last)
        last = time.perf_counter()
        staging.append(last - fetched)
        if last - began > seconds:
            break
    count = data.global_batch_size
    return float(np.median(loading)) / count, float(np.median(staging)) / count


def lines_of(found: Found, bad_share: float, batch: int) -> list[Line]:
    """What the look says.

    Args:
        found: the parts that `look` sent, in one mapping.
        bad_share: of unreadable images that the run would stand.
        batch: images of a global batch.
    """
    return [_counts(found, batch), *([_sample(found, bad_share)] if "sample" in found else [])]


def _counts(found: Found, batch: int) -> Line:
    images = found["images"]
    text = (
        f"{found['source']}: {images['train']:,} images to learn from, a bank of {found['bank']:,}, "
        f"{images['query']:,} to evaluate on; {found['channels']} channel(s)"
    )
    if found["classes"]:
        text += f", {found['classes']:,} classes"
    if found["opened"] > 2:
        text += f"; opened in {duration(found['opened'])}"
    if images["train"] < batch:
        return Line(
            "error",
            "data",
            f"{text}; fewer than the {batch:,} of one global batch",
            f"Set --data.global_batch_size to at most {images['train']}, or give more images.",
        )
    if not found["labelled"]:
        return Line(
            "warning",
            "data",
            f"{text}; no image is labelled, so there will be no accuracies",
            "None is needed to learn; put images into a folder for each class to have them.",
        )
    return Line("ok", "data", text)


def _sample(found: Found, bad_share: float) -> Line:
    read, bad = found["sample"], found["unreadable"]
    text = f"{read:,} images read, {1000 * found['seconds_per_image']:.2g} ms each"
    if sides := found["shorter_sides"]:
        low, high = sides
        text += f"; shorter side {low}" + (f" to {high}" if high > low else "") + " pixels"
    if found.get("kept"):
        where = "decoded once and kept" if found["decoded"] else "kept"
        text += f"; {where} in memory ({size(found['bytes'])})"
    if not bad:
        return Line("ok", "sample", text)
    name, reason = bad[0]
    text += f"; {len(bad)} cannot be read, e.g. {name}: {reason.rstrip('.')}"
    level = "error" if len(bad) / read > bad_share else "warning"
    stands = "stops the run" if level == "error" else "is left out by the run"
    root = f" ({bad_share:.0%} are allowed)"
    return Line(
        level,  # type: ignore[arg-type]
        "sample",
        text,
        f"That share {stands}{root}: simclr data check lists every such image.",
    )
