"""Sets that fit are decoded once and stay in memory.

Symbols: M images, C channels, H x W pixels.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sources import EncodedReader, Images, ResidentImages, StoredSamples
from simclr_pl.data.sweep import Bar
from simclr_pl.errors import InputError

_PROBED = 16  # images whose heads are read to tell whether a set has one size
_SHARE = 0.25  # of the free memory that a set may take by itself


def hold(
    sets: dict[str, Images], forced: bool, channels: int, sharers: int, threads: int, quiet: bool
) -> dict[str, Images]:
    """Decodes into memory the sets that are to live there, each once.

    Args:
        sets: by name; the same set may have several names.
        forced: all of them, not only those of one size that fit.
        channels: C.
        sharers: ranks on this machine, each with a copy of its own.
        threads: that decode.
        quiet: show no bar.

    Raises:
        InputError: see `decode_all`, where ``forced``.
    """
    held: dict[int, Images] = {}
    for images in sets.values():
        if isinstance(images, ResidentImages) or id(images) in held:
            continue
        if forced or fits_in_memory(images, channels, sharers):
            try:
                with Bar("Decoding into memory", len(images), hidden=quiet) as bar:
                    held[id(images)] = decode_all(images, threads, bar.advance)
            except InputError:  # not of one size after all
                if forced:
                    raise
    return {name: held.get(id(images), images) for name, images in sets.items()}


def fits_in_memory(images: StoredSamples, channels: int, sharers: int) -> bool:
    """Whether a set seems to have images of one size, and takes little of the free memory.

    Args:
        images: the set; a few heads are read.
        channels: C.
        sharers: ranks on this machine, each with a copy of its own.
    """
    sizes = set()
    for i in np.linspace(0, len(images) - 1, min(_PROBED, len(images))).astype(int).tolist():
        try:
            sizes.add(images.open(i)[:2])
        except UnreadableSample:
            continue
    if len(sizes) != 1:
        return False
    height, width = sizes.pop()
    return bool(len(images) * height * width * channels * sharers <= _SHARE * free_memory())


def fits_on_device(images: ResidentImages, device: torch.device) -> bool:
    """Whether the pixels take at most a quarter of a GPU's free memory."""
    if device.type != "cuda":
        return True  # shared with the host's
    return images.pixels.nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]


def free_memory() -> int:
    """Bytes of memory that this machine, or this container, can still give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux: at least the physical memory is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        return min(free, max(0, limit - used))
    except (OSError, ValueError):  # no control group, or one whose limit is "max"
        return free


def decode_all(
    images: StoredSamples, threads: int, progress: Callable[[int], None] = lambda n: None
) -> ResidentImages:
    """Decodes a whole set; what cannot be read is remembered, as black pixels.

    Args:
        images: of one size.
        threads: that decode; the decoders release Python's lock.
        progress: called with the number of images of each finished block.

    Raises:
        InputError: the images differ in size, or none can be read.
    """
    first = _first_readable(images)
    pixels = np.zeros((len(images), *first.shape), np.uint8)
    unreadable: dict[int, tuple[str, str]] = {}

    def work(block: range) -> None:
        for i in block:
            try:
                one = images.open(i).pixels(reuse=True)
            except UnreadableSample as error:
                unreadable[i] = images.name(i), str(error)
                continue
            if one.shape != first.shape:
                raise InputError(
                    "a resident set needs images of one size; got "
                    f"{one.shape[1]} x {one.shape[0]} pixels in {images.name(i)!r} and "
                    f"{first.shape[1]} x {first.shape[0]} before. Set `data.resident` to none."
                )
            pixels[i] = one
        progress(len(block))

    if not isinstance(images.reader, EncodedReader):
        threads = 1  # a user's data set may share a file among its items
    blocks = [range(i, min(i + 256, len(images))) for i in range(0, len(images), 256)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(work, blocks))
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return ResidentImages(tensor, images.labels, dict(sorted(unreadable.items())))


def _first_readable(images: Images) -> np.ndarray:
    for i in range(len(images)):
        try:
            return images.open(i).pixels()
        except UnreadableSample as error:
            reason = f"{images.name(i)!r}: {error}"
    raise InputError(f"a set must hold readable images; got none, last {reason}. Check the data.")
