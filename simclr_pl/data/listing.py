"""What the images of a source are called in a pack, and a name for all of them together."""

import hashlib
import json
import os
from typing import Any

from simclr_pl.data.folders import FileReader
from simclr_pl.data.shards import FORMAT_VERSION
from simclr_pl.data.sources import EncodedReader, Images, ResidentImages, Source
from simclr_pl.data.sweep import Bar


def path_of(source: Source, images: Images, i: int) -> str:
    """The path that a packed set keeps: below the source's folder where it has one.

    So a pack does not depend on where its source lay.
    """
    reader = getattr(images, "reader", None)
    if hasattr(reader, "path"):  # packed before
        return str(reader.path(images.number(i)))  # type: ignore[union-attr]
    name = images.name(i)
    if isinstance(reader, FileReader) and hasattr(source, "root"):
        name = os.path.relpath(name, source.root)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def fingerprint_of(
    source: Source, splits: dict[str, Images], options: dict[str, Any], format: str
) -> str:
    """Names what is packed and how, in hexadecimal; the sizes of files stand for their content.

    Args:
        source: opened.
        splits: its sets, by name.
        options: of the pack.
        format: of the shards.
    """
    about = [FORMAT_VERSION, format, options, source.channels, list(source.classes)]
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    total.update(getattr(source, "fingerprint", "").encode())
    with Bar("Listing", sum(map(len, splits.values()))) as bar:
        for split, images in splits.items():
            total.update(f"{split} {len(images)}".encode())
            total.update(images.labels.tobytes())
            if isinstance(images, ResidentImages):
                total.update(images.flat.numpy())  # type: ignore[arg-type]
            elif isinstance(images.reader, EncodedReader):
                total.update(str(images.reader.max_pixels).encode())
            for i in bar.over(range(len(images))):
                size = _size_of_file(images, i)
                total.update(f"{path_of(source, images, i)}\0{size}\0".encode())
    return total.hexdigest()


def _size_of_file(images: Images, i: int) -> int:
    if isinstance(images, ResidentImages) or not isinstance(images.reader, FileReader):
        return -1
    try:
        return os.stat(images.name(i)).st_size
    except OSError:
        return -1
