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

_PROBED = 16  # images whose heads are read to estimate the size of a set
_MOST_MIXED = 2**31  # bytes of a set of mixed sizes: photographs take long to decode
_BLOCK = 256  # images decoded by a thread at a time
_SHARE = 0.25  # of the free memory that a set may take by itself


def hold(
    sets: dict[str, Images], forced: bool, channels: int, sharers: int, threads: int, quiet: bool
) -> dict[str, Images]:
    """Decodes into memory the sets that are to live there, each once.

    Args:
        sets: by name; the same set may have several names.
        forced: all of them, not only those that `fits_in_memory` says.
        channels: C.
        sharers: ranks on this machine, each with a copy of its own.
        threads: that decode.
        quiet: show no bar.

    Raises:
        InputError: see `decode_all`.
    """
    held: dict[int, Images] = {}
    for images in sets.values():
        if isinstance(images, ResidentImages) or id(images) in held:
            continue
        if forced or fits_in_memory(images, channels, sharers):
            with Bar("Decoding into memory", len(images), hidden=quiet) as bar:
                held[id(images)] = decode_all(images, threads, bar.advance)
    return {name: held.get(id(images), images) for name, images in sets.items()}


def fits_in_memory(images: StoredSamples, channels: int, sharers: int) -> bool:
    """Whether a set seems to take little of the free memory, and, of mixed sizes, 2 GiB at most.

    Args:
        images: the set; a few heads are read.
        channels: C.
        sharers: ranks on this machine, each with a copy of its own.
    """
    sizes = []
    for i in np.linspace(0, len(images) - 1, min(_PROBED, len(images))).astype(int).tolist():
        try:
            sizes.append(images.open(i)[:2])
        except UnreadableSample:
            continue
    if not sizes:
        return False
    need = len(images) * channels * float(np.mean([height * width for height, width in sizes]))
    if len(set(sizes)) > 1 and need > _MOST_MIXED:
        return False
    return need * sharers <= _SHARE * free_memory()


def fits_on_device(images: ResidentImages, device: torch.device) -> bool:
    """Whether the pixels take at most a quarter of a GPU's free memory."""
    if device.type != "cuda":
        return True  # shared with the host's
    return images.flat.nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]


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
    """Decodes a whole set, in one pass; what cannot be read is remembered, as a black pixel.

    Args:
        images: of any sizes.
        threads: that decode; the decoders release Python's lock.
        progress: called with the number of images of each finished block.

    Raises:
        InputError: none of the images can be read.
    """
    channels = _first_readable(images).shape[2]
    unreadable: dict[int, tuple[str, str]] = {}

    def work(block: range) -> list[np.ndarray]:
        decoded = []
        for i in block:
            try:
                decoded.append(images.open(i).pixels(reuse=True).copy())
            except UnreadableSample as error:
                unreadable[i] = images.name(i), str(error)
                decoded.append(np.zeros((1, 1, channels), np.uint8))
        progress(len(block))
        return decoded

    if not isinstance(images.reader, EncodedReader):
        threads = 1  # a user's data set may share a file among its items
    blocks = [range(i, min(i + _BLOCK, len(images))) for i in range(0, len(images), _BLOCK)]
    flat, sides = np.empty(0, np.uint8), []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for decoded in pool.map(work, blocks):
            sides += [pixels.shape[:2] for pixels in decoded]
            # The system moves no byte of a large array that grows, it maps its pages elsewhere. So the
            # sizes need not be known before, and there is no second copy of the set.
            done = flat.size
            flat.resize(done + sum(pixels.size for pixels in decoded), refcheck=False)
            np.concatenate([pixels.ravel() for pixels in decoded], out=flat[done:])
    tensor = torch.from_numpy(flat).view(-1, channels)
    return ResidentImages(
        tensor, images.labels, dict(sorted(unreadable.items())), np.array(sides, np.int64)
    )


def _first_readable(images: Images) -> np.ndarray:
    for i in range(len(images)):
        try:
            return images.open(i).pixels()
        except UnreadableSample as error:
            reason = f"{images.name(i)!r}: {error}"
    raise InputError(f"a set must hold readable images; got none, last {reason}. Check the data.")
