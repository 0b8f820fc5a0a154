"""The commands `simclr data ...`.

``src``, in all of them, is one of:

- a folder of images, as `ImageFolder` understands it;
- a packed folder;
- a YAML config, whose ``data.source`` is taken: a run's `config.yaml`, or one of the package's by name;
- the name of a source, e.g. ``Digits`` or ``CIFAR10``;
- the address of a packed set in an object store.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

import simclr_pl.data
from simclr_pl.data.decode import MAX_PIXELS
from simclr_pl.data.description import contents, moments
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.inspection import DOUBTFUL, KINDS, UNUSABLE, Finding, Report, examine
from simclr_pl.data.pack import pack_source
from simclr_pl.data.shards import Shards, all_shards, is_packed, load_index
from simclr_pl.data.sources import Source
from simclr_pl.data.streaming import StreamedShards
from simclr_pl.errors import InputError
from simclr_pl.presets import preset_files

_SHOWN = 20  # findings of a kind, or skipped images, that the terminal shows


def pack(
    src: str,
    out: str,
    short_side: int | None = 256,
    quality: int = 90,
    shard_mb: float = 128.0,
    workers: int | None = None,
    format: Literal["arrow", "litdata"] = "arrow",
) -> None:
    """Shrink the images of a set once and write them as shards that are quick to read.

    For example, to pack a folder and train from it:

        simclr data pack photos packed
        simclr fit --config imagenet --data.source Shards --data.source.root packed

    The same set, options and versions of the libraries give the same bytes, for any number of workers and
    however often the pack was killed. Images that cannot be read are left out, and listed.

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        out: The packed folder; train from it with --data.source Shards --data.source.root OUT. If a
            pack is killed, the same command goes on with it.
        short_side: Images whose shorter side is longer than this, in pixels, are shrunk to it and
            written as JPEG; all others are copied byte for byte. 256 suits crops of 224; null
            shrinks none.
        quality: Of those JPEGs, 1 to 100. At 90 and 256 pixels, an ImageNet image takes 29 KB instead of
            106, at 36.7 dB from the shrunk pixels; 95 takes 42 KB for 2.1 dB more, 80 takes 20 KB for
            2.5 dB less.
        shard_mb: Megabytes of a shard at most; the memory needed is a few times that.
        workers: Processes; by default one for each core.
        format: arrow for disks, see Shards; litdata for object stores, see StreamedShards.
    """
    source = source_of(src)
    index = pack_source(source, out, short_side, quality, shard_mb, workers, format)
    shards = all_shards(index)
    counts = {split: sum(s["count"] for s in parts) for split, parts in index["splits"].items()}
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    size = _size(sum(shard["bytes"] for shard in shards))
    plural = "shard" if len(shards) == 1 else "shards"
    console = _console()
    console.print(f"Packed {images} images in {len(shards)} {plural}, {size}, in {out}")
    if skipped := index["skipped"]:
        console.print(
            f"Left out {len(skipped):,} that cannot be read; all are in {out}/index.json:"
        )
        for item in skipped[:_SHOWN]:
            console.print(f"  {item['path']}: {item['reason']}")
        if len(skipped) > _SHOWN:
            console.print(f"  and {len(skipped) - _SHOWN:,} more")


def info(src: str, workers: int | None = None) -> None:
    """Say what a set holds: images, classes, bytes and sizes of each split.

    For example:

        simclr data info photos

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        workers: Processes; by default one for each core.
    """
    source = source_of(src)
    found = contents(source, workers)
    table = Table(title=src, title_justify="left")
    table.add_column("split")
    for heading in ("images", "classes", "stored", "median of an image", "median size"):
        table.add_column(heading, justify="right")
    for split, part in found.items():
        size = "-" if part.median_size is None else "{} x {}".format(*part.median_size)
        stored = "-" if part.bytes is None else _size(part.bytes)
        row = f"{part.images:,}", str(part.classes or "-"), stored, _size(part.median_bytes), size
        table.add_row(split, *row)
    console = _console()
    console.print(table)
    if is_packed(Path(src)):
        index = load_index(Path(src))
        options = ", ".join(f"{k} {v}" for k, v in index["options"].items())
        console.print(f"packed as {index['format']}: {len(all_shards(index))} shards, {options}")
        if index["skipped"]:
            console.print(f"{len(index['skipped']):,} images were left out; index.json lists them")


def check(
    src: str,
    report: str | None = None,
    tiny: int = 32,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
) -> int:
    """Read every image and list what is wrong; the exit code is 1 if any is unusable.

    For example, with every finding in a file:

        simclr data check photos --report findings.json

    Unusable are damaged, empty, truncated, too large and unreadable images. Duplicates, also of training
    images in the query split, tiny images and animations are for you to judge. Of a packed set every
    checksum is verified, too.

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        report: A JSON file that gets every finding; the terminal shows the first 20 of each kind.
        tiny: Images with a shorter side below this, in pixels, are listed.
        max_pixels: Images with more are too large, taken for decompression bombs.
        workers: Processes; by default one for each core.
    """
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise InputError(
            f"`report` must lie in a folder that exists; got {report!r}. Make the folder first."
        )
    found = examine(source_of(src), tiny, max_pixels, workers)
    _show(src, found)
    if report is not None:
        Path(report).write_text(json.dumps(found.as_dict(), indent=1) + "\n")
        _console().print(f"All findings are in {report}")
    return 0 if found.usable else 1


def stats(
    src: str, max_images: int | None = None, seed: int = 0, workers: int | None = None
) -> None:
    """Print the mean and standard deviation of the training images, for data.augment.init_args.

    For example, of a part of them:

        simclr data stats photos --max_images 10000

    Every pixel counts the same, before any crop; pixels are within [0, 1].

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        max_images: Take a random sample of so many images; by default all.
        seed: Of that sample.
        workers: Processes; by default one for each core.
    """
    found = moments(source_of(src), max_images, seed, workers)
    left_out = f", {found.unreadable:,} left out as unreadable" if found.unreadable else ""
    print(f"# {src}: {found.images:,} training images, {found.pixels:,} pixels{left_out}")
    for name in ("mean", "std"):
        print(f"{name}: [{', '.join(f'{value:.4f}' for value in getattr(found, name))}]")


COMMANDS = {"check": check, "info": info, "stats": stats, "pack": pack}


def source_of(src: str) -> Source:
    """The source that the commands' ``src`` means, not yet opened.

    Raises:
        InputError: it means none.
    """
    path = Path(src)
    if path.is_dir():
        if not is_packed(path):
            return ImageFolder(src)
        return Shards(src) if load_index(path)["format"] == "arrow" else StreamedShards(src)
    if "://" in src:
        return StreamedShards(src)
    if path.suffix in (".yaml", ".yml"):
        return _built(_source_in(path), src)
    if src in preset_files():
        return _built(_source_in(preset_files()[src]), src)
    known = [n for n in simclr_pl.data.__all__ if _is_source(getattr(simclr_pl.data, n))]
    if src not in known and not (src.count(".") and src.replace(".", "").isidentifier()):
        raise InputError(
            f"`src` must be a folder, a YAML config or its name, or a source ({', '.join(known)}); "
            f"got {src!r}. Check the path."
        )
    return _built(src, src)


def _is_source(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Source) and value is not Source


def _source_in(file: Path) -> Any:
    try:
        source = yaml.safe_load(file.read_text())["data"]["source"]
    except OSError as error:
        raise InputError(f"a config must be readable; got {file}: {error.strerror}.") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"a config must have `data.source`; got none in {file}. Give one that `simclr fit` takes."
        ) from error
    return source


def _built(source: Any, src: str) -> Source:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source)
    try:
        config = parser.parse_object({"source": source})
        return parser.instantiate(config).source  # type: ignore[no-any-return]
    except InputError:
        raise
    except Exception as error:  # ArgumentError, or what the source's own constructor raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"`src` {src!r} must describe a source; got: {lines[-1]}. Options of a source go "
            "into a YAML config, under `data.source.init_args`."
        ) from error


# On the terminal.


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def _show(src: str, report: Report) -> None:
    console = _console()
    by_kind = Counter(finding.kind for finding in report.findings)
    for kind in KINDS:
        found = [finding for finding in report.findings if finding.kind == kind]
        for finding in found[:_SHOWN]:
            console.print(_line(finding))
        if len(found) > _SHOWN:
            console.print(f"{kind}: and {len(found) - _SHOWN:,} more")
    table = Table(title=src, title_justify="left")
    for heading in ("split", "images", "classes", "images of a class"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, count in report.images.items():
        table.add_row(split, f"{count:,}", *_balance(report.classes.get(split, {})))
    console.print(table)
    if by_kind:
        summary = Table()
        summary.add_column("finding")
        summary.add_column("images", justify="right")
        summary.add_column("")
        for kind in (kind for kind in KINDS if by_kind[kind]):
            summary.add_row(kind, f"{by_kind[kind]:,}", _judgement(kind))
        console.print(summary)
    verdict = "Every image is usable." if report.usable else "Not every image is usable."
    console.print(verdict)


def _line(finding: Finding) -> str:
    where = f"{finding.split}: " if finding.split else ""
    return f"{finding.kind}: {where}{finding.path}: {finding.detail}"


def _judgement(kind: str) -> str:
    if kind in UNUSABLE:
        return "unusable"
    return "to be judged" if kind in DOUBTFUL else "converted on reading"


def _balance(counts: dict[str, int]) -> tuple[str, str]:
    if not counts:
        return "-", "-"
    low, high = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    if counts[low] == counts[high]:
        return f"{len(counts):,}", f"{counts[low]:,} each"
    return f"{len(counts):,}", f"{counts[low]:,} ({low}) to {counts[high]:,} ({high})"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
