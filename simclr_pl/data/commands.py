"""The commands `simclr data ...`.

``src``, in all of them, is one of:

- a folder of images, as `ImageFolder` understands it, or of sounds alone, as `AudioFolder` does;
- a packed folder;
- a file of texts, or a folder with a training one, as `TextFile` understands it;
- a YAML config, whose ``data.source`` is taken: a run's `config.yaml`, or one of the package's by name;
- the name of a source, e.g. ``Digits`` or ``CIFAR10``;
- the address of a packed set in an object store.
"""

import json
import os
import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from rich.table import Table

import simclr_pl.data
from simclr_pl.data.audio import AudioFolder
from simclr_pl.data.cleaning import check_place, clean
from simclr_pl.data.clips import AUDIO_EXTENSIONS
from simclr_pl.data.decode import EXTENSIONS, MAX_PIXELS
from simclr_pl.data.description import contents, moments, write_moments
from simclr_pl.data.findings import SHOWN, console, show, show_cleaned, size_of
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.inspection import examine
from simclr_pl.data.pack import pack_source
from simclr_pl.data.shards import Shards, all_shards, is_packed, load_index
from simclr_pl.data.sources import Source
from simclr_pl.data.streaming import StreamedShards
from simclr_pl.data.sweep import require_images
from simclr_pl.data.text import TextFile
from simclr_pl.errors import InputError
from simclr_pl.presets import preset_files

_TEXTS = (".txt", ".csv", ".tsv", ".parquet")  # what `TextFile` reads


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
    size = size_of(sum(shard["bytes"] for shard in shards))
    plural = "shard" if len(shards) == 1 else "shards"
    terminal = console()
    terminal.print(f"Packed {images} images in {len(shards)} {plural}, {size}, in {out}")
    if skipped := index["skipped"]:
        terminal.print(
            f"Left out {len(skipped):,} that cannot be read; all are in {out}/index.json:"
        )
        for item in skipped[:SHOWN]:
            terminal.print(f"  {item['path']}: {item['reason']}")
        if len(skipped) > SHOWN:
            terminal.print(f"  and {len(skipped) - SHOWN:,} more")


def info(src: str, workers: int | None = None) -> None:
    """Say what a set holds: samples, classes, bytes and sizes of each split.

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
    for heading in (source.unit, "classes", "stored", "median of one", "median size"):
        table.add_column(heading, justify="right")
    for split, part in found.items():
        size = "-" if part.median_size is None else "{} x {}".format(*part.median_size)
        stored = "-" if part.bytes is None else size_of(part.bytes)
        row = f"{part.images:,}", str(part.classes or "-"), stored, size_of(part.median_bytes), size
        table.add_row(split, *row)
    terminal = console()
    terminal.print(table)
    if is_packed(Path(src)):
        index = load_index(Path(src))
        options = ", ".join(f"{k} {v}" for k, v in index["options"].items())
        terminal.print(f"packed as {index['format']}: {len(all_shards(index))} shards, {options}")
        if index["skipped"]:
            terminal.print(f"{len(index['skipped']):,} images were left out; index.json lists them")


def check(
    src: str,
    fix: str | None = None,
    report: str | None = None,
    tiny: int = 32,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
) -> int:
    """Read every sample and list what is wrong; the exit code is 1 if any is unusable.

    For example, with every finding in a file; and to get a set without what is wrong:

        simclr data check photos --report findings.json
        simclr data check photos --fix clean

    Unusable are damaged, empty, truncated, too large and unreadable samples. Duplicates, also of training
    samples in the query split, tiny images and animations are for you to judge. Of a packed set every
    checksum is verified, too.

    --fix, of images, writes the set without unusable images and without duplicates, and cleaning.json,
    which names each image that was left out and why; the exit code is then 0. A folder of images gets
    hard links, copies where the file system has none; a packed folder is packed again, byte for byte. SRC
    stays as it is, and what SRC's source does not read is not in the new folder.

    Of duplicates the first is kept. Of a training image that is an evaluation image, too, the latter is
    kept (the other is a leak). Training images that are one image in several classes are all left out (a
    conflict), for nobody can say which class is right; so are evaluation images, unless only training
    images contradict them. A folder without a split of its own counts as training images.

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        fix: A new folder, which gets the set without what is wrong.
        report: A JSON file that gets every finding; the terminal shows the first 20 of each kind.
        tiny: Images with a shorter side below this, in pixels, are listed.
        max_pixels: Images with more are too large, taken for decompression bombs.
        workers: Processes; by default one for each core.
    """
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise InputError(
            f"`report` must lie in a folder that exists; got {report!r}. Make the folder first."
        )
    source = source_of(src) if fix is None else _images_of(src)
    if fix is not None:
        check_place(source, fix)
    found = examine(source, tiny, max_pixels, workers)
    if report is not None:
        Path(report).write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    if fix is None:
        show(src, found)
    else:
        arguments = {"src": src, "fix": fix, "tiny": tiny, "max_pixels": max_pixels}
        show_cleaned(src, fix, found, clean(source, found, fix, arguments, max_pixels, workers))
        console().print(f"Train from it: {_fit(src, source, root=fix)}")
    if report is not None:
        console().print(f"All findings are in {report}")
    return 0 if found.usable or fix is not None else 1


def stats(
    src: str,
    out: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Print the mean and standard deviation of the training images, which normalise the views.

    For example, to train with those of your images:

        simclr data stats photos --out photos.yaml
        simclr fit --config imagenet --config photos.yaml --data.source.root photos

    Every pixel counts the same, before any crop; pixels are within [0, 1].

    Args:
        src: A folder of images, a packed folder, a YAML config or its name, or the name of a source.
        out: A new YAML file that gets them as a config. Give it to simclr fit after a config that names
            the augmentation, as all presets of images do; it changes its mean and std alone.
        max_images: Take a random sample of so many images; by default all.
        seed: Of that sample.
        workers: Processes; by default one for each core.
    """
    if out is not None and (Path(out).exists() or not Path(out).absolute().parent.is_dir()):
        raise InputError(
            f"`out` must be a new file in a folder that exists; got {out!r}. Give another."
        )
    source = _images_of(src)
    found = moments(source, max_images, seed, workers)
    left_out = f", {found.unreadable:,} left out as unreadable" if found.unreadable else ""
    about = f"# {src}: {found.images:,} training images, {found.pixels:,} pixels{left_out}"
    print("\n".join([about, *found.lines()]))
    if out is not None:
        command = _fit(src, source, out)
        write_moments(Path(out), found, [f"# {command}", about])
        print(f"# Train with them: {command}")


COMMANDS = {"check": check, "info": info, "stats": stats, "pack": pack}


def source_of(src: str) -> Source:
    """The source that the commands' ``src`` means, not yet opened.

    Raises:
        InputError: it means none.
    """
    path = Path(src)
    if path.is_dir():
        if not is_packed(path):
            return _folder(src)
        return Shards(src) if load_index(path)["format"] == "arrow" else StreamedShards(src)
    if "://" in src:
        return StreamedShards(src)
    if path.suffix.lower() in _TEXTS and path.is_file():
        return TextFile(src)
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


def _folder(root: str) -> Source:
    """A folder of images, or, where it has none, of sounds or of texts."""
    has_sounds = False
    for _, _, files in os.walk(root):
        kinds = {os.path.splitext(file)[1].lower() for file in files}
        if kinds & set(EXTENSIONS):
            return ImageFolder(root)
        has_sounds |= bool(kinds & set(AUDIO_EXTENSIONS))
    if has_sounds:
        return AudioFolder(root)
    if any(Path(root, f"train{suffix}").is_file() for suffix in _TEXTS):
        return TextFile(root)
    return ImageFolder(root)  # it says what it wants


def _images_of(src: str) -> Source:
    source = source_of(src)
    require_images(source)
    return source


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


def _fit(src: str, source: Source, *configs: str, root: str | None = None) -> str:
    """The command that trains from a source: by its own config, else by the first preset of its kind.

    Args:
        src: as the user gave it.
        source: what it means.
        configs: further ones.
        root: a folder in place of the source's.
    """
    name = type(source).__name__
    if src in preset_files() or Path(src).suffix in (".yaml", ".yml"):
        first, options = src, []
    else:
        kinds = {preset: _class_in(file) for preset, file in preset_files().items()}
        first = next((preset for preset, kind in kinds.items() if kind == name), "imagenet")
        options = [] if kinds[first] == name else ["--data.source", name if "." not in src else src]
        root = root or (src if hasattr(source, "root") and Path(src).is_dir() else None)
    options += [] if root is None else ["--data.source.root", root]
    words = [word for config in (first, *configs) for word in ("--config", config)]
    return shlex.join(["simclr", "fit", *words, *options])


def _class_in(config: Path) -> str:
    """The name of the class of a config's source."""
    source = _source_in(config)
    path = source if isinstance(source, str) else source["class_path"]
    return str(path).rpartition(".")[2]
