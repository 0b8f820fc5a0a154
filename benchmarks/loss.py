"""NT-Xent against the textbook form, lightly and pytorch-metric-learning: time, and extra memory.

    python benchmarks/loss.py                     time of loss and gradient, one thread, and the ratio
    python benchmarks/loss.py --threads 2
    python benchmarks/loss.py --variants          each similarity and denominator against plain NT-Xent
    python benchmarks/loss.py --memory            extra peak memory, each in a fresh process
    python benchmarks/loss.py --device cuda       with CUDA events, up to 65,536 images

The rivals take turns within one process, so that a slow minute slows them all; before each timed call
comes an untimed one, so that none pays for the caches that the one before it emptied. Medians are
printed. A rival whose call takes over 20 seconds drops out from there on, as pytorch-metric-learning
does: it compares every positive pair with every negative one. Needs the extra `bench`.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_pl import nt_xent

WIDTH = 128
TEMPERATURE = 0.2
PATIENCE = 20.0  # seconds
Loss = Callable[[Tensor], Tensor]


def textbook(z: Tensor) -> Tensor:
    """Cross-entropy over the matrix of similarities: z (2, B, D)."""
    u = F.normalize(z.flatten(0, 1), dim=1)
    s = u @ u.T / TEMPERATURE
    s = s.masked_fill(torch.eye(len(u), dtype=torch.bool, device=u.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(u), device=u.device).roll(len(u) // 2))


def lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(TEMPERATURE)
    return lambda z: loss(z[0], z[1])


def metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(TEMPERATURE)

    def call(z: Tensor) -> Tensor:
        labels = torch.arange(z.shape[1], device=z.device).repeat(2)
        return loss(z.flatten(0, 1), labels)

    return call


def rivals(device: str) -> dict[str, Loss]:
    table: dict[str, Loss] = {
        "simclr_pl": partial(nt_xent, temperature=TEMPERATURE),
        "simclr_pl, no cache": partial(nt_xent, temperature=TEMPERATURE, cache_mb=0),
        "textbook": textbook,
        "lightly": lightly(),
        "metric-learning": metric_learning(),
    }
    if device == "cuda":
        table["textbook, compiled"] = torch.compile(textbook)
    return table


def variants() -> dict[str, Loss]:
    """Plain NT-Xent, and every other similarity and denominator; the rows have about 128 as square."""
    similarities: dict[str, dict[str, Any]] = {
        "cosine": {"temperature": TEMPERATURE},
        "euclidean": {"temperature": 2 * TEMPERATURE, "similarity": "euclidean"},
        "raw": {"temperature": 16.0, "similarity": "euclidean", "normalise": False},
        "raw, float64": {"temperature": 0.5, "similarity": "euclidean", "normalise": False},
    }
    table: dict[str, Loss] = {
        f"{name}, {denominator}": partial(nt_xent, denominator=denominator, **options)
        for name, options in similarities.items()
        for denominator in ("all", "negatives", "both_negatives")
    }
    return {"simclr_pl": table.pop("cosine, all"), **table}


def seconds(loss: Loss, z: Tensor) -> float:
    """Time of loss and gradient."""
    z.grad = None
    if z.is_cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(z).backward()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    loss(z).backward()
    return time.perf_counter() - begin


def compare_time(table: dict[str, Loss], device: str, sizes: list[int], budget: float) -> None:
    print("milliseconds of loss and gradient, median (how many times simclr_pl's)")
    in_lines = len(table) > 6
    print("      B  " + ("" if in_lines else "".join(f"{name:>22}" for name in table)))
    dropped: dict[str, list[float]] = {}
    for n_images in sizes:
        z = torch.randn(2, n_images, WIDTH, device=device, requires_grad=True)
        taken: dict[str, list[float]] = {}
        for name, loss in table.items():
            if name in dropped:
                continue
            try:
                slow = seconds(loss, z) > PATIENCE
            except (RuntimeError, MemoryError):  # does not fit
                slow = True
                torch.cuda.empty_cache()
            (dropped if slow else taken)[name] = []
        deadline = time.perf_counter() + budget
        while time.perf_counter() < deadline or len(taken["simclr_pl"]) < 3:
            for name in taken:
                seconds(table[name], z)
                taken[name].append(seconds(table[name], z))
        medians = {name: statistics.median(values) for name, values in taken.items()}
        cells = [
            f"{1000 * medians[n]:10.2f} ({medians[n] / medians['simclr_pl']:6.2f} x)"
            if n in medians
            else "dropped out"
            for n in table
        ]
        if in_lines:
            for name, cell in zip(table, cells, strict=True):
                print(f"{n_images:7d}  {name:32}{cell}", flush=True)
        else:
            print(f"{n_images:7d}  " + "".join(f"{cell:>22}" for cell in cells), flush=True)


def peak_mib() -> float:
    """Largest resident set since the last reset (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def report_memory(name: str, n_images: int) -> None:
    loss = rivals("cpu")[name]
    loss(torch.randn(2, 8, WIDTH, requires_grad=True)).backward()  # imports and libraries
    z = torch.randn(2, n_images, WIDTH, requires_grad=True)
    z.grad = torch.zeros_like(z)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = peak_mib()
    loss(z).backward()
    print(f"{peak_mib() - before:.0f}")


def compare_memory(sizes: list[int]) -> None:
    # pytorch-metric-learning would take the whole machine
    names = [name for name in rivals("cpu") if name != "metric-learning"]
    print("MiB of extra peak memory for loss and gradient, each in a fresh process")
    print("      B  " + "".join(f"{name:>22}" for name in names))
    for n_images in sizes:
        cells = [
            subprocess.run(
                [sys.executable, __file__, "--memory-of", name, "--sizes", str(n_images)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for name in names
        ]
        print(f"{n_images:7d}  " + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", help="images of a batch, B")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size")
    parser.add_argument("--rivals", nargs="+", help="simclr_pl and these, by name; default all")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    on_gpu = [512, 2048, 8192, 16384, 32768, 65536]
    sizes = given.sizes or (on_gpu if given.device == "cuda" else [128, 512, 2048, 8192])
    if given.memory_of:
        report_memory(given.memory_of, sizes[0])
    elif given.memory:
        compare_memory(given.sizes or [2048, 8192])
    else:
        table = variants() if given.variants else rivals(given.device)
        table = {name: table[name] for name in given.rivals or table}
        compare_time(table, given.device, sizes, given.seconds)
