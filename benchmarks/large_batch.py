"""A batch of 4,096 images in one step: peak memory and time, whole and in chunks.

    python benchmarks/large_batch.py
    python benchmarks/large_batch.py --images 1024 --chunks 0 256

CIFAR-size images, a ResNet-18 of a quarter of the width, one training step (loss and gradient) on the
CPU, each in a fresh process. The number of negatives is the same in all of them.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from simclr_pl import Encoder, Projector, nt_xent
from simclr_pl.chunks import encode_in_chunks


def peak_mib() -> float:
    """Largest resident set since the last reset (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def step(model: torch.nn.Sequential, views: torch.Tensor, chunk: int | None) -> torch.Tensor:
    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = model[0](x)
        return h, model[1](h)

    _, z = encode_in_chunks(encode, views, chunk, model)
    loss = nt_xent(z.view(2, -1, z.shape[1]), temperature=0.2)
    loss.backward()
    return loss


def report(n_images: int, chunk: int | None) -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_stem=True, width=0.25)
    model = torch.nn.Sequential(encoder, Projector(encoder.num_features))
    model.to(memory_format=torch.channels_last)
    views = torch.rand(2 * n_images, 3, 32, 32).to(memory_format=torch.channels_last)
    step(model, views[:8], chunk and 4)  # imports and libraries
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = peak_mib(), time.perf_counter()
    loss = step(model, views, chunk)
    seconds = time.perf_counter() - begin
    name = "all at once" if chunk is None else f"{chunk} views at a time"
    print(
        f"| {name} | {peak_mib() - before:,.0f} | {seconds:.1f} | {loss.item():.4f} |", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[0, 2048, 512], help="0: no chunks"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        report(given.images, given.one or None)
        sys.exit()
    print(f"{given.images} images, {2 * given.images} views, {torch.get_num_threads()} threads")
    print("| encoded | extra peak memory, MiB | seconds | loss |\n|---|---|---|---|", flush=True)
    for chunk in given.chunks:
        command = [sys.executable, __file__, "--images", str(given.images), "--one", str(chunk)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run(command, check=True, env=environment)
