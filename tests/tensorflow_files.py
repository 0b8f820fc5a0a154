"""Checkpoints that TensorFlow wrote of the authors' own networks; their numbers are made anew.

`tf_files/NAME.index` is TensorFlow's, check sums included. The numbers follow from each tensor's name,
so that the `.data` file, tens of megabytes, need not be kept; of it, `NAME.graph.gz` has the graph of
objects. `NAME.npz` has the features that TensorFlow computed with these numbers from `images(size)`.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from simclr_pl.commands.tensor_bundle import Bundle

FOLDER = Path(__file__).parent / "tf_files"
STEP = 1234


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:  # of batch norms, and biases
        return rng.random(shape, np.float32) / 2 + np.float32(0.5)
    return rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)


def images(size: int) -> np.ndarray:
    """Two images (2, size, size, 3) in [0, 1]."""
    return np.random.default_rng(0).random((2, size, size, 3), np.float32)


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, C, H, W) and the features (n, E) that TensorFlow made of them."""
    recorded = np.load(FOLDER / f"{name}.npz")
    return images(int(recorded["size"])).transpose(0, 3, 1, 2), recorded["features"]


def write(name: str, prefix: Path) -> Path:
    """Puts the index, and its numbers, where ``prefix`` says; returns it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    index = prefix.with_name(prefix.name + ".index")
    index.write_bytes((FOLDER / f"{name}.index").read_bytes())
    with prefix.with_name(prefix.name + ".data-00000-of-00001").open("wb") as data:
        for key, entry in Bundle(prefix).entries.items():
            data.seek(entry.offset)
            if key == "_CHECKPOINTABLE_OBJECT_GRAPH":
                data.write(gzip.decompress((FOLDER / f"{name}.graph.gz").read_bytes()))
            elif entry.shape == ():
                data.write(np.int64(STEP).tobytes())
            else:
                data.write(values(key, entry.shape).tobytes())
    return prefix
